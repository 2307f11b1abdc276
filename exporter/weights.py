"""Bringing the checkpoint's weights into a bundle: placed as they are if they need no change, else streamed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from stageline.exporter.gguf.tensors import GgufTensors
from stageline.exporter.matching import TensorsError, match, missing_error
from stageline.exporter.narrowing import Narrowing, stored_bytes
from stageline.exporter.quantise.nearest import Scheme
from stageline.exporter.quantise.streaming import quantised
from stageline.exporter.standard_names import folder_for_transformers
from stageline.models.checkpoint import Checkpoint
from stageline.models.packing import dequantised, read
from stageline.models.place_file import place_file
from stageline.models.safetensors_file import header_sha256, write_streaming
from stageline.models.tensors import Entry, PackedEntry, Packing, TensorEntry
from stageline.runtime.bundle.folder import HASH_LIMIT_BYTES, file_sha256
from stageline.runtime.bundle.manifest import FileEntry, PackedWeight
from transformers.core_model_loading import build_glob_alternation

FOLDER = "weights"
_FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})
_OURS = _FLOATING - {"float64"}  # what a bundle's weights may have
GGUF_FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types of a .gguf that are not quantised, and their NumPy names."""


@dataclass(frozen=True)
class Weights:
    """Where each of the model's tensors comes from. `names` maps a parameter or buffer to a checkpoint's tensor."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    converted: bool  # whether transformers has to merge or split tensors to get the model's
    missing: frozenset[str] = frozenset()  # the model's tensors that have no source
    notes: tuple[str, ...] = ()  # what a user should know of the match


def find(checkpoint: Checkpoint, model: Any) -> Weights:
    """Match the model's tensors with the checkpoint's, as transformers would load them.

    ExportError if they do not fit each other.
    """
    if checkpoint.kind == "gguf":
        return Weights(checkpoint, GgufTensors(checkpoint, model).names, converted=False)
    matched = match(checkpoint, model)
    return Weights(checkpoint, matched.names, matched.converted, matched.missing, matched.notes)


def majority_dtype(checkpoint: Checkpoint) -> str:
    """The floating dtype that most bytes of the checkpoint have; float32 if most are quantised."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        dtype = GGUF_FLOATING.get(entry.dtype, entry.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + entry.size_bytes
    if checkpoint.kind == "safetensors":
        sizes = {dtype: size for dtype, size in sizes.items() if dtype in _OURS}
    most = max(sizes, key=sizes.__getitem__, default="float32")
    return most if most in _OURS else "float32"


@dataclass(frozen=True)
class Placed:
    """The weight files of a bundle, and its packed weights by name."""

    files: list[FileEntry]
    packed: dict[str, PackedWeight] = field(default_factory=dict)


@dataclass(frozen=True)
class _Order:
    """What to write, and where: every floating tensor with `narrowing.dtype`, into the folder `target`. `keep`: packed
    weights as they are; else unpacked, as floating ones. `schemes`: how floating tensors are quantised, by name."""

    weights: Weights
    model: Any
    narrowing: Narrowing
    target: Path
    keep: bool
    schemes: Mapping[str, Scheme]

    @property
    def sources(self) -> dict[str, Entry]:
        """The checkpoint's tensors that the model takes."""
        tensors = self.weights.checkpoint.tensors
        return {name: tensors[name] for name in sorted(set(self.weights.names.values()))}

    @property
    def packed(self) -> dict[str, PackedEntry]:
        """Those of them that stay packed."""
        return {n: entry for n, entry in self.sources.items() if self.keep and isinstance(entry, PackedEntry)}

    def write(self, tensors: list[tuple[str, str, tuple[int, ...]]], data: Callable[[str], Iterable[Any]]) -> Placed:
        """Write one file of `tensors` (name, dtype, shape), whose `data` are asked for one by one, those that have a
        scheme quantised."""
        file = self.target / "model.safetensors"
        tensors, data, packed = quantised(self.schemes, tensors, data)
        entry = _entry(file, write_streaming(file, tensors, data))
        return Placed([entry], {name: _packed_weight(packing, parts) for name, (packing, parts) in packed.items()})


