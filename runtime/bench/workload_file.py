"""Reads a file of prompts or conversations: JSON lines with a `prompt`, or ShareGPT's layout."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.models.errors import RequestError

_ASKS, _ANSWERS, _SYSTEM = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard"), ("system",)
_ADVICE = 'give {"prompt": ...} or {"conversations": [{"from": "human", "value": ...}, ...]}'


@dataclass(frozen=True)
class Turn:
    """A question, and the answer if the file has one. `output_tokens`: how many to draw, if the file says so."""

    prompt: str
    answer: str | None = None
    output_tokens: int | None = None


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class WorkloadFile:
    """What a file holds. `left_out`: entries in ShareGPT's layout without a question that has an answer."""

    name: str
    conversations: tuple[Conversation, ...]
    left_out: int = 0


def read_workload(file: Path) -> WorkloadFile:
    """Read `file`: JSON lines, or one JSON list. RequestError, in one line, names the place and the field at fault.

    Each entry has a `prompt` and may have `output_tokens`; or it has `conversations`, messages with `from` and `value`
    as ShareGPT has them. A message of the system goes before the first question; answers without a question are
    dropped, and so is a last question without an answer.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"workload {file} cannot be read ({reason}); give a file of JSON lines") from error
    found = [_conversation(entry, where) for entry, where in _entries(text, f"workload {file}")]
    conversations = tuple(one for one in found if one)
    if not conversations:
        raise RequestError(f"workload {file} holds no prompt; {_ADVICE}")
    return WorkloadFile(file.name, conversations, len(found) - len(conversations))


def _entries(text: str, name: str) -> Iterator[tuple[Any, str]]:
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_json(text, name), 1):
            yield entry, f"{name}, entry {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            yield _json(line, where), where


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " if error.lineno > 1 else ""
        raise RequestError(f"{where} is not JSON ({error.msg}, {place}column {error.colno}); {_ADVICE}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise RequestError(f"{where} is not JSON that can be read; {_ADVICE}") from error


def _conversation(entry: Any, where: str) -> Conversation:
    if not isinstance(entry, dict) or not ({"prompt", "conversations"} & entry.keys()):
        raise RequestError(f"{where} has neither prompt nor conversations; {_ADVICE}")
    if "prompt" not in entry:
        return _turns(entry["conversations"], where)
    tokens = entry.get("output_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens < 2**31):
        raise RequestError(f"{where}: output_tokens is {str(tokens)[:40]}; give a whole number from 1")
    return (Turn(_text(entry["prompt"], "prompt", where), None, tokens),)


def _turns(messages: Any, where: str) -> Conversation:
    if not isinstance(messages, list):
        raise RequestError(f"{where}: conversations is no list; {_ADVICE}")
    turns: list[Turn] = []
    said: list[str] = []
    for number, message in enumerate(messages, 1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            raise RequestError(f"{place} lacks from or value; {_ADVICE}")
        role = message["from"]
        if role not in (*_ASKS, *_ANSWERS, *_SYSTEM):
            raise RequestError(
                f"{place}: from is {str(role)[:40]!r}; known: {', '.join((*_ASKS, *_ANSWERS, *_SYSTEM))}"
            )
        if not isinstance(message["value"], str):
            raise RequestError(f"{place}: value is no text")
        text = message["value"].strip()
        if role not in _ANSWERS:
            said += [text] if text else []
        elif said and text:
            turns.append(Turn("\n".join(said), text))
            said = []
    return tuple(turns)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{where}: {field} is {'empty' if isinstance(value, str) else 'no text'}; give a text")
    return value
