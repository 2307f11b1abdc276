"""Write the generated parts of the documentation: the page of the command line, and the table of folders in Design.

python docs/generate.py          write them
python docs/generate.py --check  exit with 1 if one of them is out of date
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from stageline.exporter.commands.cli import app
from typer.main import get_command

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FLOORS = ("dashboard", "exporter", "runtime", "models")
CLI_HEAD = """# Command line

<!-- Written by docs/generate.py from the program: do not edit. `make docs-reference` writes it again. -->

Every command prints its help with `--help`. It exits with 0 on success, 1 on an error (one line on stderr), 2 on wrong
usage, and 130 if it was interrupted. With `--json`, a command prints one JSON document on stdout.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Each command of the program with its full name (`stageline bench list`), groups included, in the help's order."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for child_name, child in getattr(command, "commands", {}).items():
            yield from below(f"{name} {child_name}", child)

    return below("stageline", get_command(app))


def cli_reference() -> str:
    """The page docs/reference/cli.md."""
    return "\n".join([CLI_HEAD, *(_section(name, command) for name, command in commands())])


def _section(name: str, command: Any) -> str:
    text, _, example = (command.help or "").partition("Example: ")
    level = "##" if name.count(" ") < 2 else "###"
    children = getattr(command, "commands", {})
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = [name, *(["[OPTIONS]"] if options else []), *(p.metavar or p.name.upper() for p in arguments)]
    lines = [f"{level} {name}", "", _prose(text), ""]
    lines += ["```", " ".join([*usage, *(["COMMAND ..."] if children else [])]), "```", ""]
    if example:
        lines += ["Example:", "", "```", " ".join(example.split()), "```", ""]
    hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
    if arguments or options:
        lines += ["| name | value | default | description |", "|---|---|---|---|"]
        lines += [_row(parameter, hints[parameter.name]) for parameter in (*arguments, *options)] + [""]
    return "\n".join(lines)


def _row(parameter: Any, hint: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
    name = ", ".join(f"`{n}`" for n in names) or f"`{parameter.metavar or parameter.name.upper()}`"
    value = "" if getattr(parameter, "is_flag", False) else _value(parameter, hint)
    default = "required" if parameter.required else _default(parameter)
    return "| " + " | ".join([name, value, default, _cell(parameter.help or "")]) + " |"


def _value(parameter: Any, hint: Any) -> str:
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    choices = _choices(kind)
    if choices:
        return " \\| ".join(f"`{choice}`" for choice in choices)
    if parameter.metavar and parameter.param_type_name == "option":
        return f"`{_cell(parameter.metavar)}`"
    found = next((word for word in ("int", "float", "Path") if word in str(kind)), "")
    word = {"int": "integer", "float": "number", "Path": "path"}.get(found, "text")
    low, high = parameter.min, parameter.max
    bounds = (f" ≥ {low}" if low is not None else "") + (f" ≤ {high}" if high is not None else "")
    return word + bounds


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _default(parameter: Any) -> str:
    default = parameter.default
    if default is None or default is False or default in ("", (), []):
        return f"`${parameter.envvar}`" if parameter.envvar else ""
    return f"`{parameter.opts[0] if default is True else default}`"


def _cell(text: str) -> str:
    # brackets would be links to names of the reference
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")


def _prose(text: str) -> str:
    return "\n\n".join(textwrap.fill(paragraph, 120) for paragraph in text.strip().split("\n\n"))


def folders() -> str:
    """A table of the packages, two levels deep, each with the first line of its `__init__.py`."""
    rows = ["| folder | what is in it |", "|---|---|"]
    for floor in FLOORS:
        for file in sorted((ROOT / floor).rglob("__init__.py"), key=lambda f: f.parts):
            depth = len(file.parent.relative_to(ROOT / floor).parts)
            if depth < 2 and "checkpoints" not in file.parts:
                first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
                rows.append(f"| `{file.parent.relative_to(ROOT)}/` | {_cell(first)} |")
    return "\n".join(rows)


def pages() -> dict[Path, str]:
    """What each file with generated parts has to hold."""
    design = DOCS / "explanation" / "design.md"
    block = re.compile(r"(<!-- generated: folders -->\n).*?(<!-- end -->)", re.DOTALL)
    filled = block.sub(lambda match: f"{match[1]}\n{folders()}\n\n{match[2]}", design.read_text())
    return {DOCS / "reference" / "cli.md": cli_reference(), design: filled}


def main(arguments: list[str]) -> int:
    """Write the generated parts, or with --check only compare them."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if arguments == ["--check"]:
            print(f"{path.relative_to(ROOT)} is out of date: make docs-reference", file=sys.stderr)
        else:
            path.write_text(pages()[path])
            print(path.relative_to(ROOT))
    return 1 if stale and arguments == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
