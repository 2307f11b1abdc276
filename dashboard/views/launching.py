"""What starts measurements, one of each kind for all pages and browsers of a dashboard, and one turn for both."""

import streamlit as st
from stageline.dashboard.children.benchmarks import Launcher
from stageline.dashboard.children.profiles import Profiler
from stageline.dashboard.children.turn import Turn
from stageline.dashboard.views.common import plain
from stageline.runtime import words


@st.cache_resource
def turn() -> Turn:
    """Whose turn it is: one measurement at a time."""
    return Turn()


@st.cache_resource
def launcher() -> Launcher:
    """Starts benchmarks."""
    return Launcher(turn())


@st.cache_resource
def profiler() -> Profiler:
    """Starts profiles."""
    return Profiler(turn())


def profile_shown() -> bool:
    """Show the profile that is being measured, or why the last one failed. Whether one is being measured."""
    now = profiler().now()
    if now is None:
        return False
    if now.error is None:
        _following_profile()
        return True
    st.error(f"{plain(now.bundle.name)} was not profiled: {plain(str(now.error))}", icon=":material/error:")
    return False


@st.fragment(run_every=1.0)
def _following_profile() -> None:
    now = profiler().now()
    if now is None or now.error is not None:
        st.rerun()
    st.progress(now.share, text=f"Profiling {now.bundle.name}: {words.share(now.share)}, {now.step}")
