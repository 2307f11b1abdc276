"""Choices that a page's address holds, so that it can be kept, sent and reloaded.

Streamlit binds widgets to query parameters by itself (`bind`), but forgets the bound ones once a script sets another
(1.67). So these are all set by the script.
"""

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
