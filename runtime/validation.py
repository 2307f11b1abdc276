"""Data from disk: frozen models, documents that state their format and version, and errors in one line."""

from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from stageline.models.errors import BundleError

_LIMIT_BYTES = 256 * 1024**2
_WORDS = {
    "missing": "is missing",
    "extra_forbidden unexpected_keyword_argument": "is no field that is known here",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "int_type int_parsing int_from_float int_parsing_size": "must be a whole number",
    "float_type float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a text",
    "bool_type bool_parsing": "must be true or false",
    "list_type tuple_type": "must be a list",
    "dict_type model_type model_attributes_type dataclass_type": "must be an object",
    "literal_error enum": "must be {expected}",
    "value_error": "{error}",
}
"""Kinds of pydantic's errors, and our words for them, with the values that pydantic gives."""


class Data(BaseModel):
    """Base of models that are frozen and refuse unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Head(BaseModel):
    format: str
    version: int


_Document = TypeVar("_Document", bound=BaseModel)


def first_error(error: ValidationError) -> str:
    """Where the first of pydantic's errors is, what it is, and the value if it is a short one: one line, in our words
    where the kind of error is a common one."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    context = first.get("ctx", {})
    words = next((words for kinds, words in _WORDS.items() if first["type"] in kinds.split()), "")
    said = words.format(**context) if words else first["msg"]
    value = repr(first["input"]) if isinstance(first["input"], int | float | str) else ""
    shown = 0 < len(value) <= 40 and first["type"] != "value_error"
    return (f"{place}: " if place else "") + said + (f" (it is {value})" if shown else "")


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