def place(
    weights: Weights,
    model: Any,
    dtype: str,
    folder: Path,
    notes: list[str],
    keep: bool = True,
    schemes: Mapping[str, Scheme] = MappingProxyType({}),
) -> Placed:
    """Put the weights into `folder`/weights with `dtype` for every floating tensor; quantised ones stay packed as they
    are with `keep`. Tensors with a scheme are quantised.

    Links keep the few tensors that have another dtype: the stages cast them. What a user should know of the values is
    added to `notes`. ExportError if values do not fit into `dtype`.
    """
    target = folder / FOLDER
    target.mkdir()
    narrowing = Narrowing(weights.checkpoint.path, dtype)
    order = _Order(weights, model, narrowing, target, keep, schemes)
    placed = _WAYS[_way(order)](order)
    notes += narrowing.check()
    return placed


def _way(order: _Order) -> Literal["link", "convert", "gguf", "materialise"]:
    weights, dtype = order.weights, order.narrowing.dtype
    checkpoint = weights.checkpoint
    if weights.converted:
        return "materialise"
    if checkpoint.kind == "gguf":
        return "gguf"
    plain = {name: entry for name, entry in order.sources.items() if name not in order.packed}
    if any(isinstance(entry, PackedEntry) for entry in plain.values()):
        return "convert"
    floating = {entry.dtype for entry in plain.values()} & _FLOATING
    if order.schemes or "float64" in floating:  # some engines have no such type to cast from
        return "convert"
    return "link" if floating <= {dtype} or majority_dtype(checkpoint) == dtype else "convert"


def _look_at_others(order: _Order) -> None:
    """Count what the floating tensors of another dtype lose when they are cast later on."""
    checkpoint = order.weights.checkpoint
    used = checkpoint.stored.values() if order.weights.converted else order.sources.values()
    for entry in used:
        if isinstance(entry, TensorEntry) and entry.dtype in _FLOATING - {order.narrowing.dtype}:
            order.narrowing.look_at(entry)


def _link(order: _Order) -> Placed:
    """Place the files as they are. Beyond HASH_LIMIT_BYTES they are linked and not hashed, so that no byte is read.

    The others are copied where no reflink can be made: onnx refuses weights in a file with several hard links
    (onnx.load, onnx.checker), and copying takes less time than hashing.
    """
    _look_at_others(order)
    files = sorted({part.file for entry in order.sources.values() for part in _parts(entry).values()})
    hashed = sum(file.stat().st_size for file in files) <= HASH_LIMIT_BYTES
    entries = []
    names = [file.name for file in files]
    for number, file in enumerate(files):  # shards may be in folders of their own, under one name
        copy = order.target / (file.name if names.count(file.name) == 1 else f"{number:05}-{file.name}")
        place_file(file, copy, link=not hashed)
        entries.append(_entry(copy, file_sha256(copy) if hashed else None))
    return Placed(entries, {name: _described(entry) for name, entry in order.packed.items()})


def _convert(order: _Order) -> Placed:
    """Copy the tensors that the model takes, the floating ones in another dtype, a few megabytes at a time."""
    entries, kept = order.sources, order.packed
    ways = dict.fromkeys(entries, order.narrowing)
    names = order.weights.names
    for name in {names[wide] for wide in kept_wide(order.model, order.narrowing.dtype, names)}:
        entry = entries[name]
        if isinstance(entry, TensorEntry):
            order.narrowing.look_at(entry)  # the stages cast it
            ways[name] = Narrowing(order.narrowing.path, "float32")
    parts = {part.name: part for entry in kept.values() for part in entry.parts.values()}
    specs = [
        (name, ways[name].dtype if entry.dtype in _FLOATING else entry.dtype, entry.shape)
        for name, entry in entries.items()
        if name not in kept
    ] + [(part.name, part.dtype, part.shape) for part in parts.values()]

    def chunks(name: str) -> Iterable[Any]:
        if name in parts:
            return stored_bytes(parts[name])
        entry = entries[name]
        if isinstance(entry, PackedEntry):
            return [ways[name].converted(name, dequantised(entry.packing, read(entry)))]
        return ways[name].chunks(entry)

    placed = order.write(specs, chunks)
    return Placed(placed.files, {**placed.packed, **{name: _described(entry) for name, entry in kept.items()}})


def _parts(entry: Entry) -> Mapping[str, TensorEntry]:
    return entry.parts if isinstance(entry, PackedEntry) else {"": entry}


def _described(entry: PackedEntry) -> PackedWeight:
    """What the manifest says of it: its parts keep their names."""
    return _packed_weight(entry.packing, {role: part.name for role, part in entry.parts.items()})


