"""Bringing the checkpoint's weights into a bundle: placed as they are if they need no change, else streamed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from stageline.exporter.gguf.tensors import GgufTensors
from stageline.exporter.standard_names import folder_for_transformers
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError, ExportError
from stageline.models.place_file import place_file
from stageline.models.safetensors_file import header_sha256, write_streaming
from stageline.models.tensors import TensorEntry
from stageline.runtime.bundle.folder import HASH_LIMIT_BYTES, file_sha256
from stageline.runtime.bundle.graph import ir_dtype
from stageline.runtime.bundle.manifest import FileEntry
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

FOLDER = "weights"
_FLOATING = frozenset({"float32", "float16", "bfloat16"})
_GGUF_FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Weights:
    """Where each of the model's tensors comes from. `names` maps a parameter or buffer to a checkpoint's tensor."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    converted: bool  # whether transformers has to merge or split tensors to get the model's


def find(checkpoint: Checkpoint, model: Any) -> Weights:
    """Match the model's tensors with the checkpoint's, as transformers would load them.

    ExportError if one is missing or has another shape.
    """
    if checkpoint.kind == "gguf":
        return Weights(checkpoint, GgufTensors(checkpoint, model).names, converted=False)
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    names: dict[str, str] = {}
    converted = False
    for name in checkpoint.tensors:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and name not in state:
            converted = True
        names.setdefault(renamed, name)
        if name in state:
            names[name] = name
    if converted:
        return Weights(checkpoint, {name: name for name in state}, converted=True)
    return Weights(checkpoint, _checked(checkpoint, model, names), converted=False)


def _checked(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Names for every parameter and for the buffers that the checkpoint holds; parameters tied together share one."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = next((names[alias] for alias in (name, *tied[id(parameter)]) if alias in names), None)
        if source is None:
            raise ExportError(
                f"{checkpoint.path} has no tensor for {name} of {type(model).__name__} (it holds "
                f"{len(checkpoint.tensors)} tensors); choose the --task, or bring the config.json, it was saved for"
            )
        if checkpoint.tensors[source].shape != tuple(parameter.shape):
            raise ExportError(
                f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.tensors[source].shape)} but "
                f"config.json makes it {list(parameter.shape)}; the config and the weights are of different models"
            )
        found[name] = source
    kept = model.state_dict().keys()  # transformers ignores a stored tensor for a buffer that is not
    for name, buffer in model.named_buffers():
        if name in kept and name in names and checkpoint.tensors[names[name]].shape == tuple(buffer.shape):
            found[name] = names[name]
    return found


