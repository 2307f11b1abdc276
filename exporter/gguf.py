"""Reading a .gguf checkpoint as transformers does, one tensor at a time: names, layout, dequantised values, tokenizer."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from gguf import GGUFReader, dequantize
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError, ExportError


def file_of(checkpoint: Checkpoint) -> Path:
    """The .gguf file itself."""
    return checkpoint.files[0]


@lru_cache(maxsize=1)
def _parsed(file: Path) -> dict[str, Any]:
    try:
        return dict(load_gguf_checkpoint(str(file), return_tensors=False))
    except ValueError as error:
        raise ExportError(f"{file}: {' '.join(str(error).split())}") from error


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's config.json, made from its metadata."""
    values = dict(_parsed(file_of(checkpoint))["config"])
    values["architectures"] = ["ForCausalLM"]
    return values


def _processor(checkpoint: Checkpoint) -> Any:
    architecture = checkpoint.config.get("general.architecture")
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=_parsed(file_of(checkpoint))["config"])


def tensor_names(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """The model's parameter names -> the .gguf's tensor names."""
    names = get_gguf_hf_weights_map(model, _processor(checkpoint))
    return {parameter: tensor for tensor, parameter in names.items() if tensor in checkpoint.tensors}


def reader(checkpoint: Checkpoint, model: Any) -> Callable[[str], np.ndarray]:
    """A function from a tensor's name to its dequantised float32 values in transformers' layout."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(str(file_of(checkpoint))).tensors}
    processor = _processor(checkpoint)
    parsed = _parsed(file_of(checkpoint))
    names = get_gguf_hf_weights_map(model, processor)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(weights=values, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
        return np.asarray(result.weights)

    return read


def save_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer that the .gguf holds as tokenizer.json and its companions."""
    file = file_of(checkpoint)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{file}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    tokenizer.save_pretrained(folder)
