"""What each engine makes of the packed weights of a bundle: kept in how many bits, or unpacked."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from stageline.models.packing import groups, read
from stageline.models.tensors import Entry, PackedEntry
from stageline.runtime.engines.lowering.nbits_operands import operand_bytes


@dataclass(frozen=True)
class Kept:
    """The weights of a bundle that are packed in one way: how many, their bytes on disk, and bits a weight in engines
    that keep them (None: it unpacks them)."""

    method: str
    settings: dict[str, int | str]
    count: int
    size_bytes: int
    parameters: int
    onnxruntime: int | None
    openvino: int | None


def kept(weights: Iterable[Entry]) -> list[Kept]:
    """Each way in which the bundle's weights are packed. Reads the smallest weight of each."""
    ways: dict[tuple[object, ...], list[PackedEntry]] = {}
    for entry in weights:
        if isinstance(entry, PackedEntry):
            packing = entry.packing
            ways.setdefault((packing.method, *sorted(packing.settings.items())), []).append(entry)
    return [_of(entries) for entries in ways.values()]


def _of(entries: list[PackedEntry]) -> Kept:
    one = min(entries, key=lambda entry: entry.size_bytes)
    found = groups(one.packing, read(one)) if len(one.shape) == 2 else None
    ours = theirs = None
    if found is not None:
        bits, columns = (4 if found.bits <= 4 else 8), one.shape[1]
        takes = operand_bytes(1, columns, found.bits, found.group, found.zeros is not None) is not None
        divides = columns % found.group == 0 or found.group > columns
        ours, theirs = (bits if takes else None), (bits if divides and found.order is None else None)
    return Kept(
        one.packing.method,
        dict(one.packing.settings),
        len(entries),
        sum(entry.size_bytes for entry in entries),
        sum(prod(entry.shape) for entry in entries),
        ours,
        theirs,
    )
