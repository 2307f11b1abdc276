"""Reading a .gguf checkpoint as transformers does, tensor by tensor: names, layout, dequantised values, tokenizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import transformers
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError, ExportError
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

_reader = lru_cache(maxsize=1)(gguf.GGUFReader)
_name_map = lru_cache(maxsize=4)(gguf.get_tensor_name_map)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers opens the file again for config and tokenizer (2 s each) and builds the table of names once for each
    module of the model (10 s for 30 layers). Inside this context each is done once."""
    with patch.object(gguf, "GGUFReader", _reader), patch.object(gguf, "get_tensor_name_map", _name_map):
        yield


@lru_cache(maxsize=1)
def _parsed(file: Path) -> dict[str, Any]:
    try:
        with _read_once():
            return dict(load_gguf_checkpoint(str(file), return_tensors=False))
    except ValueError as error:
        raise ExportError(f"{file}: {' '.join(str(error).split())}") from error


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's config.json, made from its metadata."""
    values = dict(_parsed(checkpoint.files[0])["config"])
    values["architectures"] = ["ForCausalLM"]
    return values


def _processor(checkpoint: Checkpoint) -> Any:
    architecture = checkpoint.config.get("general.architecture")
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=_parsed(checkpoint.files[0])["config"])


def tensor_names(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """The model's parameter names -> the .gguf's tensor names."""
    with _read_once():
        names = get_gguf_hf_weights_map(model, _processor(checkpoint))
    return {parameter: tensor for tensor, parameter in names.items() if tensor in checkpoint.tensors}


def reader(checkpoint: Checkpoint, model: Any) -> Callable[[str], np.ndarray]:
    """A function from a tensor's name to its dequantised float32 values in transformers' layout."""
    data = np.memmap(checkpoint.files[0], mode="r")
    processor = _processor(checkpoint)
    parsed = _parsed(checkpoint.files[0])
    with _read_once():
        names = get_gguf_hf_weights_map(model, processor)

    def read(name: str) -> np.ndarray:
        entry = checkpoint.tensors[name]
        kind = gguf.GGMLQuantizationType[entry.dtype]
        stored = data[entry.offset : entry.offset + entry.size_bytes]
        values = gguf.dequantize(stored.reshape(gguf.quant_shape_to_byte_shape(entry.shape, kind)), kind)
        result = processor.process(weights=values, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
        return np.asarray(result.weights)

    return read


def save_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer that the .gguf holds as tokenizer.json and its companions."""
    file = checkpoint.files[0]
    try:
        with _read_once():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True
            )
    except Exception as error:
        raise CheckpointError(f"{file}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    tokenizer.save_pretrained(folder)
