"""What GPTQ, AWQ and compressed-tensors share: whole numbers with a scale and a whole zero point for each group."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing.base import Groups
from stageline.models.packing.bits import SLAB
from stageline.models.tensors import Packing, TensorEntry


class Unpacked(NamedTuple):
    """values [N, K], in the order of the inputs; scales and zeros [N, G]."""

    values: NDArray[np.uint8]
    bits: int
    group: int
    """-1: one group."""
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]


def ordered(weight: Unpacked, group_of: NDArray[Any] | None = None) -> Groups | None:
    """The weight in groups. `group_of` [K] is the group of each input; None: they follow each other. None if it makes
    groups of different sizes. CheckpointError if it names a group that is not there."""
    columns = weight.values.shape[1]
    group = weight.group if weight.group > 0 else max(columns, 1)
    natural = np.arange(columns) // group
    values, order = weight.values, None
    if group_of is not None and not np.array_equal(group_of, natural):
        _in_range(group_of, weight.scales.shape[1])
        order = np.argsort(group_of, kind="stable")
        if not np.array_equal(group_of[order], natural):
            return None
        values = np.take(values, order, axis=1)
    return Groups(
        values=values,
        bits=weight.bits,
        group=group,
        scales=weight.scales,
        offsets=-(weight.zeros.astype(np.float32) * weight.scales),
        zeros=weight.zeros,
        order=order,
    )


def weight(weight: Unpacked, group_of: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """(value - zero) * scale [N, K], whatever `group_of` is."""
    found = ordered(weight, group_of)
    if found is not None:
        return found.weight()
    assert group_of is not None  # without it, groups follow each other
    rows, columns = weight.values.shape
    result = np.empty((rows, columns), np.float32)
    step = max(1, SLAB // max(columns, 1))
    for start in range(0, rows, step):
        slab = slice(start, start + step)
        np.subtract(weight.values[slab], weight.zeros[slab].astype(np.float32)[:, group_of], out=result[slab])
        result[slab] *= weight.scales[slab][:, group_of]
    return result


def _in_range(group_of: NDArray[Any], count: int) -> None:
    if group_of.size and not 0 <= group_of.min() <= group_of.max() < count:
        raise CheckpointError(
            f"its g_idx names groups {group_of.min()} to {group_of.max()}, but there are {count}; download it again"
        )


def sides(packing: Packing) -> tuple[int, int]:
    """Outputs and inputs. CheckpointError unless the weight is a matrix."""
    if len(packing.shape) != 2 or min(packing.shape) < 1:
        raise CheckpointError(f"it has the shape {list(packing.shape)}, a matrix is needed")
    return packing.shape


def bits_of(packing: Packing, known: Collection[int]) -> int:
    """CheckpointError unless the bits are known."""
    bits = packing.settings.get("bits")
    if not isinstance(bits, int) or bits not in known:
        raise CheckpointError(f"it has {bits} bits, read are {', '.join(map(str, known))}")
    return bits


def unread_bits(stated: Any, known: Collection[int]) -> str | None:
    """As `Reader.unread`, of the bits that a config states."""
    if isinstance(stated, int) and stated in known:
        return None
    return "without a number of bits" if stated is None else ""


def size(packing: Packing) -> int:
    """Inputs of a group; -1: all. CheckpointError if it is no number of these."""
    group = packing.settings.get("group_size")
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise CheckpointError(f"it has groups of {group!r}, a positive number or -1 is needed")
    return group


def stated_size(stated: Mapping[str, Any]) -> int:
    """The group size that a config states; -1 if none."""
    found = stated.get("group_size", stated.get("q_group_size"))
    return -1 if found is None or found == 0 else found


def count(inputs: int, group: int) -> int:
    """Groups of a row."""
    return 1 if group == -1 else -(-inputs // group)


def whole_words(what: str, number: int, bits: int) -> None:
    """CheckpointError unless so many numbers fill words of 32 bits."""
    if number * bits % 32:
        raise CheckpointError(f"its {number:,} {what} of {bits} bits fill no whole words of 32 bits")


def beside(
    tensors: Mapping[str, TensorEntry], ending: str, roles: Iterable[str]
) -> Iterator[tuple[str, dict[str, TensorEntry]]]:
    """Each tensor whose name ends so: the name before that, and the tensors beside it by role, as far as they are
    there; the ending is a role as well."""
    for name, entry in tensors.items():
        if name.endswith(ending):
            stem = name.removesuffix(ending)
            others = {role: tensors[f"{stem}.{role}"] for role in roles if f"{stem}.{role}" in tensors}
            yield stem, {ending.removeprefix("."): entry, **others}


def matrix(parts: Mapping[str, TensorEntry], role: str) -> tuple[int, int]:
    """The shape of a part. CheckpointError unless it is of a matrix."""
    shape = parts[role].shape
    if len(shape) != 2:
        raise CheckpointError(f"{parts[role].name} has the shape {list(shape)}, a matrix is needed")
    return shape
