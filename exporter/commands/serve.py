"""The command `stageline serve`."""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from socket import gethostname
from typing import Annotated, Literal

import typer
from stageline.exporter.commands import common, hub
from stageline.runtime import words
from stageline.runtime.engines import CacheDtype
from stageline.runtime.options import PipelineOptions, RebalanceMode
from stageline.runtime.pipeline import Pipeline

_PER_PERMIT = 4  # responses being sent per request in a queue: clients may read more slowly than the pipeline answers


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("serve")(serve_command)


def serve_command(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE...",
            help="Bundles that generate or embed: folders, or ORG/NAME[@REVISION][:FILE] on the Hub.",
        ),
    ],
    host: common.HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: any free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name that clients use (default: the folder's, or ORG/NAME). One for each bundle."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="STAGELINE_API_KEY",
            help="Key that clients must send (default: none). Several: one for each.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of keys, one a line; lines that begin with # are not.")
    ] = None,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Names that the service may be called by, beside localhost, addresses and --host; *: any.",
        ),
    ] = None,
    cors_origins: Annotated[
        str | None,
        typer.Option(metavar="URL,URL,...", help="Sites whose pages may call it, such as https://example.com; *: any."),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"] | None, typer.Option(help="Log each request on stderr (default: only what is wrong).")
    ] = None,
    engine: common.EngineOption = "onnxruntime",
    error_budget: common.BudgetOption = None,
    devices: common.DevicesOption = None,
    threads: common.ThreadsOption = None,
    quantise: common.QuantiseOption = None,
    slots: common.SlotsOption = PipelineOptions.slots,
    capacity: common.CapacityOption = None,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Type of the KV cache (default: the engine's choice).")
    ] = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of the KV cache, such as 2GB; with openvino, slots share it (default: all full).",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Max unfinished requests per bundle; further ones get status 429.")
    ] = PipelineOptions.queue,
    rebalance: Annotated[
        RebalanceMode, typer.Option(help="Measure the stages, and log a better cut (advise) or switch to it (auto).")
    ] = PipelineOptions.rebalance,
    unknown_parameters: Annotated[
        Literal["refuse", "ignore"],
        typer.Option(help="What an unknown parameter does: refuse the request, or be left out with a warning header."),
    ] = "refuse",
    max_body_mb: Annotated[int, typer.Option(min=1, help="Max size of a request's body.")] = 4,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have to finish after SIGTERM or SIGINT.")
    ] = 30.0,
) -> None:
    """Serve bundles over HTTP with OpenAI's API.

    Chats, completions and embeddings, with /health for probes and /metrics for Prometheus.

    Example: stageline serve smollm2.bundle --port 8000
    """
    with common.needs("this command needs the service", "serve", "fastapi", "prometheus_client", "uvicorn"):
        from stageline.runtime.service.app import create_app
        from stageline.runtime.service.connections import raise_file_limit
        from stageline.runtime.service.request_log import log_to_stderr
        from stageline.runtime.service.server import DrainingServer, bound_socket

    options = PipelineOptions(
        engine=engine, devices=common.split(devices), threads=threads, queue=queue, quantise=quantise, slots=slots,
        capacity=capacity, cache_dtype=cache_dtype, cache_memory=_bytes(cache_memory), rebalance=rebalance,
    )  # fmt: skip
    names = _names(bundles, name or [])
    keys = [*(api_key or []), *_keys(api_key_file)]
    if log_format is not None:
        log_to_stderr(log_format)
    raise_file_limit()
    if rebalance != "off":
        _log_rebalancing()
    folders = [hub.bundle_of(bundle) for bundle in bundles]
    with bound_socket(host, port) as listening, ExitStack() as stack:
        pipelines = {
            called: stack.enter_context(Pipeline.open(folder, common.with_engine(folder, options, error_budget)))
            for called, folder in zip(names, folders, strict=True)
        }
        app = create_app(
            pipelines,
            api_key=keys,
            allowed_hosts=[host, gethostname(), *(common.split(allowed_hosts) or [])],
            cors_origins=common.split(cors_origins) or [],
            max_body_bytes=max_body_mb * 2**20,
            unknown_parameters=unknown_parameters,
            concurrency=_PER_PERMIT * queue * len(bundles),
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        if not keys and not _is_local(host):
            print(f"stageline: {url} has no API key: anyone who can reach it can use it", file=sys.stderr)

        def ready() -> None:
            print(f"serving {', '.join(names)} at {url}", flush=True)

        DrainingServer(app, list(pipelines.values()), drain_s, ready).run_until_signal(listening)


def _bytes(size: str | None) -> int | None:
    given = common.size_bytes(size, "--cache-memory")
    return None if given is None else int(given)


def _keys(file: Path | None) -> list[str]:
    """The keys in a file. A usage error where it cannot be read or has none."""
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise common.UsageError(f"cannot read --api-key-file {file} ({error})") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise common.UsageError(f"--api-key-file {file} has no key; write one a line")
    return keys


def _names(bundles: Sequence[Path], given: Sequence[str]) -> list[str]:
    if given and len(given) != len(bundles):
        raise common.UsageError(f"{len(given)} names for {words.counted(len(bundles), 'bundle')}; give each one --name")
    names = list(given) or [_name(bundle) for bundle in bundles]
    for called in names:
        if names.count(called) > 1:
            raise common.UsageError(f"two bundles are called {called!r}; give each one --name")
    return names


def _name(bundle: Path) -> str:
    name = hub.hub_name(bundle)
    return bundle.resolve().name if name is None else name.repository


def _log_rebalancing() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("stageline: %(message)s"))
    log = logging.getLogger("stageline.rebalance")
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
