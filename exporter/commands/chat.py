"""The command `stageline chat`: a chat in the terminal, with a bundle or with a service."""

import contextlib
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Protocol

import typer
from stageline.exporter.commands import common, hub
from stageline.exporter.commands.talkers import Message, bundle_talker, service_talker
from stageline.models.errors import StagelineError
from stageline.runtime import words
from stageline.runtime.options import PipelineOptions

_UNPRINTABLE = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Talker(Protocol):
    """Answers chats."""

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """The next message in pieces; closing it stops it. StagelineError where it fails."""
        ...


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("chat")(chat_command)


def chat_command(
    whom: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|URL", help="A bundle, or ORG/NAME[@REVISION][:FILE] on the Hub, or the URL of a service."
        ),
    ],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: always the likeliest token (default: as the checkpoint says).")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Max tokens of an answer.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of the service's models (default: the first).")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="STAGELINE_API_KEY", help="The service's key.")
    ] = None,
    engine: common.EngineOption = "onnxruntime",
    threads: common.ThreadsOption = None,
    quantise: common.QuantiseOption = None,
    capacity: common.CapacityOption = None,
) -> None:
    """Chat with a model.

    On a terminal, /clear forgets what was said, /exit or Ctrl-D ends, and Ctrl-C stops an answer. Otherwise each line
    of the input is a question, and only the answers are printed.

    Example: stageline chat smollm2.bundle --system "Be brief."
    """
    sampling = {
        name: value for name, value in (("temperature", temperature), ("max_tokens", max_tokens)) if value is not None
    }
    talker: contextlib.AbstractContextManager[Talker]
    if whom.startswith(("http://", "https://")):
        talker = service_talker(whom, model, api_key, sampling)
    else:
        options = PipelineOptions(
            engine=engine, threads=threads, quantise=quantise, slots=1, capacity=capacity, draft="lookup"
        )
        folder = hub.bundle_of(Path(whom))
        talker = bundle_talker(folder, common.with_engine(folder, options, None), sampling)
    begun: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    with talker as ready:
        if sys.stdin.isatty():
            _converse(ready, begun)
        else:
            _answer_lines(ready, begun)


def _answer_lines(talker: Talker, begun: list[Message]) -> None:
    """Answer each line of stdin; an error ends it."""
    said = list(begun)
    for line in sys.stdin:
        question = line.strip()
        if question == "/exit":
            return
        if question == "/clear":
            said = list(begun)
        elif question:
            _say(talker, said, question)


def _converse(talker: Talker, begun: list[Message]) -> None:
    """Answer what is typed; an error is shown, and what was asked is forgotten."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines with it
    said = list(begun)
    print("/clear forgets what was said, /exit ends, Ctrl-C stops an answer", file=sys.stderr)
    for question in _typed():
        if question == "/clear":
            said = list(begun)
            continue
        try:
            _say(talker, said, question)
        except StagelineError as error:
            said.pop()
            print(f"stageline: {words.line(str(error))}", file=sys.stderr)


def _typed() -> Iterator[str]:
    """What is typed, until /exit or Ctrl-D. Ctrl-C gives a new line."""
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question == "/exit":
            return
        if question:
            yield question


def _say(talker: Talker, said: list[Message], question: str) -> None:
    """Print the answer to a question as it comes, and add both to what was said. On a terminal Ctrl-C ends it."""
    said.append({"role": "user", "content": question})
    shown = ""
    try:
        with contextlib.closing(talker.answer(said)) as pieces:
            for piece in pieces:
                shown += piece
                # What a model writes shall not steer the terminal.
                print(piece.translate(_UNPRINTABLE) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" [stopped]", end="")
    print(flush=True)
    said.append({"role": "assistant", "content": shown})
