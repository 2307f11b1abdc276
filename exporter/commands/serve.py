"""The command `stageline serve`."""

import gc
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from stageline.exporter.commands import common, hub, serve_config
from stageline.runtime import words
from stageline.runtime.engines import CacheDtype
from stageline.runtime.options import PipelineOptions, RebalanceMode
from stageline.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from stageline.runtime.service.telemetry import Telemetry

_PER_MODEL = (
    "engine",
    "error_budget",
    "devices",
    "key_file",
    "isolate",
    "threads",
    "quantise",
    "slots",
    "capacity",
    "cache_dtype",
    "cache_memory",
    "prefix_cache",
    "queue",
    "draft",
    "tpot_target",
    "rebalance",
)  # fmt: skip - options that each model may have of its own
_CLOSE_S = 10.0  # for the pipelines to close once nothing is to be answered any more
_SWITCH_S = 0.001  # of Python's lock: the event loop takes it back after each system call, each time from a busy thread
_PER_PERMIT = 4  # responses being sent per request in a queue: clients may read more slowly than the pipeline answers

NameOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Name that clients use (default: the folder's, or ORG/NAME). One for each bundle."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("serve", context_settings={"auto_envvar_prefix": "STAGELINE_SERVE"})(serve_command)


def serve_command(
    context: typer.Context,
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="BUNDLE...",
            help="Bundles that generate or embed: folders, or ORG/NAME[@REVISION][:FILE] on the Hub (default: those "
            "of --config).",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=serve_config.read,
            help="TOML with values of these options, and [models.NAME] with each one's bundle, engine, slots, ...",
        ),
    ] = None,
    host: common.HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: any free one.")] = 8000,
    unix_socket: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Listen on a Unix socket, which only this user may use, not on a port."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Serve over TLS with this certificate, or chain (PEM).")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key (PEM; default: in the same file).")
    ] = None,
    root_path: Annotated[str, typer.Option(metavar="PATH", help="Where a proxy shows the service, such as /llm.")] = "",
    name: NameOption = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar=["STAGELINE_API_KEY", "STAGELINE_SERVE_API_KEY"],
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
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=["STAGELINE_SERVE_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"],
            help="An OpenTelemetry collector, such as http://localhost:4318, that gets traces and metrics.",
        ),
    ] = None,
    engine: common.EngineOption = "onnxruntime",
    error_budget: common.BudgetOption = None,
    devices: common.DevicesOption = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar=["STAGELINE_KEY_FILE", "STAGELINE_SERVE_KEY_FILE"],
            help="The key of stage hosts, for devices such as tcp://node1:7070.",
        ),
    ] = None,
    isolate: common.IsolateOption = False,
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
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory beside it of conversations that may come back, such as 2GB; for CPUs (default: while no other "
            "wants their slot).",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Max unfinished requests per bundle; further ones get status 429.")
    ] = PipelineOptions.queue,
    draft: common.DraftOption = "lookup",
    tpot_target: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Bounds the prompt tokens of a step, so that no sequence waits longer for its next token, such as "
            "100ms; for CPUs (default: 128 prompt tokens a step).",
        ),
    ] = None,
    rebalance: Annotated[
        RebalanceMode, typer.Option(help="Measure the stages, and log a better cut (advise) or switch to it (auto).")
    ] = PipelineOptions.rebalance,
    unknown_parameters: Annotated[
        Literal["refuse", "ignore"],
        typer.Option(help="What an unknown parameter does: refuse the request, or be left out with a warning header."),
    ] = "refuse",
    max_body_mb: Annotated[int, typer.Option(min=1, help="Max size of a request's body.")] = 4,
    ping_s: Annotated[
        float, typer.Option(min=0.1, help="Idle seconds of a stream until it sends a comment, for proxies.")
    ] = 15.0,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have to finish after SIGTERM or SIGINT.")
    ] = 30.0,
) -> None:
    """Serve bundles over HTTP with OpenAI's API.

    Chats, completions and embeddings, with /health for probes and /metrics for Prometheus.

    Each option may also come from the environment (--max-body-mb from STAGELINE_SERVE_MAX_BODY_MB) or from a file
    (max-body-mb = 8). The command line goes before the environment, and that before the file.

    Example: stageline serve smollm2.bundle --port 8000
    """
    with common.needs("this command needs the service", "serve", "fastapi", "prometheus_client", "uvicorn"):
        from stageline.runtime.service.app import create_app
        from stageline.runtime.service.connections import raise_file_limit
        from stageline.runtime.service.request_log import log_to_stderr
        from stageline.runtime.service.server import (
            DrainingServer,
            bound_socket,
            check_certificate,
        )
        from stageline.runtime.service.server import (
            unix_socket as bound_path,
        )

    served = _served(context, bundles or [], name or [])
    keys = [*(api_key or []), *_keys(api_key_file)]
    _check_root_path(root_path)
    if tls_cert is not None:
        check_certificate(tls_cert, tls_key)
    elif tls_key is not None:
        raise common.UsageError("--tls-key needs --tls-cert")
    if log_format is not None:
        log_to_stderr(log_format)
    raise_file_limit()
    sys.setswitchinterval(_SWITCH_S)
    if any(one.options.rebalance != "off" for one in served):
        _log_rebalancing()
    folders = [hub.bundle_of(one.bundle) for one in served]
    with ExitStack() as stack:
        telemetry = None if otlp_endpoint is None else stack.enter_context(closing(_telemetry(otlp_endpoint)))
        where = bound_socket(host, port) if unix_socket is None else bound_path(unix_socket)
        listening = stack.enter_context(where)
        pipelines = {
            one.name: stack.enter_context(
                Pipeline.open(folder, common.with_engine(folder, one.options, one.error_budget))
            )
            for one, folder in zip(served, folders, strict=True)
        }
        app = create_app(
            pipelines,
            api_key=keys,
            allowed_hosts=[host, gethostname(), *(common.split(allowed_hosts) or [])],
            cors_origins=common.split(cors_origins) or [],
            max_body_bytes=max_body_mb * 2**20,
            unknown_parameters=unknown_parameters,
            concurrency=_PER_PERMIT * sum(one.options.queue for one in served),
            root_path=root_path,
            ping_s=ping_s,
            telemetry=telemetry,
        )
        if unix_socket is not None:
            url = f"unix:{unix_socket}"
        else:
            scheme = "http" if tls_cert is None else "https"
            url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
            if not keys and not _is_local(host):
                print(f"stageline: {url} has no API key: anyone who can reach it can use it", file=sys.stderr)

        def ready() -> None:
            gc.freeze()  # what is here now stays: a collection that walks through it would hold up all streams
            try:
                print(f"serving {', '.join(pipelines)} at {url}", flush=True)
            except BrokenPipeError:  # nobody reads it: that is no reason to end
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115

        server = DrainingServer(app, list(pipelines.values()), drain_s, ready, tls_cert, tls_key, _die)
        server.run_until_signal(listening)
        watchdog = threading.Timer(_CLOSE_S, _die, [f"a stage has not ended within {_CLOSE_S:g} s"])
        watchdog.daemon = True
        watchdog.start()


