"""The documentation is true: generated pages fit the program, and links, commands, paths and Python in pages exist."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stageline.runtime
import typer
from images import write_dino, write_picture
from stageline.exporter.commands.cli import app
from stageline.exporter.export import export
from typer.main import get_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = "runtime|exporter|models|dashboard|tests|benchmarks|examples|docs"


@dataclass(frozen=True)
class Fence:
    """A block of code in a page; `line` is that of its first line."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def split(page: Path) -> tuple[str, list[Fence]]:
    """The page without its fences (their lines empty), and the fences."""
    prose, fences, inside = [], [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                fences.append(Fence(page, number + 1, line.strip().strip("`"), ""))
        elif inside:
            fence = fences.pop()
            fences.append(Fence(page, fence.line, fence.language, f"{fence.text}{line}\n"))
        prose.append("" if inside or line.lstrip().startswith("```") else line)
    assert not inside, f"{page} ends inside a fence"
    return "\n".join(prose), fences


def fences(language: str | None = None) -> list[Fence]:
    every = [fence for page in PAGES for fence in split(page)[1]]
    return every if language is None else [fence for fence in every if fence.language == language]


def inline_code() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", split(page)[0]):
            yield page, " ".join(code.split())


def command_lines(fence: Fence) -> Iterator[str]:
    """The lines of a fence that a reader types: those after "$ " if it has any, otherwise all."""
    lines = fence.text.replace("\\\n", " ").splitlines()
    typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
    return iter([] if fence.language not in ("", "bash", "sh") else typed)


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_fit_the_program(generate: Any) -> None:
    stale = [path.relative_to(ROOT) for path, text in generate.pages().items() if path.read_text() != text]
    assert not stale, f"{', '.join(map(str, stale))} out of date; write them again: make docs-reference"


def test_every_command_and_option_is_documented(generate: Any) -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    for name, command in generate.commands():
        assert command.help, f"{name} has no help: give its function a docstring"
        assert f"# {name}\n" in page, f"{name} is not in docs/reference/cli.md; write it again: make docs-reference"
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.opts[-1]} has no help: give it help="


def test_every_public_name_is_on_the_page_of_the_python_api() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    shown = [line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")]
    assert sorted(name.rpartition(".")[2] for name in shown) == sorted(stageline.runtime.__all__)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute), name


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "zensical.toml").read_text()
    pages = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    assert sorted(re.findall(r'"([\w/-]+\.md)"', text)) == sorted(pages), "see nav in zensical.toml"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", split(page)[0], re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", split(page)[0]):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: no such file"
        elif page.is_relative_to(DOCS) and not file.is_relative_to(DOCS):
            yield f"{target}: outside docs/, so the site does not have it; name the file without a link"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading; there are {', '.join(sorted(anchors(file)))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = list(broken_links(page))
    assert not broken, f"{page.relative_to(ROOT)} links to " + "; ".join(broken)


@functools.cache
def program() -> Any:
    """The program, whose commands do nothing: it only understands its command line."""

    def disarm(command: Any) -> Any:
        command.callback = None
        for child in getattr(command, "commands", {}).values():
            disarm(child)
        return command

    return disarm(get_command(app))


def parse(arguments: Sequence[str]) -> str | None:
    """The program's error for a command line, None if it accepts it."""
    try:
        with contextlib.redirect_stdout(None):
            program().main(args=list(arguments), prog_name="stageline", standalone_mode=False)
    except typer.TyperException as error:
        return str(error.format_message())
    return None


def test_command_lines_in_fences_are_understood() -> None:
    wrong = []
    for fence in fences():
        for line in command_lines(fence):
            if line.startswith("stageline ") and "[OPTIONS]" not in line and "COMMAND ..." not in line:
                words = shlex.split(re.split(r" [|>&] ", line)[0], comments=True)[1:]
                if message := parse(words):
                    wrong.append(f"{fence.place}: {line}: {message}")
    assert not wrong, "\n".join(wrong)


def test_commands_and_options_named_in_text_exist() -> None:
    """In code within a sentence, which may leave out what is required."""
    for page, code in inline_code():
        if not code.startswith("stageline "):
            continue
        command, words = program(), code.split()[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        if words and words[0] != "--help" and "run" in getattr(command, "commands", {}) and code.split()[1] == "bench":
            command = command.commands["run"]
        place = f"{page.relative_to(ROOT)}: `{code}`"
        assert not (words and hasattr(command, "commands") and words[0][0] != "-"), f"{place}: no command {words[0]}"
        known = {"--help", *(name for p in command.params for name in (*p.opts, *p.secondary_opts))}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in known]
        assert not unknown, f"{place}: no option {unknown[0]}"


def test_extras_and_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for fence in fences():
        for line in command_lines(fence):
            for extras in re.findall(r"(?:stageline|\.)\[([\w,]+)\]", line) if "pip install" in line else []:
                unknown = set(extras.split(",")) - set(PROJECT["optional-dependencies"])
                assert not unknown, f"{fence.place}: no such extra: {', '.join(unknown)}"
            if line.startswith("make "):
                target = line.split()[1]
                assert target in targets, f"{fence.place}: the Makefile has no target {target}"


def test_files_named_in_text_exist() -> None:
    names = {file.name for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*.*")}
    for page, code in inline_code():
        for path in re.findall(rf"(?<![\w./:])((?:{FOLDERS})/[\w/.-]+\.\w+)", code):
            assert (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}, which does not exist"
        if re.fullmatch(r"\w+\.py", code):
            assert code in names, f"{page.relative_to(ROOT)} names {code}, which does not exist"


@pytest.mark.parametrize("fence", fences("python"), ids=lambda fence: fence.place)
def test_python_compiles_and_its_imports_exist(fence: Fence) -> None:
    for node in ast.walk(ast.parse(fence.text, fence.place)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, fence.place
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{fence.place}: {node.module} has no {alias.name}"


@pytest.mark.slow
@pytest.mark.checkpoints
def test_python_of_the_readme_and_of_the_embedding_guide_runs(
    tmp_path: Path,
    link_reference_bundle: Callable[[str, Path], Path],
    tiny_bundle: Path,
    made_once: Callable[..., Path],
) -> None:
    """One after the other in one process, as a reader types them."""
    for name in ("minilm", "smollm2"):
        link_reference_bundle(name, tmp_path / "bundles" / name)
    dino = made_once("dino-from", write_dino)
    (tmp_path / "bundles" / "vit").symlink_to(made_once("dino", lambda folder: export(dino, folder)))
    (tmp_path / "bundles" / "reranker").symlink_to(tiny_bundle)
    write_picture(tmp_path / "cat.png")
    pages = [ROOT / "README.md", DOCS / "how-to" / "embed.md"]
    ours = [fence for page in pages for fence in split(page)[1] if fence.language == "python"]
    assert len(ours) >= 5
    code = "\n".join(f"print('<<< {fence.place}', flush=True)\n{fence.text}" for fence in ours)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Paris" in done.stdout
