"""The one launcher of benchmarks, for all pages and browsers of a dashboard."""

import streamlit as st
from stageline.dashboard.children.benchmarks import Launcher


@st.cache_resource
def launcher() -> Launcher:
    """Starts benchmarks, one at a time."""
    return Launcher()
