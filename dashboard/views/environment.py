"""The Environment page: the findings of `stageline doctor`."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import streamlit as st
from stageline.dashboard.views.common import page
from stageline.runtime import words
from stageline.runtime.doctor import Diagnosis, diagnose

_MARKDOWN = re.compile(r"[-\\`*_{}\[\]()#+!|<>~$:]")


@page("Environment", "What this machine has for Stageline, and how to install the rest; as `stageline doctor` reports.")
def show() -> None:
    """Draw the page."""
    found = _diagnosis()
    for problem in found.problems:
        st.warning(problem, icon=":material/warning:")
    cpu = found.cpu
    with st.container(horizontal=True):
        st.metric("CPU cores", len(cpu.cores), border=True, help=cpu.model)
        memory = cpu.memory_bytes
        st.metric("Memory", words.size(memory) if memory else "unknown", border=True)
        st.metric("GPUs", len(found.gpus), border=True)
        ready = [engine for engine in found.engines if engine.version]
        st.metric("Engines", f"{len(ready)} of {len(found.engines)}", border=True, help="installed")
    nvidia = found.driver.problem or f"NVIDIA {found.driver.version}, CUDA up to {found.driver.cuda}"
    st.caption(f"stageline {found.stageline}, Python {found.python}, {found.system}. {cpu.model}. Driver: {nvidia}.")
    if found.gpus:
        st.subheader("GPUs", anchor=False)
        _table(
            [
                {
                    "device": f"cuda:{gpu.index}",
                    "name": gpu.name,
                    "compute capability": gpu.compute_capability,
                    "memory": words.size(gpu.memory_bytes),
                    "free": words.size(gpu.free_bytes),
                    "MIG": ", ".join(part.name for part in gpu.mig) or "off",
                }
                for gpu in found.gpus
            ]
        )
    st.subheader("Engines", anchor=False)
    _table(
        [
            {
                "engine": engine.name,
                "version": engine.version or "absent",
                "runs on": engine.runs_on,
                "builds for": " ".join(engine.targets) or "none",
                "install": "" if engine.version else engine.install,
            }
            for engine in found.engines
        ]
    )
    st.subheader("Optional parts", anchor=False)
    _table(
        [
            {
                "extra": extra.name,
                "state": "complete" if extra.complete else "absent: " + " ".join(_absent(extra.packages.items())),
                "install": "" if extra.complete else extra.install,
            }
            for extra in found.extras
        ]
    )
    _to_copy(found)
    st.subheader("Reference checkpoints", anchor=False)
    _table(
        [
            {"checkpoint": one.name, "folder": one.folder or "absent", "fetch": "" if one.folder else one.fetch}
            for one in found.checkpoints
        ]
    )


@st.cache_data(ttl=30, show_spinner=False)
def _diagnosis() -> Diagnosis:
    return diagnose()


def _absent(packages: Any) -> list[str]:
    return [name for name, version in packages if version is None]


def _table(rows: Sequence[dict[str, Any]]) -> None:
    """Texts as they are: a table's cells are Markdown, which makes a bullet of a dash."""
    plain = [{name: _MARKDOWN.sub(r"\\\g<0>", str(value)) for name, value in row.items()} for row in rows]
    st.table(plain, hide_index=True, border="horizontal")


def _to_copy(found: Diagnosis) -> None:
    """Commands that install what is missing, and all findings for a report of a fault."""
    missing = [engine.install for engine in found.engines if not engine.version and engine.install]
    missing += [extra.install for extra in found.extras if not extra.complete]
    missing += [one.fetch for one in found.checkpoints if not one.folder]
    if missing:
        st.subheader("What is missing", anchor=False)
        st.code("\n".join(dict.fromkeys(missing)), language="bash", wrap_lines=True)
    with st.expander("For the report of a fault"):
        st.code(json.dumps(asdict(found), indent=1, default=str), language="json")
