"""The host memory that builds take, estimated from the weights of their stages, and what fits into a bound of it."""

import itertools
import os
from collections.abc import Collection, Sequence
from math import prod

from stageline.models.errors import EngineError
from stageline.runtime import words
from stageline.runtime.bundle.balance import balance
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.engines.lowering.quantise import INT4_GROUP
from stageline.runtime.engines.tensorrt.lower import QUANTISED, Precision, compute_dtype

Build = tuple[int, Precision]
"""A stage, and the precision that it is built in."""
_BASE_BYTES, _BLOCK_BYTES = 370e6, 22e6
_ENGINE_TIMES: dict[Precision, float] = {"fp16": 2.1, "bf16": 2.1}  # else 2.7


def peak_bytes(blocks: int, read_bytes: float, engine_bytes: float, precision: Precision) -> float:
    """The most resident memory of a process that builds a stage, mapped files included, whose weights are `read_bytes`
    in the bundle and `engine_bytes` in the engine. Measured with TensorRT-RTX 1.7: no build of
    benchmarks/build_memory.py took more."""
    return _BASE_BYTES + blocks * _BLOCK_BYTES + read_bytes + _ENGINE_TIMES.get(precision, 2.7) * engine_bytes


def build_bytes(bundle: Bundle, number: int, precision: Precision) -> float:
    """The estimate of `peak_bytes` for stage `number`."""
    stage = bundle.manifest.stages[number]
    uses = range(len(bundle.manifest.uses))[stage.first_block + 1 : stage.last_block + 2]
    ends = [0] if number == 0 else []
    ends += [uses.stop] if number == len(bundle.manifest.stages) - 1 else []
    return _bytes(bundle, [*uses, *ends], precision)


def cut_within(bundle: Bundle, precisions: Collection[Precision], max_bytes: float) -> list[int] | None:
    """The blocks of the fewest stages that each build within `max_bytes`; None if a stage of one block does not."""
    last = len(bundle.manifest.uses) - 1

    def peak(uses: Collection[int]) -> float:
        return max(_bytes(bundle, uses, precision) for precision in precisions)

    costs = [int(peak([use]) - _BASE_BYTES) for use in range(last + 1)]
    for stages in range(1, bundle.manifest.blocks + 1):
        counts = balance(costs, stages)
        ends = [sum(counts[:place]) for place in range(stages + 1)]  # in blocks; block 0 is use 1
        groups = [range(a and a + 1, b + 1 + (b == last - 1)) for a, b in itertools.pairwise(ends)]
        if all(peak(group) <= max_bytes for group in groups):
            return counts
    return None


def check_fits(bundle: Bundle, builds: Sequence[Build], max_bytes: float) -> None:
    """EngineError if one of the builds takes more than `max_bytes`: it names the cut that does not."""
    problem = _shortage(bundle, builds, max_bytes)
    if problem is not None:
        counts = _required_cut(bundle, {precision for _, precision in builds}, max_bytes, problem)
        raise EngineError(
            f"{problem}; {words.counted(len(counts), 'stage')} fit: add --recut, or run stageline recut {bundle.path} "
            f"--layers {','.join(map(str, counts))}"
        )


def recut_within(bundle: Bundle, precisions: Collection[Precision], max_bytes: float) -> Bundle:
    """Recut the bundle into the fewest stages that each build in all `precisions` within `max_bytes`, unless those it
    has do. EngineError if a stage of one block does not."""
    builds = [(number, precision) for number in range(len(bundle.manifest.stages)) for precision in precisions]
    problem = _shortage(bundle, builds, max_bytes)
    if problem is None:
        return bundle
    return recut(bundle.path, _required_cut(bundle, precisions, max_bytes, problem))


def _shortage(bundle: Bundle, builds: Sequence[Build], max_bytes: float) -> str | None:
    size, number, precision = max((build_bytes(bundle, *build), *build) for build in builds)
    if size <= max_bytes:
        return None
    return (
        f"stage {number} takes about {words.size(size)} of memory to build in {precision}, more than "
        f"{words.size(max_bytes)}"
    )


def _required_cut(bundle: Bundle, precisions: Collection[Precision], max_bytes: float, problem: str) -> list[int]:
    counts = cut_within(bundle, precisions, max_bytes)
    if counts is None:
        raise EngineError(f"{problem}; so does a stage of one block: allow more memory")
    return counts


def at_a_time(bundle: Bundle, builds: Sequence[Build], jobs: int | None, max_bytes: float | None) -> int:
    """How many of the builds may run together: within `max_bytes`, at most `jobs`. If neither is given: one for each
    core, within the memory that is available."""
    if jobs is not None and max_bytes is None:
        return jobs
    bound = max_bytes or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fit = int(bound // max(build_bytes(bundle, *build) for build in builds))
    return max(1, min(jobs or len(allowed_cores()), len(builds), fit))


def _bytes(bundle: Bundle, uses: Collection[int], precision: Precision) -> float:
    """The peak of a build of these uses."""
    names = {name for place in uses for name in bundle.manifest.uses[place].weights.values()}
    read = sum(bundle.tensors[name].size_bytes for name in names)
    engine = sum(_engine_bytes(bundle, name, precision) for name in names)
    blocks = sum(0 < use < len(bundle.manifest.uses) - 1 for use in uses)
    return peak_bytes(blocks, read, engine, precision)


def _engine_bytes(bundle: Bundle, name: str, precision: Precision) -> float:
    """A tensor in an engine. Of those that are quantised, only matrices are, and not those that are looked up."""
    shape = bundle.tensors[name].shape
    width: float = compute_dtype(precision, bundle.manifest.dtype).itemsize
    if precision in QUANTISED and len(shape) == 2 and name not in bundle.manifest.uses[0].weights.values():
        grouped = all(size % INT4_GROUP == 0 for size in shape)
        width = 1 if precision != "int4" else 0.5 + width / INT4_GROUP if grouped else width
    return width * prod(shape)
