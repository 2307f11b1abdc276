"""Charts as pictures, drawn by vl-convert: Vega in a library, without a browser and without a network."""

from typing import Any, Literal

from stageline.models.errors import StagelineError
from stageline.runtime.report.spec import Spec

Format = Literal["svg", "png"]
_SCALE = 2.0  # pixels of a PNG for each of the spec


def picture(spec: Spec, kind: Format) -> bytes:
    """The picture of a spec whose data it holds. StagelineError if vl-convert is not installed."""
    library = _library()
    offline: list[str] = []
    if kind == "svg":
        return str(library.vegalite_to_svg(spec, allowed_base_urls=offline)).encode()
    return bytes(library.vegalite_to_png(spec, scale=_SCALE, allowed_base_urls=offline))


def _library() -> Any:
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise StagelineError('charts of reports are drawn by vl-convert: pip install "stageline[report]"') from error
    return vl_convert
