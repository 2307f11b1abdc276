"""The commands `stageline profile` and `stageline plan`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from stageline.exporter.commands import common
from stageline.exporter.commands.show import table
from stageline.models.errors import StagelineError
from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.planning.calibrate import speed
from stageline.runtime.planning.cluster import Cluster, parse_devices, read_cluster, unmeasured
from stageline.runtime.planning.cores import Cores
from stageline.runtime.planning.measure import measure
from stageline.runtime.planning.planner import Answer, Planner, device_names, quantise_for
from stageline.runtime.planning.problem import Objective
from stageline.runtime.planning.profile import Machine, MachineProfile, has_profile, read_profile, write_profile
from stageline.runtime.planning.profile import command as profile_command_for
from stageline.runtime.planning.simulate import (
    BatchRequest,
    SimulationResult,
    TextRequest,
    replicas_needed,
    simulate_batches,
    simulate_generation,
)
from stageline.runtime.workload import Workload, poisson

_CHUNK, _SIMULATED, _SEED = 128, 500, 0
_BUDGET_S = 45.0  # of profile: for as many passes as fit, of at most three
ObjectiveName = Literal["throughput", "latency", "cost", "energy"]
EngineOption = Annotated[
    Literal["onnxruntime", "openvino"],
    typer.Option(help="The CPUs' engine to measure, or to plan for."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("profile")(profile_command)
    app.command("plan")(plan_command)


def profile_command(
    bundle: common.BundleArgument,
    threads: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of CPU cores to measure on.")] = "1,2",
    quantise: common.QuantiseOption = None,
    engine: EngineOption = "onnxruntime",
    as_json: common.JsonOption = False,
) -> None:
    """Measure a bundle's parts on this machine, for `stageline plan`.

    It takes under a minute for a small model, and one pass through all parts of a large one. The times are stored in
    the bundle, one profile per machine, --engine and --quantise.

    Example: stageline profile minilm.bundle
    """
    opened = Bundle.open(bundle)
    counts = common.numbers(threads, "--threads", int)
    with common.share_shown() as progress:
        profile = measure(opened, counts, progress=progress, quantise=quantise, budget_s=_BUDGET_S, engine=engine)
    file = write_profile(opened, profile)
    whole = [point for point in profile.points if (point.first, point.end) == (0, opened.manifest.blocks)]
    rows = [
        [str(p.threads), str(p.batch), str(p.length), str(p.past), f"{p.seconds * 1e3:.2f}", str(p.runs)] for p in whole
    ]
    times = table(["threads", "batch", "length", "past", "ms", "runs"], rows)
    common.print_result(
        as_json,
        profile.model_dump(mode="json"),
        f"{times}\n{file}: {len(profile.points)} times; the table shows those of the whole model\n{profile.machine}",
    )


def plan_command(
    bundle: common.BundleArgument,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="D,D,...",
            help="CPU cores of this machine (cpu:0,cpu:1; default: all) or kinds of device (4xL4,H100).",
        ),
    ] = None,
    cluster: Annotated[Path | None, typer.Option(metavar="TOML", help="A file of devices and links.")] = None,
    objective: Annotated[ObjectiveName, typer.Option(help="What to optimise.")] = "throughput",
    layers: common.LayersOption = None,
    micro_batch: common.MicroBatchOption = Workload.micro_batch,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row or a prompt (default: the model's limit, up to 128).")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate per request, for --rate.")
    ] = 128,
    slots: common.SlotsOption = Workload.slots,
    capacity: common.CapacityOption = None,
    dtype: Annotated[
        common.DtypeName | None,
        typer.Option(help="Weights' type (default: the bundle's; on the CPU float32)."),
    ] = None,
    quantise: common.QuantiseOption = None,
    engine: EngineOption = "onnxruntime",
    replicas: Annotated[int, typer.Option(min=1, help="Max devices that share one stage.")] = 1,
    overlap: Annotated[bool, typer.Option(help="Whether devices copy while they compute.")] = True,
    rate: Annotated[
        float | None, typer.Option(min=0.0, metavar="R", help="Requests/s to serve: show how many devices it takes.")
    ] = None,
    ttft_p99_ms: Annotated[float, typer.Option(min=0.0, help="Max time to first token at p99, for --rate.")] = 500.0,
    explain: Annotated[bool, typer.Option("--explain", help="Show each stage's costs and the next best plan.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Find the best cut of a bundle for some devices.

    Shows which blocks run where and the predicted speed. It does not change the bundle; `stageline recut` does.

    Example: stageline plan minilm.bundle --explain
    """
    if devices is not None and cluster is not None:
        raise common.UsageError("give --devices or --cluster, not both")
    if dtype is not None and quantise is not None:
        raise common.UsageError("give --dtype or --quantise, not both")
    if quantise == "float32":
        raise common.UsageError(
            "a plan counts weights that the checkpoint has quantised as engines keep them; leave --quantise float32 out"
        )
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    devices = devices or (None if cluster is not None else _this_machine())
    found = read_cluster(cluster) if cluster is not None else parse_devices(str(devices))
    weights_dtype = quantise or dtype or ("float32" if found.local else manifest.dtype)
    profile, warning = _profile(opened, found, weights_dtype, engine)
    if found.local and profile is None:
        found = unmeasured(found, partial(speed, quantise=quantise_for(weights_dtype)))
        warning = _guessed(opened, found, weights_dtype, engine)
    if profile is not None and devices is not None:
        found = parse_devices(devices, profile.handover_s)
    planner = Planner(
        opened,
        found,
        common.workload(manifest, micro_batch, length, slots, capacity),
        weights_dtype,
        overlap,
        profile,
        tuple(common.numbers(layers, "--layers", int)) or None,
        replicas,
    )
    best = planner.best(objective)
    report = _Report(planner, best, objective, warning)
    document: dict[str, Any] = report.document()
    lines = [report.summary()]
    if explain:
        second = planner.second(objective, best)
        document["next_best"] = None if second is None else _figures(planner, second)
        lines += ["", report.stages(), "", report.reasons(second)]
    if rate:
        sizes = _sizes(planner, objective, rate, ttft_p99_ms / 1e3, new_tokens)
        document["serving"] = [size for size, _ in sizes]
        lines += ["", _sizes_table(sizes, rate, ttft_p99_ms)]
    if warning:
        print(f"stageline: warning: {warning}", file=sys.stderr)
    common.print_result(as_json, document, "\n".join(lines))


