"""Choices that a page's address holds, so that it can be kept, sent and reloaded.

Streamlit binds widgets to query parameters by itself (`bind`), but forgets the bound ones once a script sets another
(1.67). So these are all set by the script.
"""

import math
from collections.abc import Sequence

import streamlit as st


def start(name: str, key: str, options: Sequence[str], default: str) -> None:
    """Give a new widget `key` the address's choice `name`, where it is among `options`, or else the default."""
    if st.session_state.get(key) not in options:
        given = st.query_params.get(name, default)
        st.session_state[key] = given if given in options else default


def keep(name: str, chosen: str, default: str = "") -> None:
    """Write a choice into the address; the default is left out."""
    if chosen != default:
        if st.query_params.get(name) != chosen:
            st.query_params[name] = chosen
    elif name in st.query_params:
        del st.query_params[name]


def restore(name: str, key: str, default: str) -> None:
    """Give a new text box `key` the address's text `name`, or else the default."""
    if key not in st.session_state:
        st.session_state[key] = st.query_params.get(name, default)


def restore_number(name: str, key: str, default: float | None, kind: type[int] | type[float]) -> None:
    """Give a new box of a number `key` the address's number `name`, where it is one, or else the default."""
    if key not in st.session_state:
        try:
            given = kind(st.query_params[name])
            st.session_state[key] = given if math.isfinite(given) else default
        except (KeyError, ValueError):
            st.session_state[key] = default


def restore_several(name: str, key: str, options: Sequence[str], default: Sequence[str]) -> None:
    """Give a new choice of several `key` those of the address's names `name`, between commas, that are options."""
    if key not in st.session_state:
        given = st.query_params[name].split(",") if name in st.query_params else default
        st.session_state[key] = [one for one in given if one in options]


def forget(*names: str) -> None:
    """Take choices out of the address: those that belonged to what another choice has replaced."""
    for name in names:
        st.query_params.pop(name, None)
