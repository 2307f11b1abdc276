"""Synthetic checkpoints: of any shape, without torch, and without data if only shapes matter.

A random one is as good as a real one for comparing engines with a reference; a sparse one has the shapes of a model
of 70 billion parameters and takes a few kilobytes of disk.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from stageline.models import safetensors_file
from stageline.models.errors import CheckpointError
from stageline.models.new_folder import new_folder

TensorShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""For each tensor's name its dtype (NumPy name) and shape."""

_CHUNK_ELEMENTS = 1 << 20


def write_random(folder: Path, config: dict[str, Any], tensors: TensorShapes, seed: int) -> None:
    """Write a checkpoint whose values depend on the seed and each tensor's name only, and stay in a useful range.

    Matrices and biases are normal with deviation 0.02; a vector named `weight`, which scales a norm's output, or
    `running_var`, which divides it, is 1 plus a tenth of a normal value.

    Raises:
        CheckpointError: the folder exists, cannot be written, or a dtype is not a floating type of safetensors.
    """

    def chunks(name: str) -> Iterator[bytes]:
        return _random_chunks(name, *tensors[name], seed)

    with new_folder(folder) as unfinished:
        _write_config(unfinished, config)
        safetensors_file.write_streaming(unfinished / "model.safetensors", _listed(tensors), chunks)


def write_sparse(folder: Path, config: dict[str, Any], tensors: TensorShapes, shard_bytes: int | None = None) -> None:
    """Write a checkpoint with true headers and no data (it reads as zeros), in one file or in shards.

    `shard_bytes` begins a new shard where a file would grow beyond it; a larger tensor has a shard of its own.

    Raises:
        CheckpointError: the folder exists or cannot be written, or a dtype is not known to safetensors.
    """
    with new_folder(folder) as unfinished:
        _write_config(unfinished, config)
        if shard_bytes is None:
            safetensors_file.write_sparse(unfinished / "model.safetensors", _listed(tensors))
        else:
            _write_sparse_shards(unfinished, tensors, shard_bytes)


def _write_sparse_shards(folder: Path, tensors: TensorShapes, shard_bytes: int) -> None:
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    shard_size = total_size = 0
    for name, dtype, shape in _listed(tensors):
        size = math.prod(shape) * safetensors_file.itemsize(dtype)
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append((name, dtype, shape))
        shard_size += size
        total_size += size

    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors_file.write_sparse(folder / file_name, shard)
        weight_map.update({name: file_name for name, _, _ in shard})
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _random_chunks(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> Iterator[bytes]:
    stored = _floating(name, dtype)
    generator = np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()])
    is_scale = len(shape) == 1 and name.endswith(("weight", "running_var"))
    count = math.prod(shape)
    for begin in range(0, count, _CHUNK_ELEMENTS):
        normal = generator.standard_normal(min(_CHUNK_ELEMENTS, count - begin), dtype=np.float32)
        values = 1 + np.float32(0.1) * normal if is_scale else np.float32(0.02) * normal
        yield values.astype(stored).tobytes()


def _floating(name: str, dtype: str) -> np.dtype[Any]:
    # NumPy itself has no bfloat16 or float8; ml_dtypes, which onnx-ir brings, adds them.
    import ml_dtypes

    if dtype in ("float16", "float32", "float64"):
        return np.dtype(dtype)
    if dtype.startswith(("bfloat", "float8")) and hasattr(ml_dtypes, dtype):
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
        return found
    raise CheckpointError(f"tensor {name!r} has the dtype {dtype}; random values are made for floating types only")


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _listed(tensors: TensorShapes) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
