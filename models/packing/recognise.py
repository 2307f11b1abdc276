"""Which tensors of a checkpoint hold quantised weights, by what it states and by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from stageline.models.errors import CheckpointError
from stageline.models.packing import check
from stageline.models.packing.awq import Awq
from stageline.models.packing.base import Found, Reader
from stageline.models.packing.bitsandbytes import Bitsandbytes
from stageline.models.packing.compressed_tensors import CompressedTensors
from stageline.models.packing.floats import WIDE
from stageline.models.packing.fp4 import Mxfp4
from stageline.models.packing.fp8 import Fp8
from stageline.models.packing.gptq import Gptq
from stageline.models.packing.modelopt import ModelOpt
from stageline.models.packing.stated import Statement, details
from stageline.models.tensors import Entry, PackedEntry, Packing, TensorEntry

# The method that a checkpoint states -> what reads it.
_READERS: dict[str, Reader] = {
    "gptq": Gptq(),
    "awq": Awq(),
    "compressed-tensors": CompressedTensors(),
    "fp8": Fp8(),
    "fbgemm_fp8": Fp8(),
    "modelopt": ModelOpt(),
    "bitsandbytes": Bitsandbytes(),
    "mxfp4": Mxfp4(),
}
_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".input_scale_ub", ".activation_scale",
    ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
"""How the names of tensors end that scale what a layer reads or keeps in its cache: both are not quantised here."""


def unread(statement: Statement) -> str | None:
    """The method with its details, as a refusal says them, if it is not read; None if it is."""
    said = details(statement.values)
    named = f"{statement.method}{f' ({said})' if said else ''}"
    if statement.method not in _READERS:
        return named
    why = _READERS[statement.method].unread(statement.values)
    return None if why is None else f"{named} {why}".rstrip()


def recognise(
    statements: Sequence[Statement], config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> dict[str, Entry]:
    """The tensors, with a PackedEntry for each quantised weight in place of its parts. Those of a method that is not
    read stay as they are.

    Raises:
        CheckpointError: the parts of a weight are not those of the method, as far as their types and shapes tell.
    """
    if not statements or any(unread(statement) is not None for statement in statements):
        return dict(tensors)
    packed: dict[str, PackedEntry] = {}
    unneeded = {name for name in tensors if name.endswith(_ACTIVATIONS)}
    for statement in statements:
        try:
            for found in _READERS[statement.method].find(statement.values, tensors):
                if found.name not in packed:
                    packed[found.name] = _entry(found, config)
                    unneeded.update(found.unneeded)
        except CheckpointError as error:
            said = details(statement.values)
            raise CheckpointError(
                f"{_folder(tensors)} is quantised with {statement.method}{f' ({said})' if said else ''}, but {error}"
            ) from error
    replaced = {part.name: name for name, entry in packed.items() for part in entry.parts.values()}
    result: dict[str, Entry] = {}
    for name, entry in tensors.items():
        whole = replaced.get(name)
        if whole is not None:
            result[whole] = packed[whole]
        elif name not in unneeded:
            result[name] = entry
    return result


def _entry(found: Found, config: Mapping[str, Any]) -> PackedEntry:
    """CheckpointError if the parts do not fit."""
    packing = Packing(found.method, found.settings, found.shape, _dtype(found, config))
    try:
        check(packing, {role: (part.dtype, part.shape) for role, part in found.parts.items()})
    except CheckpointError as error:
        raise CheckpointError(
            f"{found.name} {list(found.shape)} does not fit that: {error}; the config and the weights are of different "
            "models, or damaged"
        ) from error
    return PackedEntry(found.name, packing, found.parts)


def _dtype(found: Found, config: Mapping[str, Any]) -> str:
    """What config.json says the weights are; else the type of their scales, or bfloat16."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        named = part.get("dtype") or part.get("torch_dtype")
        if named in WIDE:
            return str(named)
    scales = [part.dtype for role, part in found.parts.items() if "scale" in role and part.dtype in WIDE]
    return scales[0] if scales else "bfloat16"


def _folder(tensors: Mapping[str, TensorEntry]) -> str:
    return str(next(iter(tensors.values())).file.parent)
