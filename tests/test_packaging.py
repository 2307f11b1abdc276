"""The tree, the wheel and the floors agree: what is packaged, what may import what, what every module begins with."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imports import circle, imported, imports, room_of, rooms

ROOT = Path(__file__).parent.parent
FLOORS = ("models", "runtime", "exporter", "dashboard")
TORCH = {"torch", "transformers", "accelerate", "onnxscript"}
ABOVE = {  # the dashboard stands on runtime and models, beside the exporter
    "models": {"runtime", "exporter", "dashboard"},
    "runtime": {"exporter", "dashboard"},
    "exporter": {"dashboard"},
    "dashboard": {"exporter"},
}
# The libraries a floor must never import, anywhere, not even inside a function.
FORBIDDEN = {
    "models": TORCH | {"onnxruntime", "onnx_ir", "pydantic", "streamlit", "altair", "typer", "rich"},
    "runtime": TORCH | {"gguf", "sentencepiece", "streamlit", "altair", "typer"},
    "exporter": {"streamlit", "altair"},
    "dashboard": TORCH,
}


# Rooms that stay apart, whatever else moves. Any other arrow may be drawn that closes no circle.
NEVER = {
    "runtime.devices": {"runtime.engines"},
    "runtime.bundle": {"runtime.engines", "runtime.stages"},
    "runtime.engines": {"runtime.builder", "runtime.planning", "runtime.stages", "runtime.pipeline"},
    "runtime.builder": {"runtime.planning", "runtime.pipeline"},
    "runtime.stages": {"runtime.batching", "runtime.generation", "runtime.planning"},
    "runtime.planning": {"runtime.pipeline", "runtime.rebalance", "runtime.bench"},
    "runtime.pipeline": {"runtime.bench", "runtime.service", "runtime.builder"},
    "dashboard.figures": {"dashboard.charts", "dashboard.views"},
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "checkpoints" not in file.parts:
                yield file


def test_packages_of_the_wheel_are_those_of_the_tree() -> None:
    folders = [file.parent.relative_to(ROOT) for file in modules(*FLOORS) if file.name == "__init__.py"]
    setuptools = project()["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(f"stageline.{'.'.join(folder.parts)}" for folder in folders)
    assert setuptools["package-dir"] == {f"stageline.{'.'.join(folder.parts)}": str(folder) for folder in folders}


def test_every_module_lies_in_a_package() -> None:
    lost = [file for file in modules(*FLOORS) if not (file.parent / "__init__.py").is_file()]
    assert not lost, "these would be missing from the wheel"


@pytest.mark.parametrize("floor", FLOORS)
def test_every_floor_is_typed(floor: str) -> None:
    assert (ROOT / floor / "py.typed").is_file()


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor: str) -> None:
    for file in modules(floor):
        for name in imported(file):
            top, _, rest = name.partition(".")
            assert top not in FORBIDDEN[floor], f"{file} imports {name}; floor {floor} may not"
            if top == "stageline":
                assert rest.split(".")[0] not in ABOVE[floor], f"{file} imports {name}, which is a floor above it"


def test_modules_and_rooms_import_in_no_circle() -> None:
    graph = imports()
    assert not circle(graph)
    assert not circle(rooms(graph))


def test_rooms_that_stay_apart_do() -> None:
    drawn = rooms(imports())
    crossed = [f"{room} imports {other}" for room, others in NEVER.items() for other in others & drawn[room]]
    assert not crossed


def test_only_the_commands_import_the_commands() -> None:
    commands = "exporter.commands"
    found = {module for module, names in imports().items() if any(room_of(name) == commands for name in names)}
    assert {room_of(module) for module in found} <= {commands}


def test_nothing_is_imported_by_a_bare_name() -> None:
    for file in modules(*FLOORS, "tests", "benchmarks", "examples"):
        bare = {name.partition(".")[0] for name in imported(file)} & set(FLOORS)
        assert not bare, f"{file} imports {bare}: a second copy of every class; import stageline.{'/'.join(bare)}"


def test_every_module_begins_with_its_docstring() -> None:
    for file in modules(*FLOORS, "benchmarks", "examples"):
        assert file.read_text().startswith('"""'), f"{file} does not begin with a docstring"


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "pytest imports test files by path (importlib mode)"


def test_a_circle_of_imports_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
