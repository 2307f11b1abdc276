"""The route of a micro-batch through the stages, as data."""

from collections.abc import Sequence
from dataclasses import dataclass

from stageline.models.errors import BundleError


@dataclass(frozen=True)
class Hop:
    """Run `stage` for the values named in `fetch`, then keep only those named in `keep` for what comes after."""

    stage: int
    fetch: tuple[str, ...]
    keep: frozenset[str]


def route(
    stages: Sequence[tuple[Sequence[str], Sequence[str]]], inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[Hop, ...]:
    """The hops from a model's inputs to its wanted outputs. `stages` holds the input and output names of each stage.

    A stage that computes nothing wanted is left out; a value is dropped after the last stage that reads it. BundleError
    if a stage reads, or the model returns, what neither an earlier stage nor the inputs hold.
    """
    hops: list[Hop] = []
    wanted = frozenset(outputs)
    for number, (reads, computes) in reversed(list(enumerate(stages))):
        fetch = tuple(name for name in computes if name in wanted)
        if fetch:
            hops.append(Hop(number, fetch, wanted))
            wanted = (wanted - set(fetch)) | set(reads)
    unknown = sorted(wanted - set(inputs))
    if unknown:
        raise BundleError(f"no stage computes {unknown[0]!r} before it is read, and it is not an input of the model")
    return tuple(reversed(hops))
