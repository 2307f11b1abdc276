"""Messages to a prompt, with the chat template that the checkpoint brings."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stageline.models.errors import BundleError, CheckpointError, RequestError, StagelineError
from stageline.models.json_file import read_json_object
from stageline.runtime.generation import chat_process

GIVEN_BYTES = 16 * 1024**2
"""The most a request to render may have as JSON: more than any model's context."""
_DEFAULT, _TOOL_USE = "default", "tool_use"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of a bundle or checkpoint. Make one with `ChatTemplate.open`; several threads may use it.

    Templates are code of the checkpoint's author. They are rendered in a process of their own (owned, started at `open`
    and again after a failure) and in jinja2's sandbox. A render has at most `chat_process.CPU_S` seconds of CPU
    time, `MEMORY_BYTES` of memory, and a text of `LENGTH` characters plus four times what it was given.
    """

    def __init__(self, file: Path, templates: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        """`file`: where they stand, for messages. `templates`: by name, one of them "default". `tokens`: what templates
        know as bos_token and so on."""
        self._file = file
        self._templates = dict(templates)
        self._tokens = dict(tokens)
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._closed = False
        self._running()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the template beside the tokenizer in `folder`: chat_template.jinja, else tokenizer_config.json's, else
        chat_template.json.

        Raises:
            BundleError: there is none, or it is broken.
            StagelineError: the process cannot be started.
        """
        file, templates = _read_templates(folder)
        if _DEFAULT not in templates:
            raise BundleError(
                f"{file} has chat templates for {', '.join(sorted(templates))} but no default one; "
                "give a plain prompt, or name one of them 'default' and export again"
            )
        return cls(file, templates, _read_tokens(folder))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for these messages; its special tokens are in the text already.

        Args:
            messages: each with a role and, unless it has tool_calls, a content: a text or a list of parts.
            add_generation_prompt: end with what begins the assistant's answer.
            tools: JSON schemas of functions.
            continue_final_message: end with the text of the last message, as it stands in the prompt; the answer
                continues it. Not together with add_generation_prompt.
            variables: whatever else the template knows (documents, enable_thinking, ...), as JSON has it.

        Raises:
            RequestError: something is not a chat, or the template refuses it.
            BundleError: the template is broken, unsafe or takes more than it may.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other; give one of them")
        given = {
            **self._tokens,
            "documents": None,
            **variables,
            "messages": _checked_messages(messages),
            "tools": _checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        name = self._name(tools is not None)
        try:
            line = json.dumps({"template": name, "variables": given})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the chat is not JSON ({error}); give texts, numbers, lists and dicts") from error
        if len(line) > GIVEN_BYTES:
            raise RequestError(f"the chat has {len(line)} bytes as JSON, at most {GIVEN_BYTES} fit; shorten it")
        with self._lock:
            text = self._ask(self._running(), line)
        return _up_to_the_last(text, messages[-1]) if continue_final_message else text

    def source(self, tools: bool) -> str:
        """The template that renders messages with `tools`, or without."""
        return self._templates[self._name(tools)]

    def _name(self, tools: bool) -> str:
        return _TOOL_USE if tools and _TOOL_USE in self._templates else _DEFAULT

    def close(self) -> None:
        """End the process. May be called again."""
        with self._lock:
            self._closed = True
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> "_Process":
        """The process, with the templates compiled."""
        if self._closed:
            raise RequestError("this chat template was closed; open it again")
        if self._process is None:
            self._process = _Process()
            self._ask(self._process, json.dumps(self._templates))
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _ask(self, process: "_Process", line: str) -> str:
        """The text that answers the line, or the error that does."""
        try:
            answer = process.ask(line)
        except BaseException:  # KeyboardInterrupt: the answer would be taken for that to the next line
            self._stop()
            raise
        match answer:
            case {"text": text}:
                return text
            case {"refused": why}:
                raise RequestError(f"the chat template refuses these messages: {_one_line(why)}")
            case {"unfit": why}:
                raise RequestError(f"the chat template cannot take these messages ({_one_line(why)}); change them")
        self._stop()
        raise BundleError(
            f"the chat template in {self._file} cannot be used ({_one_line(answer['bad'])}); "
            "give a plain prompt, or repair the template and export again"
        )


class _Process:
    """A running chat_process. `end` ends it, as does letting go of this object."""

    def __init__(self) -> None:
        # The modules are to be found where this process finds them, and none of theirs is to run before.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", "-S", chat_process.__file__]
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise StagelineError(
                f"cannot start {sys.executable!r} to render chat templates ({error.strerror}); give a plain prompt"
            ) from error
        self.end = weakref.finalize(self, _end, self._process)

    def ask(self, line: str) -> dict[str, str]:
        """The answer to one line of JSON: {"text": ...} or one of the others that chat_process names."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # it has ended; then there is no answer either
            stdin.write(line.encode() + b"\n")
            stdin.flush()
        answer = stdout.readline()
        if answer.endswith(b"\n"):
            return dict(json.loads(answer))
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return {"bad": f"it takes more than {chat_process.CPU_S} s of CPU time"}
        if code < 0:
            return {"bad": f"the process that renders it was ended by {signal.Signals(-code).name}"}
        raise StagelineError(
            f"the process that renders chat templates ended with {code}; "
            f"see what {sys.executable} {chat_process.__file__} prints, or give a plain prompt"
        )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with suppress(BrokenPipeError), process:  # closes its pipes and waits for it
        pass


def _read_templates(folder: Path) -> tuple[Path, dict[str, str]]:
    """The file that holds the template, and the templates in it by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file, {_DEFAULT: file.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read {file} ({error}); export again, or give a plain prompt") from error
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template = _read_json(file).get("chat_template")
        match template:
            case None:
                continue
            case str():
                return file, {_DEFAULT: template}
            case list() if all(_is_named_template(entry) for entry in template):
                return file, {entry["name"]: entry["template"] for entry in template}
        raise BundleError(
            f"{file} has a chat_template that is neither a text nor a list of named ones; "
            "give a plain prompt, or repair it and export again"
        )
    raise BundleError(f"{folder} has no chat template, so its model takes no messages; give a plain prompt")


def _is_named_template(entry: Any) -> bool:
    match entry:
        case {"name": str(), "template": str()}:
            return True
    return False


def _read_tokens(folder: Path) -> dict[str, str]:
    """The special tokens' texts, by the names that templates know them by."""
    tokens = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):  # the later one wins
        stated = _read_json(file)
        for name in _SPECIAL_TOKENS:
            match stated.get(name):
                case str(text) | {"content": str(text)}:
                    tokens[name] = text
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    if not file.is_file():
        return {}
    try:
        return read_json_object(file)
    except CheckpointError as error:
        raise BundleError(str(error)) from error


def _up_to_the_last(text: str, message: Mapping[str, Any]) -> str:
    """The prompt to the end of its last message's text; spaces after that stay if the template has kept them."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise RequestError("the last message has no text to continue; give one, or leave out continue_final_message")
    begin = text.rfind(content.strip())
    if begin < 0:
        raise RequestError("the chat template changes the last message, so it cannot be continued")
    whole = content.lstrip()
    return text[:begin] + (whole if text.startswith(whole, begin) else content.strip())


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages without what is None in them, as transformers passes them. RequestError if they are not a chat."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is a {type(messages).__name__}; give a list of messages")
    if not messages:
        raise RequestError("there are no messages; give at least one")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {number} is a {type(message).__name__}; give a dict with a role and a content")
        given = {key: value for key, value in message.items() if value is not None}
        if not isinstance(given.get("role"), str) or not given["role"]:
            raise RequestError(f"message {number} has the role {given.get('role')!r}; give user, assistant or system")
        if "content" not in given and "tool_calls" not in given:
            raise RequestError(f"message {number} has no content; give a text")
        content = given.get("content", "")
        if not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
        ):
            raise RequestError(
                f"the content of message {number} is a {type(content).__name__}; give a text, or a list of parts"
            )
        checked.append(given)
    return checked


def _checked_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools is not a list of dicts; give the JSON schema of each function")
    return list(tools)


def _one_line(text: str) -> str:
    """At most 300 characters of what a template or Python said."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
