"""How checkpoints write calls of tools, recognised by their chat templates, and the grammar of such calls."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.generation.structure import Structure


@dataclass(frozen=True)
class ToolFormat:
    """How a call is written: as {"name": ..., "arguments": {...}}, between what this says.

    opening + (before + call + after), with `between` between any two of them, + closing
    """

    marker: str
    """What begins calls wherever it stands in a text; empty: only a text that begins with a call has some."""
    opening: str = ""
    before: str = ""
    after: str = ""
    between: str | None = None
    """None: a text has one call at most."""
    closing: str = ""
    arguments: str = "arguments"
    """The name that the arguments have in a call."""
    named: str = ""
    """Not empty: a call is no object, but the tool's name, this, and the arguments."""
    short_ids: bool = False
    """Whether the template takes only ids of nine letters and digits."""

    @property
    def bare(self) -> bool:
        """Whether a text may begin with a call without a marker."""
        return not (self.opening or self.before).startswith(self.marker or " ")

    @property
    def tags(self) -> str:
        """All texts that tell a call from other text."""
        return " ".join((self.marker, self.opening, self.before, self.after, self.closing, self.named))


HERMES = ToolFormat("<tool_call>", before="<tool_call>\n", after="\n</tool_call>", between="\n")
LLAMA = ToolFormat("<|python_tag|>", arguments="parameters")
MISTRAL = ToolFormat("[TOOL_CALLS]", opening="[TOOL_CALLS][", between=", ", closing="]", short_ids=True)
MISTRAL_NAMED = ToolFormat("[TOOL_CALLS]", before="[TOOL_CALLS]", between="", named="[ARGS]", short_ids=True)
JSON = ToolFormat("", opening="[", between=", ", closing="]")

_OTHERS = (
    "<function=", "<arg_key>", "<｜tool▁call", "<|tool_call_begin|>", "<|tool_call|>", "<|channel|>",
    "<|START_ACTION|>", "<start_function_call>",
)  # fmt: skip
"""Of templates that have their models write calls in other ways than JSON."""
_NAMED_SCHEMAS, _SCHEMAS = {"properties", "$defs", "definitions"}, {"items", "prefixItems", "anyOf", "oneOf"}
_NAMES_TOOLS = re.compile(r"\{[{%](?:(?![%}]\}).)*\btools\b", re.DOTALL)


def tool_format(template: str) -> ToolFormat:
    """How the model of this chat template writes calls.

    Raises:
        RequestError: the template has no tools, or they are called in a way that is not known.
    """
    if not _NAMES_TOOLS.search(template):
        raise RequestError("this model's chat template has no tools; leave them out, or set tool_choice to none")
    if (other := next((text for text in _OTHERS if text in template), None)) is not None:
        raise RequestError(
            f"this model's chat template writes calls of tools in a way ({other!r}) that is not known here; "
            "leave tools out, or set tool_choice to none"
        )
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return MISTRAL_NAMED
        return replace(MISTRAL, opening="[TOOL_CALLS] [") if "[TOOL_CALLS] [" in template else MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ('"parameters": ' in template and "<|start_header_id|>" in template):
        return LLAMA
    return JSON


def calls(
    form: ToolFormat, tools: Sequence[Mapping[str, Any]], encoder: TextEncoder, several: bool, answer: Structure | None
) -> Structure:
    """A text that calls one of the `tools`, or `several`, each a function with a name and perhaps parameters (a JSON
    Schema); or that is a JSON `answer`, if there is one.

    RequestError for a schema that is none, or an answer that cannot be told from a call.
    """
    written = partial(_lark, encoder=encoder)
    call = " ".join(part for part in (written(form.before), "body", written(form.after)) if part)
    more = f" ({written(form.between)} call)*" if several and form.between is not None else ""
    start = " ".join(part for part in (written(form.opening), f"call{more}", written(form.closing)) if part)
    bodies, rules = [], []
    for number, tool in enumerate(tools):
        name = tool["name"]
        head, end = f'{{"name": {json.dumps(name)}, "{form.arguments}": ', "}"
        if form.named:
            head, end = f"{name}{form.named}", ""
        bodies.append(" ".join(part for part in (written(head), f"arguments-{number}", written(end)) if part))
        rules.append(f"arguments-{number}: {_schema(tool)}")
    if answer is not None:
        if answer.kind != "json_schema" or form.bare:
            raise RequestError(
                "this model cannot both call tools and write an answer of a structure; set tool_choice to none, or ask "
                "for the structure when the tools have answered"
            )
        rules.append(f"answer: {answer.lark_json}")
    lines = [f"start: calls{' | answer' if answer else ''}", f"calls: {start}", f"call: {call}"]
    return Structure.tools("\n".join([*lines, f"body: {' | '.join(bodies)}", *rules]))


def _lark(text: str, encoder: TextEncoder) -> str:
    """A text in Lark. What the tokenizer has a token of its own for is that token: llguidance takes many of these for
    special even where the tokenizer does not."""
    tokens = {name: f"<[{token}]>" for name, token in encoder.added.items() if name in text}
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
    return " ".join(tokens.get(part) or json.dumps(part) for part in parts if part)


def _schema(tool: Mapping[str, Any]) -> str:
    """The parameters of a tool in Lark; none: an object without properties."""
    given = tool.get("parameters")
    if given is None or given == {}:
        given = {"type": "object", "properties": {}, "additionalProperties": False}
    if given.get("type", "object") != "object":
        raise RequestError(f"the parameters of the tool {tool['name']!r} are no object; give a schema of one")
    schema = {"type": "object", **given}
    return Structure.json_schema(schema if '"allOf"' in json.dumps(schema) else _closed(schema)).lark_json


def _closed(schema: Any) -> Any:
    """The same schema, whose objects have no properties but those that it names unless it says so: clients seldom say
    that there are no others, and a small model goes on to invent some. (Beside allOf it would forbid all.)"""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for name in _NAMED_SCHEMAS & schema.keys():
        if isinstance(schema[name], Mapping):
            closed[name] = {key: _closed(one) for key, one in schema[name].items()}
    for name in _SCHEMAS & schema.keys():
        closed[name] = _closed(schema[name])
    if "properties" in schema and "patternProperties" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed
