"""compressed-tensors: whole numbers in words or bytes, floats of 8 and 4 bits, scaled by tensor, row, group, block."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing import grouped, scaled
from stageline.models.packing.base import Found, Groups, Parts, check_part
from stageline.models.packing.bits import unpack_columns, unpack_rows
from stageline.models.packing.floats import E2M1, EIGHT_BITS, WIDE, of_pairs, power_of_two, widen
from stageline.models.tensors import Packing, TensorEntry

_WORDS, _BYTES, _FP8 = "pack-quantized", "int-quantized", "float-quantized"
_NVFP4, _MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_FORMATS = (_WORDS, _BYTES, _FP8, _NVFP4, _MXFP4, "naive-quantized", "mixed-precision")
_FP4_GROUP = {_NVFP4: 16, _MXFP4: 32}
_ROLES = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")


class CompressedTensors:
    """`settings`: format; of whole numbers bits; block_rows and block_columns, the weight's rows and columns that have
    a scale together (-1: all). Parts, for N outputs, K inputs:

        pack-quantized         weight_packed int32 [N, words], numbers less -2**(bits - 1), the lowest bits first
        int-quantized          weight int8 [N, K]
        float-quantized        weight float8 [N, K]
        nvfp4-, mxfp4-...      weight_packed uint8 [N, K / 2], the low half of a byte first
        weight_scale           a number for each block; of MXFP4 uint8, the exponent of two plus 127
        weight_zero_point      as many, where they are not 0; packed as the weights are, along the outputs
        weight_global_scale    of NVFP4, by which the scales are divided
        weight_g_idx int32 [K] the group of each input; -1: they follow each other

        weight = (number - zero) * scale
    """

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit the format, the bits and the weight's shape."""
        outputs, inputs = grouped.sides(packing)
        kind = packing.settings.get("format")
        grid = scaled.grid(packing)
        if kind == _WORDS:
            bits = grouped.bits_of(packing, range(2, 9))
            check_part(parts, "weight_packed", "int32", (outputs, -(-inputs * bits // 32)))
            scaled.check_scale(parts, "weight_scale", WIDE, grid)
            if grid[0] == outputs and "weight_zero_point" in parts:  # of rows and groups they are packed
                check_part(parts, "weight_zero_point", "int32", (-(-outputs * bits // 32), grid[1]))
            elif "weight_zero_point" in parts:
                scaled.check_scale(parts, "weight_zero_point", ("int8",), grid)
        elif kind == _BYTES:
            grouped.bits_of(packing, range(2, 9))
            check_part(parts, "weight", "int8", (outputs, inputs))
            scaled.check_scale(parts, "weight_scale", WIDE, grid)
            if "weight_zero_point" in parts:
                scaled.check_scale(parts, "weight_zero_point", ("int8",), grid)
        elif kind == _FP8:
            check_part(parts, "weight", EIGHT_BITS, (outputs, inputs))
            scaled.check_scale(parts, "weight_scale", (*WIDE, "uint8"), grid)
        elif kind in _FP4_GROUP:
            check_part(parts, "weight_packed", "uint8", (outputs, inputs // 2))
            scales = (outputs, inputs // _FP4_GROUP[kind])
            check_part(parts, "weight_scale", "float8_e4m3fn" if kind == _NVFP4 else "uint8", scales)
            if kind == _NVFP4:
                scaled.check_scale(parts, "weight_global_scale", WIDE, (1, 1))
        else:
            raise CheckpointError(f"it has the format {kind!r}, read are {', '.join(_FORMATS[:5])}")
        if "weight_g_idx" in parts:
            check_part(parts, "weight_g_idx", ("int32", "int64"), (inputs,))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """Whole numbers with whole zero points; None of floats, or of groups of different sizes."""
        if packing.settings["format"] not in (_WORDS, _BYTES):
            return None
        return grouped.ordered(self._whole(packing, arrays), _group_of(arrays))

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """(number - zero) * scale."""
        kind = packing.settings["format"]
        if kind in (_WORDS, _BYTES):
            return grouped.weight(self._whole(packing, arrays), _group_of(arrays))
        if kind == _FP8:
            scale = arrays["weight_scale"]
            scales = power_of_two(scale) if scale.dtype == np.uint8 else widen(scale)
            return scaled.weight(lambda rows: widen(arrays["weight"][rows]), *scaled.by_row(packing, scales))
        if kind == _NVFP4:
            scales = widen(arrays["weight_scale"]) / widen(arrays["weight_global_scale"]).reshape(())
        else:
            scales = power_of_two(arrays["weight_scale"])
        packed = arrays["weight_packed"]
        return scaled.weight(lambda rows: of_pairs(packed[rows], E2M1, high_first=False), scales, _FP4_GROUP[str(kind)])

    def _whole(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> grouped.Unpacked:
        """The numbers plus 2**(bits - 1), so that they are not negative."""
        outputs, inputs = packing.shape
        bits = int(packing.settings["bits"])
        half = 1 << bits - 1
        scales, group = scaled.by_row(packing, widen(arrays["weight_scale"]))
        if packing.settings["format"] == _WORDS:
            values = unpack_rows(arrays["weight_packed"], bits, inputs)
        else:
            values = _not_negative(arrays["weight"], bits, "weight")
        stored = arrays.get("weight_zero_point")
        if stored is None:
            zeros = np.full(scales.shape, half, np.uint8)
        elif stored.dtype == np.int8:
            zeros = scaled.by_row(packing, _not_negative(stored, bits, "weight_zero_point"))[0]
        else:
            zeros = np.ascontiguousarray(unpack_columns(stored, bits, outputs).T)
        return grouped.Unpacked(values, bits, group, scales, zeros)

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """Formats that are not read, sparse weights, and transforms of the activations."""
        if stated.get("transform_config"):
            return "with transforms"
        sparse = stated.get("sparsity_config")
        if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
            return "and sparse"
        schemes = stated.get("config_groups")
        if not isinstance(schemes, dict) or not all(isinstance(scheme, dict) for scheme in schemes.values()):
            return "without config_groups"
        for scheme in schemes.values():
            kind = scheme.get("format") or stated.get("format")
            if kind not in _FORMATS:
                return ""
            if not isinstance(scheme.get("weights"), dict):
                return "without quantised weights"
            targets = scheme.get("targets") or []
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                return "with targets that are no names"
        return None

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each `.weight_packed`, and each `.weight` that has a scale, with what is beside it."""
        for stem, parts in grouped.beside(tensors, ".weight_packed", _ROLES):
            scheme = _scheme(stated, stem)
            if parts["weight_packed"].dtype == "int32":
                shape = _stored_shape(stem, parts)
                settings: dict[str, int | str] = {"format": _WORDS, "bits": scheme.get("num_bits", 8), **_block(scheme)}
            else:
                rows, half = grouped.matrix(parts, "weight_packed")
                kind = _NVFP4 if "weight_global_scale" in parts else _MXFP4
                shape, settings = (rows, 2 * half), {"format": kind, "block_rows": 1, "block_columns": _FP4_GROUP[kind]}
            yield _found(stem, shape, settings, parts)
        for stem, parts in grouped.beside(tensors, ".weight", _ROLES):
            if "weight_scale" in parts:
                shape = grouped.matrix(parts, "weight")
                scheme = _scheme(stated, stem)
                if parts["weight"].dtype == "int8":
                    settings = {"format": _BYTES, "bits": scheme.get("num_bits", 8), **_block(scheme)}
                else:
                    settings = {"format": _FP8, **_block(scheme)}
                yield _found(stem, shape, settings, parts)


def _found(
    stem: str, shape: tuple[int, int], settings: Mapping[str, int | str], parts: dict[str, TensorEntry]
) -> Found:
    stored_shape = parts.pop("weight_shape", None)
    return Found(
        "compressed-tensors", f"{stem}.weight", shape, settings, parts, (stored_shape.name,) if stored_shape else ()
    )


def _scheme(stated: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """What the config states of the weights of a module: by a group that targets its name, else one that targets a
    class of modules."""
    targets = [
        (target, scheme["weights"])
        for scheme in stated["config_groups"].values()
        for target in scheme.get("targets") or ()
    ]
    for target, weights in targets:
        try:
            named = re.match(target[3:], stem) if target.startswith("re:") else target == stem
        except re.error as error:
            raise CheckpointError(f"{target!r} of its config_groups is no pattern: {error}") from error
        if named:
            return dict(weights)
    for target, weights in targets:
        if not target.startswith("re:") and "." not in target:
            return dict(weights)
    raise CheckpointError(f"no group of its config_groups targets {stem}")


def _block(scheme: Mapping[str, Any]) -> dict[str, int]:
    """Rows and columns that have a scale together, by the strategy."""
    group = scheme.get("group_size")
    block = scheme.get("block_structure")
    strategy = scheme.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        return {"block_rows": block[0], "block_columns": block[1]}
    if strategy in ("group", "tensor_group") and isinstance(group, int):
        return {"block_rows": 1, "block_columns": group}
    if strategy in ("channel", "tensor"):
        return {"block_rows": 1 if strategy == "channel" else -1, "block_columns": -1}
    raise CheckpointError(f"its strategy {strategy!r} (group_size {group}, block_structure {block}) is not known")


def _stored_shape(stem: str, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
    """The weight's shape, which words do not tell to the last number: read from the file, 16 bytes."""
    entry = parts.get("weight_shape")
    if entry is None or entry.dtype not in ("int32", "int64") or entry.shape != (2,):
        raise CheckpointError(f"{stem}.weight_shape, two whole numbers, is missing")
    rows, columns = np.fromfile(entry.file, entry.dtype, 2, offset=entry.offset).tolist()
    return rows, columns


def _group_of(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The group of each input; None where it is written as -1: they follow each other."""
    found = arrays.get("weight_g_idx")
    return None if found is None or (found == -1).any() else found


def _not_negative(numbers: NDArray[Any], bits: int, what: str) -> NDArray[np.uint8]:
    """int8 plus 2**(bits - 1). CheckpointError if a number has more bits."""
    half = 1 << bits - 1
    if bits < 8 and numbers.size and not -half <= numbers.min() <= numbers.max() < half:
        raise CheckpointError(
            f"its {what} holds {numbers.min()} to {numbers.max()}, which are not of {bits} bits; "
            "correct num_bits in config.json"
        )
    return numbers.view(np.uint8) + np.uint8(half)
