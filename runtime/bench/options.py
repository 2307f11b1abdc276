"""From a user's options to a run that can begin: loads, bounds, lengths, arrivals, the bundle."""

import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from stageline.models.errors import RequestError
from stageline.runtime.bench.environment import here
from stageline.runtime.bench.records import Layout, Load, Run, RunSettings, Scenario, Slo
from stageline.runtime.bundle.folder import MANIFEST, Bundle, file_sha256
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.devices import spread
from stageline.runtime.devices.cpu import allowed_cores, share_cores
from stageline.runtime.engines import default_device, engine_factory

MLPERF: tuple[Scenario, ...] = ("SingleStream", "Offline", "Server")
_SLO = re.compile(r"(?:(latency|ttft|tpot)=([0-9.]+)(ms|s))|share=([0-9.]+)%")
_BOUNDS = "ttft=200ms,tpot=50ms,latency=2s,share=99%"


def loads(
    scenarios: Sequence[str],
    server_rate: float | None,
    concurrencies: Sequence[int],
    rates: Sequence[float],
    recorded: bool,
    at_rates: Load,
) -> tuple[Load, ...]:
    """The loads of a run (default: MLPerf's three). `at_rates`: the pattern and ceiling of the open loops.

    RequestError for an invalid one.
    """
    found: list[Load] = []
    for name in scenarios or (() if concurrencies or rates or recorded else MLPERF):
        known = next((scenario for scenario in MLPERF if scenario.lower() == name.strip().lower()), None)
        if known is None:
            raise RequestError(f"unknown scenario {name.strip()!r}; known scenarios: {', '.join(MLPERF)}")
        found.append(Load(known, rate_per_s=server_rate if known == "Server" else None))
    for concurrency in concurrencies:
        if concurrency < 1:
            raise RequestError(f"concurrency {concurrency} is below 1; give whole numbers like 1,4,16")
        found.append(Load("Concurrency", concurrency=concurrency))
    for rate in (*rates, *([] if server_rate is None else [server_rate])):
        if not 0 < rate < math.inf:
            raise RequestError(f"rate {rate:g} is not above 0; give requests per second like 5,10,20")
    found += [replace(at_rates, rate_per_s=rate) for rate in rates]
    if recorded:
        found.append(Load("Recorded", ceiling=at_rates.ceiling))
    if server_rate is not None and not any(load.scenario == "Server" for load in found):
        raise RequestError(f"server rate {server_rate:g} changes nothing without the scenario Server; leave it out")
    return tuple(dict.fromkeys(found))


def slo(text: str) -> Slo:
    """Parse bounds like `ttft=200ms,tpot=50ms,latency=2s,share=99%`. RequestError for anything else."""
    bounds: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _SLO.fullmatch(part)
        try:
            assert match is not None
            if match[4]:
                name, value = "share", float(match[4]) / 100
                assert value < 1
            else:
                name, value = f"{match[1]}_s", float(match[2]) / (1000 if match[3] == "ms" else 1)
            assert value > 0
        except (AssertionError, ValueError):
            raise RequestError(f"{part!r} is not a bound; give some of {_BOUNDS}") from None
        if name in bounds:
            raise RequestError(f"{part!r} is a second bound of its kind; give one")
        bounds[name] = value
    if list(bounds) == ["share"]:
        raise RequestError(f"{text!r} says which share must keep bounds, but no bound; add some of {_BOUNDS}")
    return Slo(**bounds)


def new_id() -> str:
    """An id that sorts by time: 20260131-235959-a1b2c3."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def checkpoint_digest(manifest: Manifest) -> str:
    """A SHA-256 that bundles of one checkpoint share, however they are cut: of its architecture, task and weights. An
    export in another dtype has other weights."""
    weights = sorted(
        (entry.sha256 or entry.header_sha256 or "", entry.size_bytes)
        for entry in manifest.files
        if entry.path in manifest.weight_files
    )
    return hashlib.sha256(json.dumps([manifest.architecture, manifest.task, weights]).encode()).hexdigest()


def new_run(bundle: Bundle, settings: RunSettings, run_id: str | None = None, name: str | None = None) -> Run:
    """A run of this bundle on this machine that begins now.

    RequestError if the id does not suit a file name or a device is unknown; EngineError if the engine is unknown.
    """
    run_id = run_id or new_id()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise RequestError(f"run id {run_id!r} is not made of letters, digits, '.', '_' and '-'; give another")
    manifest, place = bundle.manifest, bundle.path.resolve()
    pipeline = settings.pipeline
    engine_factory(pipeline.engine)
    names = spread(pipeline.devices or [default_device(pipeline.engine)], len(manifest.stages))
    shares = iter(share_cores(max(1, names.count("cpu")), allowed_cores()[: pipeline.threads]))
    return Run(
        run_id,
        name or place.name,
        time.time(),
        str(place),
        file_sha256(place / MANIFEST),
        manifest.architecture,
        manifest.task,
        manifest.dtype,
        settings,
        Layout(
            manifest.layers,
            tuple(f"cpu:{','.join(map(str, next(shares)))}" if own == "cpu" else own for own in names),
        ),
        here(),
        checkpoint=checkpoint_digest(manifest),
    )
