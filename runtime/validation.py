"""Data from disk: frozen models, documents that state their format and version, and errors in one line."""

from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from stageline.models.errors import BundleError

_LIMIT_BYTES = 256 * 1024**2


class Data(BaseModel):
    """Base of models that are frozen and refuse unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Head(BaseModel):
    format: str
    version: int


_Document = TypeVar("_Document", bound=BaseModel)


def first_error(error: ValidationError) -> str:
    """Where the first of pydantic's errors is, what it is, and the value if it is a short one: one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    value = repr(first["input"]) if isinstance(first["input"], int | float | str) else ""
    return (f"{place}: " if place else "") + first["msg"] + (f" (it is {value})" if 0 < len(value) <= 40 else "")


def read_document(kind: type[_Document], file: Path, advice: str) -> _Document:
    """The JSON document in `file`. `kind` declares its fields `format` and `version` as Literals with a default.

    BundleError, which ends with `advice`, for another format or version and for what is not valid. OSError if the file
    cannot be read.
    """
    if file.stat().st_size > _LIMIT_BYTES:
        raise BundleError(f"{file} has {file.stat().st_size} bytes, more than any such file; {advice}")
    data = file.read_bytes()
    expected, versions = (get_args(kind.model_fields[name].annotation) for name in ("format", "version"))
    try:
        head = _Head.model_validate_json(data)
        if head.format not in expected:
            raise BundleError(f"{file} has format {head.format!r}, not {expected[0]!r}; {advice}")
        if head.version not in versions:
            *others, last = map(str, versions)
            known = f"versions {', '.join(others)} and {last}" if others else f"version {last}"
            advice = f"install a newer stageline, or {advice}" if head.version > max(versions) else advice
            raise BundleError(f"{file} has version {head.version}; this stageline reads {known}: {advice}")
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{file} is not valid ({first_error(error)}); {advice}") from error
