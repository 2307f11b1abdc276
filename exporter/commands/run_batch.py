"""The command `stageline run-batch`."""

import asyncio
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from stageline.exporter.commands import common, hub, serve
from stageline.runtime import words
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run-batch")(run_batch_command)


def run_batch_command(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="The bundles of the models that requests name.")
    ],
    source: Annotated[Path, typer.Option("--input", "-i", metavar="FILE", help="OpenAI's batch file: requests.")],
    target: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where their responses go.")],
    name: serve.NameOption = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Max requests at a time.")] = 64,
    engine: common.EngineOption = "onnxruntime",
    error_budget: common.BudgetOption = None,
    devices: common.DevicesOption = None,
    key_file: common.KeyFileOption = None,
    isolate: common.IsolateOption = False,
    threads: common.ThreadsOption = None,
    quantise: common.QuantiseOption = None,
    slots: common.SlotsOption = PipelineOptions.slots,
    capacity: common.CapacityOption = None,
    draft: common.DraftOption = "lookup",
    as_json: common.JsonOption = False,
) -> None:
    """Answer the requests of an OpenAI batch file, as serve would over HTTP, and write their responses to another.

    A line of the file is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}; its
    response has the same custom_id. A wrong line or request has an error there, and does not stop the others.

    Example: stageline run-batch smollm2.bundle -i requests.jsonl -o responses.jsonl
    """
    with common.needs("this command needs the service", "serve", "fastapi", "httpx", "prometheus_client"):
        from stageline.runtime.service.app import create_app
        from stageline.runtime.service.batch_file import run_batch

    options = PipelineOptions(
        engine=engine,
        devices=common.split(devices),
        key_file=key_file,
        isolate=isolate,
        threads=threads,
        quantise=quantise,
        slots=slots,
        capacity=capacity,
        draft=draft,
    )
    called = serve.names_of(bundles, name or [])
    with ExitStack() as stack:
        pipelines = {}
        for one, folder in zip(called, map(hub.bundle_of, bundles), strict=True):
            chosen = common.with_engine(folder, options, error_budget)
            pipelines[one] = stack.enter_context(Pipeline.open(folder, chosen))
        app = create_app(pipelines, concurrency=concurrency)
        shown = stack.enter_context(common.share_shown())

        def progress(ended: int, failed: int, total: int) -> None:
            shown(
                ended / total,
                f"{ended} of {words.counted(total, 'request')}" + (f", {failed} failed" if failed else ""),
            )

        done = asyncio.run(run_batch(app, source, target, concurrency, progress=progress))
    failed = done.requests - done.answered
    text = f"{words.counted(done.requests, 'request')}, {done.answered} answered, {failed} failed: {target}"
    common.print_result(as_json, {**asdict(done), "failed": failed, "output": str(target)}, text)
