"""The command `stageline run`."""

from typing import Annotated

import typer
from stageline.exporter.commands import hub, show
from stageline.exporter.commands.common import JsonOption, print_result
from stageline.models.errors import RequestError
from stageline.runtime.bundle.folder import read_manifest

_NEW_TOKENS = 8


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run")(run_command)


def run_command(
    bundle: hub.BundleArgument,
    text: Annotated[list[str], typer.Option(metavar="TEXT", help="An input text. May be repeated.")],
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
    from stageline.exporter.commands.answers import ANSWERS, Session, encoder_of, text_generation
    from stageline.runtime.pipeline import Pipeline

    bundle = hub.bundle_of(bundle)
    manifest = read_manifest(bundle)
    task = manifest.task
    if task != "text-generation" and new_tokens is not None:
        raise RequestError(f"--new-tokens is for text-generation, but this bundle's task is {task}; leave it out")
    if task != "sentence-similarity" and prompt is not None:
        raise RequestError(f"--prompt is for sentence-similarity, but this bundle's task is {task}; leave it out")
    if task != "text-generation" and task not in ANSWERS:
        raise RequestError(
            f"{task} takes no text; run this bundle from Python: Pipeline.open({str(bundle)!r}).run(...)"
        )
    with Pipeline.open(bundle) as pipeline:
        session = Session(bundle, manifest, pipeline, encoder_of(pipeline.bundle), prompt)
        if task == "text-generation":
            result = text_generation(session, text, _NEW_TOKENS if new_tokens is None else new_tokens)
        else:
            result = ANSWERS[task](session, text)
    print_result(as_json, {"task": task, "texts": text, **result}, show.answer(task, text, result))