class _Report:
    """A plan in words and as data."""

    def __init__(self, planner: Planner, best: Answer, objective: Objective, warning: str | None):
        self.planner, self.best, self.objective, self.warning = planner, best, objective, warning
        self.names = device_names(planner.cluster, best.plan)

    def document(self) -> dict[str, Any]:
        return {"objective": self.objective, "warning": self.warning, **_figures(self.planner, self.best)}

    def summary(self) -> str:
        best, cached = self.best, self.planner.bundle.manifest.cached
        layers = ",".join(str(stage.end - stage.first) for stage in best.plan.stages)
        where = ", ".join("+".join(names) for names in self.names)
        shape = f"{best.shape.batch} x {best.shape.length} tokens"
        load = self.planner.workload
        what = (
            f"{load.slots} slots in {words.counted(len(best.plan.stages), 'group')} of {best.shape.batch}, "
            f"{best.shape.past} tokens past: {best.tokens_per_s:.1f} tokens/s, {best.cycle_s * 1e3:.2f} ms per token"
            if cached
            else f"micro-batches of {shape}: {best.tokens_per_s:.0f} tokens/s, "
            f"{best.tokens_per_s / load.length:.1f} rows/s, {best.plan.latency_s * 1e3:.2f} ms through all stages"
        )
        costs = (
            f", {best.price_per_million:.4f} dollars per million tokens, "
            f"{best.energy_j_per_token * 1e3:.3f} mJ per token"
            if best.plan.price_per_h
            else ""
        )
        return f"--layers {layers} on {where}\n{what}{costs}"

    def stages(self) -> str:
        """The table of stages."""
        best = self.best
        rows = []
        for number, (stage, figures) in enumerate(zip(best.plan.stages, best.plan.figures, strict=True)):
            device = best.problem.devices[stage.device]
            share = figures.memory_bytes / device.memory_bytes
            rows.append(
                [
                    str(number),
                    "+".join(self.names[number]),
                    f"{stage.first}-{stage.end - 1}",
                    f"{figures.compute_s * 1e3:.3f}",
                    f"{figures.copy_s * 1e3:.3f}",
                    f"{figures.bubble:.1%}",
                    words.size(round(figures.memory_bytes)),
                    f"{share:.1%}",
                ]
            )
        return table(["stage", "device", "blocks", "compute ms", "copy ms", "bubble", "memory", "of device"], rows)

    def reasons(self, second: Answer | None) -> str:
        """The bottleneck, and the next best plan."""
        plan = self.best.plan
        worst = max(range(len(plan.stages)), key=lambda n: plan.figures[n].occupied_s)
        lines = [f"stage {worst} is the bottleneck: {plan.bottleneck_s * 1e3:.3f} ms per micro-batch"]
        if second is None:
            return "\n".join([*lines, "there is no other plan"])
        layers = ",".join(str(stage.end - stage.first) for stage in second.plan.stages)
        names = ", ".join("+".join(one) for one in device_names(self.planner.cluster, second.plan))
        worse = second.value(self.objective) / self.best.value(self.objective) - 1
        return "\n".join(
            [
                *lines,
                f"next best: --layers {layers} on {names}: {second.tokens_per_s:.1f} tokens/s, "
                f"{worse:.2%} worse in {self.objective}",
            ]
        )


