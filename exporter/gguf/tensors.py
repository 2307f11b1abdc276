"""The tensors of a .gguf file as transformers' model has them: names, layout and dequantised values."""

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
from numpy.typing import NDArray
from stageline.exporter.gguf.rotary import TENSORS as ROTARY
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.models.tensors import TensorEntry
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    LlamaTensorProcessor,
    Qwen2MoeTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # what the rotary base gives; llama.cpp does not read it
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
_CHUNK_BYTES = 16 * 1024**2
_name_map = lru_cache(maxsize=4)(gguf.get_tensor_name_map)


class MixtralTensorProcessor(Qwen2MoeTensorProcessor):  # type: ignore[misc]
    """llama.cpp's order of rotated dimensions, and experts in one tensor for each projection."""

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        ordered = LlamaTensorProcessor(self.config).process(weights, name).weights
        return super().process(ordered, name, **kwargs)


class GgufTensors:
    """The tensors of a checkpoint that a model takes. `names` maps each parameter to the tensor that it is made of: the
    first, if it is made of several."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """ExportError if the model has no place for a tensor, or the file no tensor for a parameter."""
        self._checkpoint = checkpoint
        self._parameter_of = _parameters_of(checkpoint, model)
        self._processor = _processor(checkpoint, model)
        self._sources: dict[str, list[str]] = {}
        for tensor, parameter in self._parameter_of.items():
            self._sources.setdefault(parameter, []).append(tensor)
        _account(checkpoint, model, self._parameter_of)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.names = self._names(model)

    def read(self, tensor: str) -> NDArray[np.float32]:
        """The values of the parameter that is made of this tensor, in transformers' layout."""
        parameter = self._parameter_of[tensor]
        merged: dict[str, Any] = {}
        for source in self._sources[parameter]:
            result = self._processor.process(
                weights=dequantised(self._checkpoint.stored[source]),
                name=source,
                **self._about(merged),
            )
        values = np.asarray(merged.get(parameter, result.weights))
        if values.shape != self._shapes[parameter]:
            raise ExportError(
                f"{self._checkpoint.path}: tensor {tensor} becomes {list(values.shape)}, but {parameter} is "
                f"{list(self._shapes[parameter])} by the metadata; the file is damaged or was converted wrongly"
            )
        return values

    def packed_rows(self, tensor: str) -> "PackedRows | None":
        """The rows of a quantised matrix as they lie in the file, in transformers' order; None for other tensors, and
        where transformers makes its parameter of it in another way than by moving rows."""
        entry, parameter = self._checkpoint.stored[tensor], self._parameter_of[tensor]
        if entry.dtype in _FLOATING or len(entry.shape) != 2 or self._sources[parameter] != [tensor]:
            return None
        count, shown = entry.shape[0], min(2, entry.shape[1])
        marks = (np.arange(count)[:, None] * shown + np.arange(shown)).astype(np.float64)
        try:
            moved = np.asarray(self._processor.process(weights=marks, name=tensor, **self._about({})).weights)
        except (ValueError, RuntimeError, IndexError, TypeError):  # it looks at more than rows
            return None
        if moved.shape != marks.shape or self._shapes[parameter] != entry.shape:
            return None
        order = moved[:, 0].astype(np.int64) // shown
        if not np.array_equal(moved, marks[order.clip(0, count - 1)]) or not np.array_equal(
            np.sort(order), np.arange(count)
        ):
            return None
        return PackedRows(entry, order)

    def _about(self, merged: dict[str, Any]) -> dict[str, Any]:
        mapping = {name.removesuffix(".weight"): p for name, p in self._parameter_of.items()}
        return {"tensor_key_mapping": mapping, "parsed_parameters": {"tensors": merged}}

    def _names(self, model: Any) -> dict[str, str]:
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        found = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            source = next((alias for alias in (name, *tied[id(parameter)]) if alias in self._sources), None)
            if source is None:
                raise ExportError(
                    f"{self._checkpoint.path} has no tensor for {name} of {type(model).__name__}; "
                    "export the Hugging Face checkpoint that the file was made of"
                )
            held = sum(math.prod(self._checkpoint.tensors[tensor].shape) for tensor in self._sources[source])
            if held != parameter.numel():
                raise ExportError(
                    f"{self._checkpoint.path}: {' and '.join(self._sources[source])} hold {held:,} values, {name} has "
                    f"{parameter.numel():,} by the metadata; the file is damaged or was converted wrongly"
                )
            found[name] = self._sources[source][0]
        return found


