"""The command `stageline run`."""

from typing import Annotated, Any

import typer
from stageline.exporter.commands import hub, show
from stageline.exporter.commands.common import JsonOption, UsageError, print_result
from stageline.models.errors import RequestError
from stageline.runtime.bundle.folder import read_manifest
from typer.core import TyperCommand

_NEW_TOKENS = 8


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run", cls=_PairCommand)(run_command)


class _PairCommand(TyperCommand):
    """A command whose option `--pair` takes two values: typer has no option that does so and may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write `--pair A B` as `--pair=A --pair=B`."""
        left, written = list(args), []
        while left:
            word = left.pop(0)
            if word == "--pair" and left:
                if len(left) == 1:
                    raise UsageError(f"--pair {left[0]!r} is one text; give two, a question and a text")
                written += [f"--pair={left.pop(0)}", f"--pair={left.pop(0)}"]
            else:
                written.append(word)
        return super().parse_args(ctx, written)


def run_command(
    bundle: hub.BundleArgument,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="An input text. May be repeated.")] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUESTION TEXT", help="text-classification: two texts, as a reranker reads. May be repeated."
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help=f"text-generation: max tokens to generate (default: {_NEW_TOKENS})."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="sentence-similarity: which of the model's prompts stands before each text."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run texts through a bundle and print its answers.

    Example: stageline run minilm.bundle --text "A cat sits." --text "A kitten rests."
    """
    if bool(text) == bool(pair):
        raise UsageError("give texts with --text, or pairs of texts with --pair" + (", not both" if text else ""))
    from stageline.exporter.commands.answers import (
        ANSWERS,
        Session,
        encoder_of,
        text_classification,
        text_generation,
    )
    from stageline.runtime.pipeline import Pipeline

    texts = text or []
    firsts, seconds = (pair or [])[::2], (pair or [])[1::2]
    bundle = hub.bundle_of(bundle)
    manifest = read_manifest(bundle)
    task = manifest.task
    if task != "text-generation" and new_tokens is not None:
        raise RequestError(f"--new-tokens is for text-generation, but this bundle's task is {task}; leave it out")
    if task != "sentence-similarity" and prompt is not None:
        raise RequestError(f"--prompt is for sentence-similarity, but this bundle's task is {task}; leave it out")
    if pair and task != "text-classification":
        raise RequestError(f"--pair is for text-classification, but this bundle's task is {task}; give --text")
    if task != "text-generation" and task not in ANSWERS:
        raise RequestError(
            f"{task} takes no text; run this bundle from Python: Pipeline.open({str(bundle)!r}).run(...)"
        )
    with Pipeline.open(bundle) as pipeline:
        session = Session(bundle, manifest, pipeline, encoder_of(pipeline.bundle), prompt)
        if pair:
            result = text_classification(session, firsts, seconds)
        elif task == "text-generation":
            result = text_generation(session, texts, _NEW_TOKENS if new_tokens is None else new_tokens)
        else:
            result = ANSWERS[task](session, texts)
    pairs = [list(two) for two in zip(firsts, seconds, strict=True)]
    given = {"pairs": pairs} if pair else {"texts": texts}
    shown = [" | ".join(two) for two in pairs] if pair else texts
    print_result(as_json, {"task": task, **given, **result}, show.answer(task, shown, result))
