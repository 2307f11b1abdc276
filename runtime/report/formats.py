"""Reports as files: one HTML file that needs nothing else, Markdown with its pictures beside it, or the pictures."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from stageline.models.errors import StagelineError
from stageline.runtime.report.document import Block, Chart, Heading, Paragraph, Table
from stageline.runtime.report.pictures import picture

FORMATS = (".html", ".md", ".svg", ".png")


def save(blocks: Sequence[Block], path: Path) -> list[Path]:
    """Write a document in the format of the path's suffix, and return the files: `report.html` holds all; `report.md`
    has its charts beside it as `report-NAME.svg`; `report.svg` and `report.png` stand for `report-NAME.svg` or `.png`,
    one for each chart.

    Files are written aside and then renamed: all of them, or none. StagelineError if the suffix is none of these, or
    they cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise StagelineError(f"{path} ends with {path.suffix!r}; give a file that ends with {known}")
    files = _files(blocks, path, kind)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as aside:
            for name, content in files.items():
                (Path(aside) / name).write_bytes(content)
            for name in files:
                (Path(aside) / name).rename(path.with_name(name))
    except OSError as error:
        raise StagelineError(f"{path} cannot be written: {error.strerror}; choose another file") from error
    return [path.with_name(name) for name in files]


def _files(blocks: Sequence[Block], path: Path, kind: str) -> dict[str, bytes]:
    found = [block for block in blocks if isinstance(block, Chart)]
    if kind == ".html":
        return {path.name: html(blocks).encode()}
    if kind == ".png":
        return {f"{path.stem}-{chart.name}.png": picture(chart.spec, "png") for chart in found}
    drawn = {f"{path.stem}-{chart.name}.svg": picture(chart.spec, "svg") for chart in found}
    return drawn if kind == ".svg" else {path.name: markdown(blocks, path.stem).encode(), **drawn}


def html(blocks: Sequence[Block]) -> str:
    """One page with its charts inside; it loads nothing, and its policy forbids it to."""
    loader = PackageLoader("stageline.runtime.report", ".")
    template = Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Stageline")
    drawn = {one.name: picture(one.spec, "svg").decode() for one in blocks if isinstance(one, Chart)}
    return template.render(title=title, blocks=[(type(one).__name__, one) for one in blocks], drawn=drawn)


def markdown(blocks: Sequence[Block], stem: str) -> str:
    """The document as Markdown; charts are images `STEM-NAME.svg`."""
    return "\n\n".join(_marked(block, stem) for block in blocks) + "\n"


def _marked(block: Block, stem: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return _plain(block.text) + (f" `{block.command}`" if block.command else "")
    if isinstance(block, Table):
        lines = [block.head, tuple("---" for _ in block.head), *block.rows]
        return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)
    return f"![{_plain(block.sentence)}]({stem}-{block.name}.svg)"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
