"""Who imports whom, read from the source. `python tests/helpers/imports.py [FOLDER]` draws the rooms of a checkout.

A room is a folder of a floor, or a module that stands loose in one. Imports inside functions and under TYPE_CHECKING
count as well.
"""

import ast
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FLOORS = ("models", "runtime", "exporter", "dashboard")
ROOT = Path(__file__).parents[2]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The file of each module of the product, by its full name."""
    found = {}
    for floor in FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            if "checkpoints" not in parts:
                found[".".join(("stageline", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    return found


def imported(file: Path) -> set[str]:
    """The full names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; import by the full name"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules of the product that each one imports."""
    files = modules(root)
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        found[module] = set()
        for name in imported(file):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                found[module].add(name)
    return found


def rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        mine = room_of(module)
        found.setdefault(mine, set()).update(room_of(target) for target in targets if room_of(target) != mine)
    return found


def room_of(module: str) -> str:
    """`stageline.runtime.engines.base` is in `runtime.engines`."""
    return ".".join(module.split(".")[1:3])


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The names of a circle of imports, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    graph = imports(root)
    drawn = rooms(graph)
    for room, targets in sorted(drawn.items()):
        print(f"{room:28} -> {', '.join(sorted(targets)) or '-'}")
    print(f"{len(drawn)} rooms, {sum(map(len, drawn.values()))} arrows")
    print("circle of modules:", " -> ".join(circle(graph)) or "none")
    print("circle of rooms:", " -> ".join(circle(drawn)) or "none")


if __name__ == "__main__":
    main()
