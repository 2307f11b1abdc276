"""The command `stageline serve`."""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer
from stageline.models.errors import StagelineError
from stageline.runtime.engines import CacheDtype, WeightDtype
from stageline.runtime.options import RebalanceMode
from stageline.runtime.pipeline import Pipeline

_EXTRA = {"fastapi", "prometheus_client", "uvicorn"}
_PLACES = 4  # requests that may be under way for each place in a queue: readers may be slower than the pipeline


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("serve")(serve_command)


def serve_command(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles that generate or embed.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What clients call the model: its folder's name; one each.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="STAGELINE_API_KEY", help="Clients must send it. None unless given.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Continuations that run at a time.")] = 8,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a slot: prompt and continuation. Up to 2048 unless given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processors for each bundle; all unless given.")] = None,
    engine: Annotated[str, typer.Option(help="What runs the stages; stageline doctor lists them.")] = "onnxruntime",
    device: Annotated[
        list[str] | None, typer.Option(metavar="DEVICE", help="cpu, cuda:0, ...: of the stages in turn; several times.")
    ] = None,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Of the KV cache; what the engine likes best unless given.")
    ] = None,
    weights: Annotated[
        WeightDtype | None, typer.Option(help="Quantise matrix products: faster, less exact. As they are unless given.")
    ] = None,
    rebalance: Annotated[
        RebalanceMode,
        typer.Option(help="Measure the stages, and say which cut would be better (advise), or change to it (auto)."),
    ] = "off",
    max_body_mb: Annotated[int, typer.Option(min=1, help="The largest body of a request.")] = 4,
    queue: Annotated[
        int, typer.Option(min=1, help="Requests of a bundle that run or wait at a time; more are answered with 429.")
    ] = 64,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get to finish in, on SIGTERM or SIGINT.")
    ] = 30.0,
) -> None:
    """Serve bundles over HTTP, as OpenAI's clients speak it: chats, completions, embeddings, health and metrics.

    Example: stageline serve smollm2.bundle --port 8000
    """
    try:
        from stageline.runtime.service.app import create_app
        from stageline.runtime.service.server import DrainingServer, bound_socket
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise StagelineError('this command needs the service: pip install "stageline[serve]"') from error

    names = _names(bundles, name or [])
    if rebalance != "off":
        _log_rebalancing()
    with bound_socket(host, port) as listening, ExitStack() as stack:
        pipelines: dict[str, Pipeline] = {}
        for called, bundle in zip(names, bundles, strict=True):
            opened = Pipeline.open(
                bundle,
                engine=engine,
                devices=device,
                threads=threads,
                queue=queue,
                quantise=weights,
                slots=slots,
                capacity=capacity,
                cache_dtype=cache_dtype,
                rebalance=rebalance,
            )
            pipelines[called] = stack.enter_context(opened)
        app = create_app(
            pipelines, api_key=api_key, max_body_bytes=max_body_mb * 2**20, concurrency=_PLACES * queue * len(bundles)
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        if api_key is None and not _is_local(host):
            print(f"stageline: {url} has no API key: whoever reaches it may use it", file=sys.stderr)

        def ready() -> None:
            print(f"serving {', '.join(names)} at {url}", flush=True)

        DrainingServer(app, list(pipelines.values()), drain_s, ready).run_until_signal(listening)


def _names(bundles: Sequence[Path], given: Sequence[str]) -> list[str]:
    if given and len(given) != len(bundles):
        raise typer.BadParameter(f"{len(given)} names for {len(bundles)} bundles; give one each", param_hint="--name")
    names = list(given) or [bundle.resolve().name for bundle in bundles]
    for called in names:
        if names.count(called) > 1:
            raise typer.BadParameter(f"two bundles are called {called!r}; give each a name", param_hint="--name")
    return names


def _log_rebalancing() -> None:
    told = logging.StreamHandler()
    told.setFormatter(logging.Formatter("stageline: %(message)s"))
    log = logging.getLogger("stageline.rebalance")
    log.addHandler(told)
    log.setLevel(logging.INFO)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