@dataclass(frozen=True)
class _Served:
    """A model to be served."""

    name: str
    bundle: Path
    options: PipelineOptions
    error_budget: float | None


def _served(context: typer.Context, bundles: Sequence[Path], names: Sequence[str]) -> list[_Served]:
    """The bundles of the command line, all with its options; without some, the models of --config with their own."""
    general = {option: context.params[option] for option in _PER_MODEL}
    if bundles:
        called = names_of(bundles, names)
        return [_of(name, bundle, general) for name, bundle in zip(called, bundles, strict=True)]
    models = serve_config.models_of(context, _PER_MODEL)
    if not models:
        raise common.UsageError("there is nothing to serve; give a BUNDLE, or --config with [models.NAME]")
    if names:
        raise common.UsageError("--name is for BUNDLEs; the models of --config have names")
    return [_of(name, bundle, {**general, **own}) for name, (bundle, own) in models.items()]


def _of(name: str, bundle: Path, given: Mapping[str, Any]) -> _Served:
    own = {option: given[option] for option in _PER_MODEL if option != "error_budget"}
    own |= {"devices": common.split(given["devices"]), "cache_memory": _bytes(given, "cache_memory")}
    own |= {"prefix_cache": _bytes(given, "prefix_cache")}
    own["tpot_target"] = common.seconds(given["tpot_target"], "--tpot-target")
    return _Served(name, bundle, PipelineOptions(**own), given["error_budget"])


def _die(reason: str) -> None:
    """End at once: threads that are broken may never end, and whoever supervises the process starts it again."""
    print(
        f"stageline: {words.line(reason)}; ending, since nothing is answered any more",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _telemetry(endpoint: str) -> "Telemetry":
    if not endpoint.startswith(("http://", "https://")):
        raise common.UsageError(f"--otlp-endpoint is {endpoint!r}; give a URL such as http://localhost:4318")
    with common.needs("--otlp-endpoint needs OpenTelemetry", "otel", "opentelemetry"):
        from stageline.runtime.service.telemetry import Telemetry

    return Telemetry.over_http(None if endpoint == os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") else endpoint)


def _check_root_path(path: str) -> None:
    if path and (not path.startswith("/") or path.endswith("/")):
        raise common.UsageError(f"--root-path is {path!r}; give a path such as /llm")


def _bytes(given: Mapping[str, Any], option: str) -> int | None:
    size = common.size_bytes(given[option], f"--{option.replace('_', '-')}")
    return None if size is None else int(size)


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


def names_of(bundles: Sequence[Path], given: Sequence[str]) -> list[str]:
    """What clients call the bundles. A usage error where names are missing, or come twice."""
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
