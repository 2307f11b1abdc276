"""Quantised checkpoints of a Llama of any size, with true headers and no data (sparse files that read as zeros)."""

import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from stageline.exporter import skeleton
from stageline.models.synthetic import write_sparse

_GROUP = 128
_BITS = 4
_TYPE = gguf.GGMLQuantizationType.Q4_K


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes by name."""
    model = skeleton.build(skeleton.config_of(config), "text-generation", torch.bfloat16, "eager")
    return {name: shape for name, (_, shape) in skeleton.parameter_shapes(model).items()}


def write_gptq(config: dict[str, Any], folder: Path) -> None:
    """GPTQ of 4 bits in groups of 128, as AutoGPTQ writes it: every product of a block is packed."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in _shapes(config).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = ("float16", shape)
            continue
        (outputs, inputs), base = shape, name.removesuffix("weight")
        tensors |= {
            f"{base}qweight": ("int32", (inputs * _BITS // 32, outputs)),
            f"{base}qzeros": ("int32", (inputs // _GROUP, outputs * _BITS // 32)),
            f"{base}scales": ("float16", (inputs // _GROUP, outputs)),
        }
    stated = {"quant_method": "gptq", "bits": _BITS, "group_size": _GROUP, "desc_act": False, "sym": False}
    write_sparse(folder, {**config, "dtype": "float16", "quantization_config": stated}, tensors, 5 * 1000**3)


def write_gguf(config: dict[str, Any], file: Path) -> None:
    """A .gguf of Q4_K matrices and float32 vectors, with a tokenizer of as many tokens as the config says."""
    writer = gguf.GGUFWriter(file, "llama")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges([])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    block, block_bytes = gguf.GGML_QUANT_SIZES[_TYPE]
    size = 0
    for parameter, shape in _shapes(config).items():
        name = f"{names.get_name(parameter.removesuffix('.weight'))}.weight"
        if len(shape) == 1:
            count = 4 * shape[0]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), count)
        else:
            count = math.prod(shape) // block * block_bytes
            row = shape[-1] // block * block_bytes
            writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), count, _TYPE)
        size += gguf.GGUFWriter.ggml_pad(count, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = gguf.GGUFWriter.ggml_pad(file.stat().st_size, writer.data_alignment)
    os.truncate(file, begin + size)
