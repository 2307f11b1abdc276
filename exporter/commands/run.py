"""The command `stageline run`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from stageline.exporter.commands import hub, show
from stageline.exporter.commands.common import (
    BudgetOption,
    DevicesOption,
    EngineOption,
    JsonOption,
    KeyFileOption,
    UsageError,
    print_result,
    split,
    with_engine,
)
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
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A file of a model of images. May be repeated."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help=f"text-generation: max tokens to generate (default: {_NEW_TOKENS})."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="sentence-similarity: which of the model's prompts stands before each text."),
    ] = None,
    engine: EngineOption = "onnxruntime",
    error_budget: BudgetOption = None,
    devices: DevicesOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run texts or images through a bundle and print its answers.

    Example: stageline run minilm.bundle --text "A cat sits." --text "A kitten rests."
    """
    given = [option for option in (text, pair, image) if option]
    if len(given) != 1:
        raise UsageError(
            "give texts with --text, pairs of texts with --pair, or images with --image"
            + (", not several of them" if given else "")
        )
    from stageline.exporter.commands.answers import (
        ANSWERS,
        Session,
        encoder_of,
        images,
        text_classification,
        text_generation,
    )
    from stageline.runtime.options import PipelineOptions
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
    if bool(image) != (manifest.inputs[0].name == "pixel_values"):
        wanted = "text; give --text" if image else "images; give --image"
        raise RequestError(f"{bundle} is a model of {wanted}")
    options = with_engine(bundle, PipelineOptions(engine, split(devices), key_file=key_file), error_budget)
    if image:
        with Pipeline.open(bundle, options) as pipeline:
            result = images(pipeline, image)
        names = [str(file) for file in image]
        print_result(as_json, {"task": task, "images": names, **result}, show.answer(task, names, result))
        return
    with Pipeline.open(bundle, options) as pipeline:
        session = Session(bundle, manifest, pipeline, encoder_of(pipeline.bundle), prompt)
        if pair:
            result = text_classification(session, firsts, seconds)
        elif task == "text-generation":
            result = text_generation(session, texts, _NEW_TOKENS if new_tokens is None else new_tokens)
        else:
            result = ANSWERS[task](session, texts)
    pairs = [list(two) for two in zip(firsts, seconds, strict=True)]
    asked = {"pairs": pairs} if pair else {"texts": texts}
    shown = [" | ".join(two) for two in pairs] if pair else texts
    print_result(as_json, {"task": task, **asked, **result}, show.answer(task, shown, result))