@dataclass(frozen=True)
class PackedRows:
    """The rows of a quantised tensor in another order: row i is row `order[i]` of the file."""

    entry: TensorEntry
    order: NDArray[np.int64]

    @property
    def type(self) -> str:
        """gguf's name of the quantisation."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and bytes of each."""
        count = len(self.order)
        return count, self.entry.size_bytes // count

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, a few megabytes at a time."""
        data = np.memmap(self.entry.file, np.uint8, "r", self.entry.offset, self.shape)
        step = max(1, _CHUNK_BYTES // self.shape[1])
        for first in range(0, len(self.order), step):
            yield data[self.order[first : first + step]].reshape(-1).data


def check_types(checkpoint: Checkpoint) -> None:
    """ExportError if the file has a tensor of a type that gguf cannot dequantise, before anything takes time."""
    seen: set[str] = set()
    for entry in checkpoint.stored.values():
        if entry.dtype not in seen:
            seen.add(entry.dtype)
            kind = gguf.GGMLQuantizationType[entry.dtype]
            _dequantise(entry, np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8))


def dequantised(entry: TensorEntry) -> NDArray[np.float32]:
    """The tensor's values. ExportError if gguf cannot dequantise its type."""
    data = np.memmap(entry.file, mode="r", offset=entry.offset, shape=(entry.size_bytes,))
    return _dequantise(entry, data).reshape(entry.shape)


def _dequantise(entry: TensorEntry, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    try:
        return np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType[entry.dtype]))
    except NotImplementedError as error:
        raise ExportError(
            f"{entry.file}: tensor {entry.name} has type {entry.dtype}, which gguf cannot dequantise; "
            "convert the model to another type, such as Q8_0"
        ) from error


def _processor(checkpoint: Checkpoint, model: Any) -> Any:
    """What turns a tensor of llama.cpp's layout into transformers'."""
    kind = checkpoint.config["general.architecture"]
    made = MixtralTensorProcessor if model.config.model_type == "mixtral" else TENSOR_PROCESSORS.get(kind)
    return (made or TensorProcessor)(config=model.config.to_dict())


def _parameters_of(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """The parameter that each tensor is for, or is a part of; without the tensors that are for none."""
    # transformers builds the table of names once for each module of the model (10 s for 30 layers)
    with patch.object(gguf, "get_tensor_name_map", _name_map):
        names = get_gguf_hf_weights_map(
            model, _processor(checkpoint, model), model_type=checkpoint.config["general.architecture"]
        )
    found = {tensor: names.get(tensor) or names.get(tensor.removesuffix(".weight")) for tensor in checkpoint.tensors}
    return {tensor: parameter for tensor, parameter in found.items() if parameter is not None}


def _account(checkpoint: Checkpoint, model: Any, used: Container[str]) -> None:
    """ExportError for a tensor that the model does not take and that follows from nothing else."""
    for tensor, entry in checkpoint.tensors.items():
        head = tensor.startswith("output.") and model.get_output_embeddings() is None  # the task has no use for it
        if tensor in used or tensor in ROTARY or head or _UNUSED.fullmatch(tensor):
            continue
        raise ExportError(
            f"{checkpoint.path}: {type(model).__name__} has no place for tensor {tensor} ({entry.dtype}, "
            f"{list(entry.shape)}); export the Hugging Face checkpoint that the file was made of"
        )
