"""Expected times of the uses of a running model for the work that its stages did, by its profile or a roofline."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError

from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.planning.cost import use_costs
from stageline.runtime.planning.device_kinds import device_kind
from stageline.runtime.planning.profile import Machine, read_profile
from stageline.runtime.planning.timings import Timings, UseTimes
from stageline.runtime.stages.lanes import Amount
from stageline.runtime.stages.recorder import Kind
from stageline.runtime.workload import Shape

_ANY = "XeonPlatinum8480"  # only the proportions of a roofline count
UseSeconds = Callable[[Shape], UseTimes]


def use_seconds(
    bundle: Bundle,
    threads: int,
    on_cpu: bool,
    quantise: WeightDtype | None = None,
    engine: str = "onnxruntime",
) -> UseSeconds:
    """The time of each use for a micro-batch, in engines of this name opened with `quantise`: from the profile of this
    machine with `threads`, if the bundle has it and the stages run on the CPU; else from a roofline, right in its
    proportions only. A profile of this machine with other weights is nearer to them than a roofline."""
    parts = bundle.parts()
    costs = cache(lambda shape: tuple(use_costs(bundle.manifest, bundle.tensors, parts, shape, quantise=quantise)))
    if on_cpu:
        try:
            machine = Machine.here(quantise, engine)
            profile, _ = read_profile(bundle.path, machine)
            if profile.machine.same_but_weights(machine):
                timings = Timings(profile, bundle.manifest, threads, costs)
                return cache(timings.of)
        except (StagelineError, PackageNotFoundError):  # no profile, none with so many threads, or an engine of others
            pass
    rates = device_kind(_ANY).rates("float32")
    return cache(lambda shape: UseTimes(tuple(map(rates.use_s, costs(shape))), 0.0))


def work_seconds(use_s: UseSeconds, amounts: Mapping[Kind, Amount], past: int) -> UseTimes:
    """The same for all that a stage did: `amounts` of each kind, in micro-batches of their mean size. Steps that decode
    are taken to have `past` tokens in the cache."""
    found: list[tuple[int, UseTimes]] = []
    for kind, amount in amounts.items():
        if not amount.runs:
            continue
        rows, length = max(1, round(amount.rows / amount.runs)), max(1, round(amount.tokens / amount.rows))
        shape = Shape(rows, 1, past, 1) if kind == "decode" else Shape(rows, length, 0, None if kind == "batch" else 1)
        found.append((amount.runs, use_s(shape)))
    return UseTimes(
        tuple(sum(values) for values in zip(*([runs * s for s in times.use_s] for runs, times in found), strict=True)),
        sum(runs * times.later_stage_s for runs, times in found),
    )
