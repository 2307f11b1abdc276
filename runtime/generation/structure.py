"""What a generated text must look like: a JSON Schema, an expression, one of some texts, or a grammar."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from stageline.models.errors import RequestError

Kind = Literal["json_schema", "regex", "choice", "grammar", "tools"]
MAX_BYTES = 256 * 1024
"""The longest schema, in bytes of UTF-8."""
MAX_GRAMMAR_BYTES = 16 * 1024
"""The longest expression or grammar."""
MAX_NAMES = 1000
"""Properties of a schema, and texts of a choice: the time to compile them grows with their square."""
_KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "patternProperties", "items", "prefixItems", "enum",
     "const", "anyOf", "oneOf", "allOf", "title", "description", "default", "format", "pattern", "minLength",
     "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems",
     "$ref", "$defs", "definitions", "$schema", "$id"}
)  # fmt: skip
_OPTIONS = "x-guidance"  # llguidance reads options of its own there: they are ours to choose
# Unbounded, a model that does not know how to go on writes spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}", "lenient": False}


@dataclass(frozen=True)
class Reasoning:
    """What a model may write before its answer, in tokens of its own: free text between `begin` and `end`."""

    begin: int
    end: int
    begun: bool
    """Whether the prompt has begun it; else a text has it that begins with `begin`."""


@dataclass(frozen=True)
class Structure:
    """Make one with `json_schema`, `json_object`, `regex`, `choice` or `grammar`. RequestError for what is none.

    A model's tokenizer decides with the first request whether a grammar can be made of it (see `Grammars`).
    """

    kind: Kind
    source: str
    """The JSON of a schema or of a list of texts, an expression, or a grammar."""
    after: Reasoning | None = None
    """What comes before the text of this structure."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise RequestError(f"the {self.kind} is {self.source!r}; give a text that is not empty")
        try:
            length = len(self.source.encode())
        except UnicodeEncodeError as error:
            raise RequestError(f"the {self.kind} is not valid Unicode ({error.reason}); repair it") from error
        most = MAX_GRAMMAR_BYTES if self.kind in ("regex", "grammar") else MAX_BYTES
        if length > most:
            raise RequestError(f"the {self.kind} has {length} bytes, at most {most} are taken; give a smaller one")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Self:
        """JSON that a schema (draft 2020-12, or its text) describes; properties come in the schema's order."""
        try:
            given = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(given, Mapping):
                raise RequestError(f"the json_schema is a {type(given).__name__}; give an object")
            kept = {name: value for name, value in given.items() if name != _OPTIONS}
            made = cls("json_schema", json.dumps(kept, ensure_ascii=False, allow_nan=False))
            names = _names(kept)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"the json_schema is not JSON ({error}); give texts, numbers, lists and dicts"
            ) from error
        if names > MAX_NAMES:
            raise RequestError(f"the json_schema names {names} properties, at most {MAX_NAMES} are taken; name fewer")
        return made

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, expression: str) -> Self:
        """A text that the expression matches as a whole; without looking around or back."""
        return cls("regex", expression)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """One of these texts."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise RequestError(f"choice is {texts!r}; give a list of texts")
        if len(texts) > MAX_NAMES:
            raise RequestError(f"choice has {len(texts)} texts, at most {MAX_NAMES} are taken; give fewer")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise RequestError(f"choice holds {text!r}; give texts that are not empty")
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))

    @classmethod
    def grammar(cls, source: str) -> Self:
        """A text of a context-free grammar, in llguidance's variant of Lark or in GBNF."""
        return cls("grammar", source)

    @classmethod
    def tools(cls, source: str) -> Self:
        """Calls of tools, as `tool_formats.calls` writes their grammar."""
        if len(source.encode()) > MAX_BYTES:
            raise RequestError(f"the tools have more than {MAX_BYTES} bytes; give fewer, or with smaller schemas")
        return cls("tools", source)

    @property
    def lark_json(self) -> str:
        """The schema of a json_schema as a rule's body in a grammar."""
        return f"%json {json.dumps({**json.loads(self.source), _OPTIONS: JSON_OPTIONS}, ensure_ascii=False)}"


def _names(value: Any) -> int:
    """How many names objects have in a JSON value, but those of a schema's own keywords."""
    if isinstance(value, Mapping):
        return sum((name not in _KEYWORDS) + _names(below) for name, below in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_names, value))
    return 0
