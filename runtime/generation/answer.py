"""An answer read as it is written: its reasoning, its content and its calls of tools, apart."""

import json
import re
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stageline.runtime.generation.tool_formats import ToolFormat

THINK, THOUGHT = "<think>", "</think>"
"""What begins and ends the reasoning."""
_SPACE = " \n\r\t"
_HEAD_CHARACTERS = 1024
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAME = re.compile(r"[\w.-]{1,128}")
_T = TypeVar("_T")
_Reading = Generator[None, None, _T]
"""Takes what it can from the front of the text, and yields where it must see more."""


@dataclass(frozen=True)
class Part:
    """More of an answer: text of its reasoning or content; the name of a call's tool, which begins the call; or more of
    a call's arguments, which are JSON if the model has written them so."""

    kind: Literal["reasoning", "content", "name", "arguments"]
    text: str
    call: int = 0
    """Which call, counted from 0."""


class AnswerReader:
    """Takes a text in pieces and gives its parts. However the text is cut, the parts join to the same.

    What looks like a call but is none is content, as it was written. White space around reasoning and calls is dropped.
    """

    def __init__(
        self,
        form: ToolFormat | None = None,
        names: Collection[str] = (),
        several: bool = True,
        reasons: bool | None = None,
    ) -> None:
        """`form`: how calls are written; None: there are none. `names`: the tools; other names make no call where it
        has no marker. `several`: whether calls after the first are given. `reasons`: whether the prompt has begun the
        reasoning; None: there is none."""
        self._form, self._names, self._several = form, names, several
        self._text = ""  # what is not read yet
        self._last = False  # whether no more text comes
        self._space = ""  # after what was said: dropped if nothing more is
        self._parts: list[Part] = []
        self.calls = 0
        """How many calls have begun."""
        self._reading = self._answer(reasons)

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with this text."""
        self._text += text
        next(self._reading, None)
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """The rest; no text follows. A call that is not whole ends where the text does."""
        self._last = True
        return self.push("")

    def _answer(self, reasons: bool | None) -> _Reading[None]:
        if reasons is not None:
            yield from self._reason(reasons)
        if self._form is not None:
            if self._form.bare:
                space = yield from self._skipped(_SPACE)
                if self._text[:1] in ("{", "["):
                    yield from self._some_calls(space, marked=False)
                else:
                    self._text = space + self._text
            while (yield from self._said_until(self._form.marker, "content")):
                yield from self._some_calls(self._form.marker, marked=True)
        else:
            yield from self._said_until("", "content")
        if not self.calls and self._space:
            self._parts.append(Part("content", self._space))

    def _reason(self, begun: bool) -> _Reading[None]:
        if not begun:
            space = yield from self._skipped(_SPACE)
            if not (yield from self._comes(THINK)):
                self._text = space + self._text
                return
        yield from self._skipped(_SPACE)
        yield from self._said_until(THOUGHT, "reasoning")
        self._space = ""
        yield from self._skipped(_SPACE)

    def _some_calls(self, raw: str, marked: bool) -> _Reading[None]:
        """Calls up to what is none. `raw`: what was read of the first one."""
        assert self._form is not None
        while True:
            raw += yield from self._skipped(f"{_SPACE}[,;")
            if self._text[:1] == "{":
                called = yield from self._object(raw, marked)
            else:
                called = bool(self._form.named) and (yield from self._named_call())
                if not called:
                    self._say("content", raw)
            if not called:
                return
            yield from self._skipped(_SPACE)
            closed = yield from self._comes("]")
            yield from self._skipped(_SPACE)
            tag = self._form.after.strip()
            if closed or (tag and (yield from self._comes(tag))) or self._text[:1] not in (",", ";", "{"):
                if closed and tag:
                    yield from self._comes(tag)
                return
            raw = ""

    def _object(self, raw: str, marked: bool) -> _Reading[bool]:
        """A call that is an object, or content if it is none; whether it was one."""
        scanner, scanned = _Scanner(), 0
        while not (head := _HEAD.match(self._text, 0, _HEAD_CHARACTERS)):
            end = scanner.end(self._text[scanned:])
            if end is not None or self._last:
                return self._whole(raw, None if end is None else scanned + end, marked)
            scanned = len(self._text)
            yield
        name = json.loads(head[1], strict=False)
        if not marked and name not in self._names:
            self._say("content", raw + self._text[: head.end()])
            self._text = self._text[head.end() :]
            return False
        self._begin(name)
        self._text = self._text[head.end() :]
        yield from self._to_the_end(_Scanner(), argued=True)
        yield from self._to_the_end(_Scanner(depth=1), argued=False)
        return True

    def _whole(self, raw: str, end: int | None, marked: bool) -> bool:
        """A call of which all is there, its first `end` characters."""
        written = self._text[:end]
        self._text = self._text[len(written) :]
        call = _call(written)
        if call is None or not (marked or call[0] in self._names):
            self._say("content", raw + written)
            return False
        self._begin(call[0])
        self._argue(call[1])
        return True

    def _named_call(self) -> _Reading[bool]:
        """A call that is a name, a marker and arguments; whether there is one."""
        assert self._form is not None
        most = 256
        while self._form.named not in self._text[:most] and len(self._text) < most and not self._last:
            yield
        name, marker, rest = self._text.partition(self._form.named)
        if not marker or not _NAME.fullmatch(name):
            return False
        self._begin(name)
        self._text = rest
        yield from self._skipped(_SPACE)
        if self._text[:1] == "{":
            yield from self._to_the_end(_Scanner(), argued=True)
        return True

    def _to_the_end(self, scanner: "_Scanner", argued: bool) -> _Reading[None]:
        """Up to where the object ends; `argued`: as arguments of the last call, else for nothing."""
        while True:
            end = scanner.end(self._text)
            taken = self._text[:end]
            self._text = self._text[len(taken) :]
            if argued:
                self._argue(taken)
            if end is not None or self._last:
                return
            yield

    def _said_until(self, marker: str, kind: Literal["reasoning", "content"]) -> _Reading[bool]:
        """Say all up to the marker, which is dropped, or without one up to the end. Whether it came."""
        while True:
            place = self._text.find(marker) if marker else -1
            if place >= 0:
                self._say(kind, self._text[:place])
                self._text = self._text[place + len(marker) :]
                return True
            kept = 0 if self._last else _beginning(marker, self._text)
            certain = len(self._text) - kept
            self._say(kind, self._text[:certain])
            self._text = self._text[certain:]
            if self._last:
                return False
            yield

    def _skipped(self, characters: str) -> _Reading[str]:
        """Take these characters from the front, until another one comes."""
        skipped = ""
        while True:
            left = self._text.lstrip(characters)
            skipped += self._text[: len(self._text) - len(left)]
            self._text = left
            if left or self._last:
                return skipped
            yield

    def _comes(self, tag: str) -> _Reading[bool]:
        """Whether the text goes on with the tag, which is taken."""
        while len(self._text) < len(tag) and tag.startswith(self._text) and not self._last:
            yield
        if not self._text.startswith(tag):
            return False
        self._text = self._text[len(tag) :]
        return True

    def _say(self, kind: Literal["reasoning", "content"], text: str) -> None:
        text = self._space + text
        said = text.rstrip(_SPACE)
        self._space = text[len(said) :]
        if said:
            self._parts.append(Part(kind, said))

    def _begin(self, name: str) -> None:
        self._space = ""
        self.calls += 1
        if self._several or self.calls == 1:
            self._parts.append(Part("name", name, self.calls - 1))

    def _argue(self, text: str) -> None:
        if text and (self._several or self.calls == 1):
            self._parts.append(Part("arguments", text, self.calls - 1))


class _Scanner:
    """Finds the end of a JSON object, piece by piece."""

    def __init__(self, depth: int = 0) -> None:
        """`depth`: how many brackets are open before."""
        self._depth = depth
        self._in_string = self._escaped = False

    def end(self, text: str) -> int | None:
        """How many characters of the text belong to the object that ends in it; None: it does not end."""
        for place, character in enumerate(text, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place
        return None


def _call(written: str) -> tuple[str, str] | None:
    """The name and the arguments of a call in JSON; None if it is no call."""
    try:
        call: Any = json.loads(written, strict=False)
    except (ValueError, RecursionError):
        return None
    match call:
        case {"name": str(name)}:
            arguments = call.get("arguments", call.get("parameters", {}))
            return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return None


def _beginning(marker: str, text: str) -> int:
    """How many of the text's last characters may begin the marker."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
