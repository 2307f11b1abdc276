"""What all pages share: the head, empty states, and messages in place of tracebacks."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import streamlit as st
from stageline.dashboard.settings import DashboardSettings, find_bundles
from stageline.models.errors import StagelineError


def page(title: str, purpose: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes a page of what draws its body. Users' errors are shown in a box; a bug keeps its traceback."""

    def decorated(body: Callable[[], None]) -> Callable[[], None]:
        @wraps(body)
        def drawn() -> None:
            st.title(title, anchor=False)
            st.caption(purpose)
            told(body)

        return drawn

    return decorated


def told(body: Callable[[], None]) -> None:
    """Run `body`; what goes wrong for a reason that a user can mend is told in a box."""
    try:
        body()
    except StagelineError as error:
        st.error(str(error), icon=":material/error:")
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        st.error(named, icon=":material/error:")


def empty(head: str, text: str, commands: Sequence[str] = ()) -> None:
    """An empty state: what is not there yet, and what to do next."""
    with st.container(border=True, key="empty"):
        st.subheader(head, anchor=False)
        st.markdown(text)
        for command in commands:
            st.code(command, language="bash", wrap_lines=True)


def choose_bundle(extra: Sequence[Path] = ()) -> Path | None:
    """The bundle chosen, also by the query parameter `bundle`; None, and an empty state, where there is none."""
    places = (*DashboardSettings.given().bundles, *extra)
    found = find_bundles(places)
    if not found:
        looked = ", ".join(f"`{place}`" for place in places)
        empty(
            "No bundle here yet",
            f"A bundle is an exported model, cut into stages. Looked in {looked}. Make one, then reload this page:",
            [
                "stageline models fetch minilm",
                "stageline export models/checkpoints/minilm -o bundles/minilm --stages 2",
            ],
        )
        return None
    names = labels(found)
    chosen = st.selectbox("Bundle", list(names), key="bundle", bind="query-params")
    return names[chosen]


def labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by the shortest names that tell them apart."""
    single = [folder.name for folder in folders]
    return {
        folder.name if single.count(folder.name) == 1 else f"{folder.name} ({folder.parent})": folder
        for folder in folders
    }
