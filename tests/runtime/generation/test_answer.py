"""Answers are taken apart as they come: what was written in a format is read from it, wherever the text is cut."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.generation.answer import AnswerReader, Part
from stageline.runtime.generation.tool_formats import HERMES, JSON, LLAMA, MISTRAL, MISTRAL_NAMED, ToolFormat

NAMES = ("get_weather", "search", "a.b-c")
FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "mistral named": MISTRAL_NAMED, "json": JSON}


def hermes(calls: Sequence[Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)


def llama(calls: Sequence[Any]) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


def mistral(calls: Sequence[Any]) -> str:
    return f"[TOOL_CALLS] {json.dumps([{'name': n, 'arguments': a, 'id': 'abcdefghi'} for n, a in calls])}"


def mistral_named(calls: Sequence[Any]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)


def plain(calls: Sequence[Any]) -> str:
    return json.dumps([{"arguments": a, "name": n} for n, a in calls], indent=1, ensure_ascii=False)


WRITERS = {"hermes": hermes, "llama": llama, "mistral": mistral, "mistral named": mistral_named, "json": plain}


def read(reader: AnswerReader, pieces: Sequence[str]) -> dict[str, Any]:
    """What the parts join to."""
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    calls: list[list[str]] = []
    for part in parts:
        if part.kind == "name":
            assert part.call == len(calls)
            calls.append([part.text, ""])
        elif part.kind == "arguments":
            assert part.call == len(calls) - 1
            calls[-1][1] += part.text
    texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")}
    assert all(part.text for part in parts)
    return {**texts, "calls": [tuple(call) for call in calls]}


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(bounds)]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.sampled_from(["</tool_call>", '"}]', "[TOOL_CALLS]", "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
PROSE = st.text(alphabet='ab {}[]":,\n<>/cl_tolTOAS', max_size=30)
NEARLY = (
    "<tool_call>", "<think>", "</think>", '{"name": "search", "arguments": {"a": [1', '[TOOL_CALLS][{"name": "a"}]',
    '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>', "[TOOL_CALLS]search[ARGS]", "",
)  # fmt: skip


@settings(max_examples=200)
@given(
    form=st.sampled_from(list(FORMATS)),
    calls=CALLS,
    cuts=CUTS,
    thought=st.none() | st.text(alphabet="ab <>/\n{", max_size=20),
)
def test_calls_are_read_as_they_were_written(form: str, calls: Any, cuts: list[int], thought: str | None) -> None:
    text = WRITERS[form](calls)
    if thought is not None:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    for pieces in (cut(text, cuts), list(text)):
        found = read(AnswerReader(FORMATS[form], NAMES, reasons=None if thought is None else False), pieces)
        assert [(name, json.loads(arguments)) for name, arguments in found["calls"]] == [(n, a) for n, a in calls]
        assert (found["content"], found["reasoning"]) == ("", (thought or "").strip(" \n\r\t"))
        alone = read(AnswerReader(FORMATS[form], NAMES, False, None if thought is None else False), pieces)
        assert alone["calls"] == found["calls"][:1]


@settings(max_examples=200)
@given(
    form=st.sampled_from([None, *FORMATS.values()]),
    text=st.tuples(PROSE, st.sampled_from(NEARLY), PROSE).map("".join),
    cuts=CUTS,
    reasons=st.sampled_from([None, False, True]),
)
def test_where_a_text_is_cut_changes_nothing(
    form: ToolFormat | None, text: str, cuts: list[int], reasons: bool | None
) -> None:
    whole = read(AnswerReader(form, NAMES, reasons=reasons), [text])
    assert read(AnswerReader(form, NAMES, reasons=reasons), cut(text, cuts)) == whole
    assert read(AnswerReader(form, NAMES, reasons=reasons), list(text)) == whole
    if not whole["calls"] and reasons is None:
        assert whole["content"] == text


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, 'I look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\nDone.', "I look.\nDone.",
         [("f", "{}")]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        (HERMES, "<tool_call>\n{bad}\n</tool_call>", "<tool_call>\n{bad}\n</tool_call>", []),
        (HERMES, "<tool_call>\nno", "<tool_call>\nno", []),
        (HERMES, '<tool_call>\n{"name": "f", "arg', '<tool_call>\n{"name": "f", "arg', []),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        (HERMES, "a <tool", "a <tool", []),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (LLAMA, ' {"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
        (LLAMA, '{"name": "Bob", "parameters": {}} is he', '{"name": "Bob", "parameters": {}} is he', []),
        (LLAMA, '{"name": "Bob"}', '{"name": "Bob"}', []),
        (LLAMA, 'See {"name": "f", "parameters": {}}', 'See {"name": "f", "parameters": {}}', []),
        (JSON, '{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        (JSON, "[1, 2]", "[1, 2]", []),
        (MISTRAL, '[TOOL_CALLS]{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        (MISTRAL_NAMED, "[TOOL_CALLS]no name[ARGS]{}", "[TOOL_CALLS]no name[ARGS]{}", []),
    ],
)  # fmt: skip
def test_what_models_write(form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(AnswerReader(form, ["f"]), [text]) == {"reasoning": "", "content": content, "calls": calls}


@pytest.mark.parametrize(
    ("begun", "text", "reasoning", "content"),
    [
        (True, "so\n</think>\n\nYes.", "so", "Yes."),
        (True, "so it", "so it", ""),
        (False, "<think>\nso\n</think>\n\nYes. <think>", "so", "Yes. <think>"),
        (False, " Yes.\n", "", " Yes.\n"),
        (None, "<think>a</think>", "", "<think>a</think>"),
    ],
)
def test_reasoning_stands_apart(begun: bool | None, text: str, reasoning: str, content: str) -> None:
    found = read(AnswerReader(reasons=begun), list(text))
    assert (found["reasoning"], found["content"]) == (reasoning, content)


def test_arguments_come_while_they_are_written() -> None:
    reader = AnswerReader(HERMES)
    assert reader.push('Hm. <tool_call>\n{"name": "f", "arguments": {"a": "x') == [
        Part("content", "Hm."), Part("name", "f"), Part("arguments", '{"a": "x'),
    ]  # fmt: skip
    assert reader.push('yz"') == [Part("arguments", 'yz"')]
    assert reader.push("}}\n</tool_c") == [Part("arguments", "}")]
    assert reader.push("all>") == reader.finish() == []
