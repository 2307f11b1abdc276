"""The tree, the wheel and the floors agree: what is packaged, what may import what, what every module begins with."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "checkpoints" not in file.parts:
                yield file


def imported(file: Path) -> set[str]:
    """The full names of what a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; import by the full name"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


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


def test_nothing_is_imported_by_a_bare_name() -> None:
    for file in modules(*FLOORS, "tests", "benchmarks", "examples"):
        bare = {name.partition(".")[0] for name in imported(file)} & set(FLOORS)
        assert not bare, f"{file} imports {bare}: a second copy of every class; import stageline.{'/'.join(bare)}"


def test_every_module_begins_with_its_docstring() -> None:
    for file in modules(*FLOORS, "benchmarks", "examples"):
        assert file.read_text().startswith('"""'), f"{file} does not begin with a docstring"


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "pytest imports test files by path (importlib mode)"
