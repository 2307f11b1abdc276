"""A tiny bundle that generates, and a way to change a weight of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def llama_bundle(export_once: Callable[..., Path]) -> Path:
    """A Llama of two blocks in two stages, with caches, in bfloat16; do not change it, copy it."""
    return export_once(LLAMA, stages=2, seed=3, dtype="bfloat16")


@pytest.fixture
def bundle(llama_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `llama_bundle`."""
    return shutil.copytree(llama_bundle, tmp_path / "bundle")


@pytest.fixture
def change_weight() -> Callable[[Path, int], str]:
    """Changes one element of a matrix that only the given block reads, and gives its name."""

    def change(path: Path, block: int) -> str:
        opened = Bundle.open(path)
        use = opened.manifest.uses[block + 1]
        name = next(name for name in use.weights.values() if len(opened.tensors[name].shape) == 2)
        entry = opened.tensors[name]
        data = np.memmap(entry.file, np.uint8, "r+", entry.offset, (entry.size_bytes,))
        data[1] ^= 1
        data.flush()
        file = entry.file.relative_to(path).as_posix()
        files = tuple(file_entry(path, file) if e.path == file else e for e in opened.manifest.files)
        write_manifest(path, opened.manifest.model_copy(update={"files": files}))
        return name

    return change
