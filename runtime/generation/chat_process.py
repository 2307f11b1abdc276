"""The process in which chat templates are rendered: jinja2's sandbox, with bounds on time, memory and length.

A template is a program of the checkpoint's author. jinja2's sandbox keeps it from Python's internals, but not from
multiplying a string, a number or a list of lists until memory or patience ends, in one step of C code that nothing in
the same process can stop. So `chat_template` runs this file as a process of its own, which the system bounds: a render
has CPU_S seconds of CPU time and the process MEMORY_BYTES; the text is bounded in `_render`.

It needs only the standard library and jinja2. Each line of standard input is JSON: first {name: template}, then one for
each render: {"template": name, "variables": {...}}. One line of standard output answers each: {"text": ...}, or
{"refused": why} where the template called raise_exception, {"unfit": why} where it failed on what it was given,
{"bad": why} where the fault is the template's own. After that the process ends.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 2
MEMORY_BYTES = 512 * 1024**2
LENGTH = 2**20  # characters that any text may have; beyond that, four times as many as the line of the request


class TemplateRefusedError(TemplateError):
    """The template called raise_exception."""


class TooLongError(Exception):
    """The template writes more than it may."""


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's words for training; here it is only a scope, as in transformers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusedError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _compile(sources: dict[str, str]) -> dict[str, Template]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return {name: environment.from_string(source) for name, source in sources.items()}


def _render(template: Template, variables: dict[str, Any], max_length: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_length:
            raise TooLongError(f"it writes more than {max_length} characters")
    return "".join(pieces)


def _answer(templates: dict[str, Template], line: str) -> dict[str, str]:
    """Compile what the first line brings, or render."""
    request = json.loads(line)
    if not templates:
        templates.update(_compile(request))
        return {"text": ""}
    return {"text": _render(templates[request["template"]], request["variables"], LENGTH + 4 * len(line))}


def _bounded_answer(templates: dict[str, Template], line: str) -> tuple[str, bool]:
    """The answer as JSON, and whether the process is as good as new."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # then SIGPROF ends the process, whatever it is doing
    try:
        return json.dumps(_answer(templates, line)), True
    except TemplateRefusedError as error:
        return json.dumps({"refused": str(error.message)}), True
    except TemplateSyntaxError as error:
        bad = f"line {error.lineno}: {error.message}"
    except MemoryError:
        bad = f"it takes more than {MEMORY_BYTES} bytes of memory"
    except RecursionError:
        bad = "it is nested, or calls itself, too deeply"
    except (SecurityError, OverflowError, TooLongError) as error:
        bad = str(error)
    except Exception as error:
        bad = f"{type(error).__name__}: {error}"
        if templates:  # compiled
            return json.dumps({"unfit": bad}), True
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return json.dumps({"bad": bad}), False


def main() -> None:
    """Answer line after line until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    templates: dict[str, Template] = {}
    for line in sys.stdin:
        answer, sound = _bounded_answer(templates, line)
        print(answer, flush=True)
        if not sound:
            return


if __name__ == "__main__":
    main()