def _figures(planner: Planner, answer: Answer) -> dict[str, Any]:
    names = device_names(planner.cluster, answer.plan)
    return {
        "layers": [stage.end - stage.first for stage in answer.plan.stages],
        "stages": [
            {"devices": names[n], "first_block": stage.first, "last_block": stage.end - 1, **asdict(figures)}
            for n, (stage, figures) in enumerate(zip(answer.plan.stages, answer.plan.figures, strict=True))
        ],
        "micro_batch": asdict(answer.shape),
        "bottleneck_s": answer.plan.bottleneck_s,
        "latency_s": answer.plan.latency_s,
        "cycle_s": answer.cycle_s,
        "tokens_per_s": answer.tokens_per_s,
        "price_per_h": answer.plan.price_per_h,
        "price_per_million_tokens": answer.price_per_million,
        "energy_j_per_token": answer.energy_j_per_token,
    }


def _profile(bundle: Bundle, cluster: Cluster, dtype: str, engine: str) -> tuple[MachineProfile | None, str | None]:
    """The profile of this machine, if the plan is for its CPU cores and there is one, and a warning if it is not quite
    the right one."""
    if not cluster.local or not has_profile(bundle.path):
        return None, None
    return read_profile(bundle.path, Machine.here(quantise_for(dtype), engine))


def _guessed(bundle: Bundle, cluster: Cluster, dtype: str, engine: str) -> str:
    """What times are of for want of a profile, how far they may be off, and how to measure them."""
    source = next(kind.device.source for kind in cluster.kinds if isinstance(kind.device, Cores))
    command = profile_command_for(bundle.path, quantise_for(dtype), engine)
    return f"this bundle is not measured on this machine: times are of {source}; measure it with: {command}"


def _this_machine() -> str:
    """All cores that this process may use, as devices."""
    return ",".join(f"cpu:{core}" for core in allowed_cores())


def _sizes(
    planner: Planner, objective: Objective, rate: float, ttft_p99_s: float, new_tokens: int
) -> list[tuple[dict[str, Any], SimulationResult]]:
    """How many pipelines serve the rate, for each kind of device alone and each number of them in a pipeline; sorted
    by price, then by number of devices."""
    found = []
    for kind, link in zip(planner.cluster.kinds, _own_links(planner.cluster), strict=True):
        for count in range(1, kind.count + 1):
            alone = Cluster((replace(kind, names=kind.names[:count]),), ((link,),))
            one = replace(planner, cluster=alone)
            try:
                answer = one.best(objective)
            except StagelineError:
                continue  # the model does not fit
            if len(answer.plan.stages) < count:
                continue
            needed = replicas_needed(_simulated(one, answer, new_tokens), rate, ttft_p99_s)
            if needed is not None:
                pipelines, report = needed
                price = pipelines * answer.plan.price_per_h
                size = {"kind": kind.name, "devices": pipelines * count, "pipelines": pipelines, "stages": count,
                        "price_per_h": price, "report": asdict(report)}  # fmt: skip
                found.append((size, report))
    return sorted(found, key=lambda one: (one[0]["price_per_h"], one[0]["devices"]))


def _own_links(cluster: Cluster) -> list[Any]:
    return [cluster.links[number][number] for number in range(len(cluster.kinds))]


def _simulated(planner: Planner, answer: Answer, new_tokens: int) -> Callable[[float], SimulationResult]:
    setting, asked = planner.setting(answer), planner.workload

    def run(rate: float) -> SimulationResult:
        arrivals = poisson(rate, _SIMULATED, _SEED)
        if not planner.bundle.manifest.cached:
            return simulate_batches(setting, [BatchRequest(t, 1, asked.length) for t in arrivals], 1, _SEED)
        texts = [TextRequest(t, asked.length, new_tokens) for t in arrivals]
        return simulate_generation(setting, texts, asked.slots, asked.capacity, _CHUNK, _SEED)

    return run


def _sizes_table(sizes: Sequence[tuple[dict[str, Any], SimulationResult]], rate: float, ttft_p99_ms: float) -> str:
    head = f"to serve {rate:g} requests/s, p99 of the first token within {ttft_p99_ms:g} ms ({_SIMULATED} simulated):"
    if not sizes:
        return f"{head}\nno number of pipelines of these devices does; loosen the bound, or name faster devices"
    rows = [
        [size["kind"], str(size["devices"]), f"{size['pipelines']} x {size['stages']}", f"{size['price_per_h']:.2f}",
         f"{(report.ttft.p99 or report.latency.p99) * 1e3:.1f}", f"{report.tpot.p99 * 1e3:.2f}",
         f"{1 - report.bubble:.0%}"]
        for size, report in sizes
    ]  # fmt: skip
    columns = ["kind", "devices", "pipelines", "dollars/h", "TTFT p99 ms", "TPOT p99 ms", "busy"]
    return f"{head}\n{table(columns, rows)}"
