"""Find the nodes of each stage that must compute in float32 for the stage to pass in half precision.

The lowered stage runs on CPU cores, each value rounded to its type, against ONNX Runtime in float32. Which set of nodes
suffices is found by halving (QuickXplain, Junker 2004), then each node of the set is tried without. So the set is
1-minimal: with any one of its nodes back in half precision, the stage fails. A smaller set of other nodes may exist.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from stageline.exporter.verify.engines import EngineComparison, FedStage, floats_of, reference
from stageline.models.errors import StagelineError
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.bundle.float32_nodes import Half, write_float32_nodes
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.graph import CACHE_ATTENTION
from stageline.runtime.engines.lowering.float32 import HALVES
from stageline.runtime.engines.lowering.precision import of_weights
from stageline.runtime.engines.lowering.weights import BeyondRangeError
from stageline.runtime.engines.tensorrt.lower import Lowered, lower, lower_exactly

_FLOATS = (ir.DataType.FLOAT, *HALVES)
Passes = Callable[[Collection[str]], bool]


@dataclass(frozen=True)
class FoundNodes:
    """What a stage needs. `first` is the first value that errs beyond the tolerance, in the order of computation; None
    if none does. `before` are the stage's outputs without `nodes` in float32, `after` with them."""

    stage: int
    first: EngineComparison | None
    nodes: tuple[str, ...]
    trials: int
    before: tuple[EngineComparison, ...]
    after: tuple[EngineComparison, ...]


def find_precision(bundle: Bundle, precision: Half, *, seed: int, progress: Callable[[str], None]) -> list[FoundNodes]:
    """Search every stage, on inputs drawn from `seed`, and write the nodes into the bundle's manifest in place of those
    before, where engines of `precision` take them from.

    StagelineError, and the manifest stays as it is, if a stage fails even with all its nodes in float32.
    """
    found = [_search(fed, precision, progress, len(bundle.manifest.stages)) for fed in reference(bundle, seed)]
    write_float32_nodes(bundle, precision, {name for stage in found for name in stage.nodes})
    return found


def smallest(candidates: Sequence[str], passes: Passes) -> tuple[str, ...]:
    """A 1-minimal set of `candidates` for which `passes` is true, in their order; it is true for all of them."""
    kept = [] if passes(()) else _quick_xplain([], list(candidates), passes)
    for name in list(kept):
        without = [other for other in kept if other != name]
        if passes(without):
            kept = without
    return tuple(name for name in candidates if name in kept)


def _quick_xplain(given: list[str], candidates: list[str], passes: Passes) -> list[str]:
    """What of `candidates` must be added to `given`, with which alone it does not pass."""
    if len(candidates) == 1:
        return candidates
    middle = len(candidates) // 2
    first, second = candidates[:middle], candidates[middle:]
    of_second = [] if passes([*given, *first]) else _quick_xplain([*given, *first], second, passes)
    of_first = [] if passes([*given, *of_second]) else _quick_xplain([*given, *of_second], first, passes)
    return [*of_first, *of_second]


class _Trials:
    """Runs a stage with some of its nodes in float32. A set that was tried is not tried again."""

    def __init__(self, fed: FedStage, precision: Half, tell: Callable[[str], None]) -> None:
        self.fed, self.precision, self.tell = fed, precision, tell
        self.known: dict[frozenset[str], tuple[EngineComparison, ...]] = {}

    def lowered(self, wide: Collection[str]) -> Lowered:
        return lower(self.fed.file, self.precision, self.fed.length, stripped=False, wide=wide)

    def outputs(self, wide: Collection[str]) -> tuple[EngineComparison, ...]:
        """The stage's outputs with the nodes `wide` in float32."""
        key = frozenset(wide)
        if key not in self.known:
            self.tell(f"trial {len(self.known) + 1}, {len(key)} nodes in float32")
            self.known[key] = self.compared(key)
        return self.known[key]

    def compared(self, wide: Collection[str]) -> tuple[EngineComparison, ...]:
        fed, precision = self.fed, self.precision
        try:
            got = EmulatedStage(self.lowered(wide), fed.rows, fed.length).run(fed.inputs)
        except BeyondRangeError as error:  # the weight is the value that errs
            return (EngineComparison(fed.file.number, error.tensor, precision, np.inf, np.inf, np.inf, 0.0),)
        return tuple(fed.compared(name, precision, got[name], want) for name, want in fed.outputs.items())

    def passes(self, wide: Collection[str]) -> bool:
        """Whether all outputs are within the tolerance."""
        return all(comparison.passed for comparison in self.outputs(wide))


def _search(fed: FedStage, precision: Half, progress: Callable[[str], None], stages: int) -> FoundNodes:
    where = f"stage {fed.file.number + 1} of {stages}"
    progress(where)
    trials = _Trials(fed, precision, lambda step: progress(f"{where}: {step}"))
    candidates = _narrow_nodes(fed, trials.lowered(()))
    first = None if trials.passes(()) else _first_beyond(trials)
    if first is not None and not trials.passes(candidates):
        worst = max(trials.outputs(candidates), key=lambda comparison: comparison.p90_error)
        raise StagelineError(
            f"stage {fed.file.number} fails in {precision} even with all its nodes in float32: {worst.value!r} errs by "
            f"{worst.p90_error:.1e} at 9 of 10 tokens, {worst.tolerance:.0e} is allowed; weights or caches do not fit "
            "the type. Choose another precision"
        )
    nodes = smallest(candidates, trials.passes)
    return FoundNodes(fed.file.number, first, nodes, len(trials.known), trials.outputs(()), trials.outputs(nodes))


def _narrow_nodes(fed: FedStage, lowered: Lowered) -> list[str]:
    """The bundle's nodes that compute in half precision, in order. What cache attention was lowered to is one, and what
    prepares weights belongs to the nodes that read them."""
    halves = [node for node in _graph(lowered) if any(value.dtype in HALVES for value in node.outputs)]
    names = {node.name for node in halves}
    values = {value.name for node in halves for value in node.outputs}
    return [
        str(node.name)
        for node in ir.load(fed.file.file).graph
        if (node.name in names and not of_weights(node))
        or (node.op_type == CACHE_ATTENTION and node.outputs[0].name in values)
    ]


def _first_beyond(trials: _Trials) -> EngineComparison:
    """The first value of the failing stage that is beyond the tolerance: a weight, a value inside, or an output."""
    fed, outputs = trials.fed, trials.outputs(())
    if set(fed.outputs).isdisjoint(comparison.value for comparison in outputs):
        return outputs[0]
    narrow, exact = trials.lowered(()), lower_exactly(fed.file, trials.precision, fed.length)
    known = floats_of(exact.proto) - set(fed.outputs)
    names = [str(v.name) for node in _graph(narrow) for v in node.outputs if v.name in known and v.dtype in _FLOATS]
    got, want = (EmulatedStage(graph, fed.rows, fed.length, names).run(fed.inputs) for graph in (narrow, exact))
    inside = (
        fed.compared(name, trials.precision, got[name], want[name])
        for name in names
        if got[name].ndim and got[name].size
    )
    return next(comparison for comparison in (*inside, *outputs) if not comparison.passed)


def _graph(lowered: Lowered) -> ir.Graph:
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(lowered.proto))
    return model.graph