def majority_dtype(checkpoint: Checkpoint) -> str:
    """The floating dtype that most bytes of the checkpoint have; float32 if most are quantised."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        dtype = _GGUF_FLOATING.get(entry.dtype, entry.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + entry.size_bytes
    if checkpoint.kind == "safetensors":
        sizes = {dtype: size for dtype, size in sizes.items() if dtype in _FLOATING}
    most = max(sizes, key=sizes.__getitem__, default="float32")
    return most if most in _FLOATING else "float32"


@dataclass(frozen=True)
class _Order:
    """What to write, and where: every floating tensor with `dtype`, into the folder `target`."""

    weights: Weights
    model: Any
    config: Any
    dtype: str
    target: Path

    def write(self, tensors: list[tuple[str, str, tuple[int, ...]]], data: Callable[[str], Iterable[Any]]) -> FileEntry:
        """Write one file of `tensors` (name, dtype, shape), whose `data` are asked for one by one."""
        file = self.target / "model.safetensors"
        return _entry(file, write_streaming(file, tensors, data))


def place(weights: Weights, model: Any, config: Any, dtype: str, folder: Path) -> list[FileEntry]:
    """Put the weights into `folder`/weights with `dtype` for every floating tensor, and return the files' entries.

    Links keep the few tensors that have another dtype: the stages cast them.
    """
    target = folder / FOLDER
    target.mkdir()
    return _WAYS[_way(weights, dtype)](_Order(weights, model, config, dtype, target))


def _way(weights: Weights, dtype: str) -> Literal["link", "convert", "dequantise", "materialise"]:
    checkpoint = weights.checkpoint
    if weights.converted:
        return "materialise"
    if checkpoint.kind == "gguf":
        return "dequantise"
    floating = {checkpoint.tensors[name].dtype for name in weights.names.values()} & _FLOATING
    return "link" if floating <= {dtype} or majority_dtype(checkpoint) == dtype else "convert"


def _link(order: _Order) -> list[FileEntry]:
    """Place the files as they are. Beyond HASH_LIMIT_BYTES they are linked and not hashed, so that no byte is read.

    The others are copied where no reflink can be made: onnx refuses weights in a file with several hard links
    (onnx.load, onnx.checker), and copying takes less time than hashing.
    """
    tensors = order.weights.checkpoint.tensors
    files = sorted({tensors[name].file for name in order.weights.names.values()})
    hashed = sum(file.stat().st_size for file in files) <= HASH_LIMIT_BYTES
    entries = []
    for file in files:
        copy = order.target / file.name
        place_file(file, copy, link=not hashed)
        entries.append(_entry(copy, file_sha256(copy) if hashed else None))
    return entries


def _convert(order: _Order) -> list[FileEntry]:
    """Copy the tensors that the model takes, the floating ones in another dtype, a few megabytes at a time."""
    tensors = order.weights.checkpoint.tensors
    entries = {name: tensors[name] for name in sorted(set(order.weights.names.values()))}
    dtypes = {name: order.dtype if entry.dtype in _FLOATING else entry.dtype for name, entry in entries.items()}
    specs = [(name, dtypes[name], entry.shape) for name, entry in entries.items()]
    return [order.write(specs, lambda name: _converted_chunks(entries[name], dtypes[name]))]


def _dequantise(order: _Order) -> list[FileEntry]:
    """Write a .gguf file's tensors as floating ones, in transformers' layout."""
    names = order.weights.names
    tensors = dict([*order.model.named_parameters(), *order.model.named_buffers()])
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in tensors.items() if name in names}
    read = GgufTensors(order.weights.checkpoint, order.model).read
    specs = [(name, order.dtype, shape) for name, shape in shapes.items()]
    return [order.write(specs, lambda name: [_as(read(name), order.dtype)])]


def _materialise(order: _Order) -> list[FileEntry]:
    """Let transformers load the model, merging or splitting tensors as it does, and write what it got."""
    with folder_for_transformers(order.weights.checkpoint) as folder:
        model = type(order.model).from_pretrained(
            folder,
            config=order.config,
            dtype=getattr(torch, order.dtype),
            attn_implementation="eager",  # the config still names the attention of the trace
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    specs = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()]
    return [
        order.write(specs, lambda name: [memoryview(state[name].contiguous().view(torch.uint8).numpy().reshape(-1))])
    ]


def linked_note(folder: Path, entries: Sequence[FileEntry]) -> list[str]:
    """What a user should know if weight files of the bundle in `folder` are hard links."""
    linked = sum(entry.size_bytes for entry in entries if (folder / entry.path).stat().st_nlink > 1)
    if not linked:
        return []
    return [
        f"{linked / 1e9:.1f} GB of weights are hard links to the checkpoint's files, which onnx.load and onnx.checker "
        "refuse; let them open a copy of the bundle (cp -r)"
    ]


_WAYS = {"link": _link, "convert": _convert, "dequantise": _dequantise, "materialise": _materialise}


def _entry(file: Path, sha256: str | None) -> FileEntry:
    return FileEntry(
        path=f"{FOLDER}/{file.name}",
        size_bytes=file.stat().st_size,
        sha256=sha256,
        header_sha256=None if sha256 else header_sha256(file),
    )


def _as(array: Any, dtype: str) -> memoryview:
    return np.ascontiguousarray(array).astype(ir_dtype(dtype).numpy(), copy=False).view(np.uint8).reshape(-1).data


def _converted_chunks(entry: TensorEntry, dtype: str) -> Iterator[memoryview]:
    """The tensor's data in another dtype, a few megabytes at a time."""
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        left = entry.size_bytes
        while left:
            data = file.read(min(left, _CHUNK_BYTES))
            if not data:
                raise CheckpointError(f"{entry.file} ends inside tensor {entry.name}; download it again")
            left -= len(data)
            yield _as(np.frombuffer(data, ir_dtype(entry.dtype).numpy()), dtype)
