"""Shared by all pages: the head, empty states, and messages instead of tracebacks."""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import streamlit as st
from stageline.dashboard.settings import DashboardSettings, find_bundles
from stageline.dashboard.views.address import forget, keep
from stageline.models.errors import StagelineError
from stageline.runtime.report.spec import Spec, dressed


def page(title: str, purpose: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorates the function that draws a page's body. Users' errors show in a box; a bug keeps its traceback."""

    def decorated(body: Callable[[], None]) -> Callable[[], None]:
        @wraps(body)
        def drawn() -> None:
            st.title(title, anchor=False)
            st.caption(purpose)
            guarded(body)

        return drawn

    return decorated


def guarded(body: Callable[[], None]) -> None:
    """Run `body`; errors that a user can fix show in a box."""
    try:
        body()
    except StagelineError as error:
        st.error(plain(str(error)), icon=":material/error:")
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        st.error(plain(named), icon=":material/error:")


def plain(text: str) -> str:
    """What a run, a bundle or a service brought along, for a sentence in Streamlit's Markdown, where no mark of it does
    anything: no link, no picture from elsewhere, no colour."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """The same as code, whatever backticks it has."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def draw(spec: Spec, key: str, sentence: str) -> None:
    """Show a chart in the page's theme; `sentence` tells a screen reader what it shows."""
    theme = st.context.theme.type or "light"
    st.vega_lite_chart(dressed(spec, theme), width="stretch", key=key, alt=sentence)


def empty(head: str, text: str, commands: Sequence[str] = ()) -> None:
    """An empty state: what is missing, and what to do next."""
    with st.container(border=True, key="empty"):
        st.subheader(head, anchor=False)
        st.markdown(text)
        for command in commands:
            st.code(command, language="bash", wrap_lines=True)


def choose_bundle(extra: Sequence[Path] = ()) -> Path | None:
    """The bundle chosen on the page or by the query parameter `bundle`. None, and what to do, where that is
    not there, or no bundle is."""
    places = (*DashboardSettings.given().bundles, *extra)
    found = find_bundles(places)
    looked = ", ".join(code(str(place)) for place in places)
    if not found:
        empty(
            "No bundle yet",
            f"A bundle is an exported model, cut into stages. Looked in {looked}. Make one, then reload this page:",
            [
                "stageline models fetch minilm",
                "stageline export models/checkpoints/minilm -o bundles/minilm --stages 2",
            ],
        )
        return None
    names = labels(found)
    # Never another one in place of the one that is asked for: a benchmark of it would be started without a word.
    asked = st.session_state.get("bundle") or st.query_params.get("bundle")
    st.session_state["bundle"] = asked if asked in names else None if asked else next(iter(names))
    if asked and asked not in names:
        st.warning(
            f"The bundle {plain(str(asked))} is not in {looked} any more. Choose another.", icon=":material/link_off:"
        )
    chosen = st.selectbox(
        "Bundle", list(names), key="bundle", placeholder="Choose a bundle", on_change=forget, args=("stages", "cuts")
    )
    if chosen is None:
        return None
    keep("bundle", chosen)
    return names[chosen]


def labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their shortest distinct names."""
    single = [folder.name for folder in folders]
    return {
        folder.name if single.count(folder.name) == 1 else f"{folder.name} ({folder.parent})": folder
        for folder in folders
    }