def _packed_weight(packing: Packing, parts: dict[str, str]) -> PackedWeight:
    return PackedWeight(
        method=packing.method,
        settings=dict(packing.settings),
        shape=packing.shape,
        dtype=packing.dtype,  # type: ignore[arg-type]
        parts=parts,
    )


def kept_wide(model: Any, dtype: str, names: Iterable[str]) -> set[str]:
    """Those of the model's tensors that transformers keeps in float32, whatever the dtype: routers' biases, for
    example."""
    plan = model._get_dtype_plan(getattr(torch, dtype))
    if not plan:
        return set()
    pattern, *_ = build_glob_alternation(list(plan))
    return {name for name in names if pattern.search(name)}


def _gguf(order: _Order) -> Placed:
    """Write a .gguf file's tensors in transformers' layout: packed ones as bytes [rows, bytes of a row], the others as
    floating ones."""
    names = order.weights.names
    tensors = dict([*order.model.named_parameters(remove_duplicate=False), *order.model.named_buffers()])
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in tensors.items() if name in names}
    held = GgufTensors(order.weights.checkpoint, order.model)
    rows = {name: found for name in shapes if order.keep and (found := held.packed_rows(name)) is not None}
    packed = {
        name: _packed_weight(
            Packing("gguf", {"type": found.type}, shapes[name], order.narrowing.dtype), {"blocks": name}
        )
        for name, found in rows.items()
    }
    specs = [
        (name, "uint8", rows[name].shape) if name in rows else (name, order.narrowing.dtype, shape)
        for name, shape in shapes.items()
    ]

    def data(name: str) -> Iterable[Any]:
        return rows[name].chunks() if name in rows else [order.narrowing.converted(name, held.read(name))]

    placed = order.write(specs, data)
    return Placed(placed.files, {**placed.packed, **packed})


def _materialise(order: _Order) -> Placed:
    """Let transformers load the model, merging or splitting tensors as it does, and write what it got."""
    for entry in order.weights.checkpoint.tensors.values():
        if isinstance(entry, PackedEntry):
            raise TensorsError(
                f"{order.weights.checkpoint.path} is quantised ({entry.packing.method}), and its tensors have to be "
                f"merged into those of {type(order.model).__name__}, which is not supported; export the checkpoint "
                "that it was made of"
            )
    _look_at_others(order)
    try:
        with folder_for_transformers(order.weights.checkpoint) as folder:
            model, found = type(order.model).from_pretrained(
                folder,
                config=order.model.config,  # that of the text part, where only that is taken
                dtype=getattr(torch, order.narrowing.dtype),
                attn_implementation="eager",  # the config still names the attention of the trace
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # said below, with names
                output_loading_info=True,
            )
    except (RuntimeError, ValueError) as error:  # parts that cannot be merged; transformers logs which
        raise TensorsError(
            f"{order.weights.checkpoint.path} holds tensors that cannot be merged into those of "
            f"{type(order.model).__name__}; the config and the weights are of different models, or tensors are missing"
        ) from error
    for name, stored, stated in sorted(found["mismatched_keys"]):
        raise TensorsError(
            f"{order.weights.checkpoint.path}: the tensors of {name} make it {list(stored)}, config.json "
            f"{list(stated)}; some are missing, or the config and the weights are of different models"
        )
    missing = set(found["missing_keys"]) & order.weights.names.keys()
    if missing:
        raise missing_error(order.weights.checkpoint, model, missing)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in order.weights.names}
    specs = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()]
    return order.write(specs, lambda name: [memoryview(state[name].contiguous().view(torch.uint8).numpy().reshape(-1))])


def linked_note(folder: Path, entries: Sequence[FileEntry]) -> list[str]:
    """What a user should know if weight files of the bundle in `folder` are hard links."""
    linked = sum(entry.size_bytes for entry in entries if (folder / entry.path).stat().st_nlink > 1)
    if not linked:
        return []
    return [
        f"{linked / 1e9:.1f} GB of weights are hard links to the checkpoint's files, which onnx.load and onnx.checker "
        "refuse; let them open a copy of the bundle (cp -r)"
    ]


_WAYS = {"link": _link, "convert": _convert, "gguf": _gguf, "materialise": _materialise}


def _entry(file: Path, sha256: str | None) -> FileEntry:
    return FileEntry(
        path=f"{FOLDER}/{file.name}",
        size_bytes=file.stat().st_size,
        sha256=sha256,
        header_sha256=None if sha256 else header_sha256(file),
    )
