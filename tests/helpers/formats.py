"""Small checkpoints in every format that people have, each with an independent reference: transformers in float32.

A generator (Llama) and a classifier (BERT) share one tokenizer. Their weights are large, so that every token
matters, and rounded to the dtype of the checkpoint; a .gguf's reference has the values that `gguf` dequantises.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import tiny_gguf
import torch
import transformers
from quantised import METHODS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Kind = Literal["generator", "classifier"]
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<s>", "</s>", "<pad>")
MERGE = (_BYTES[0], _BYTES[1])  # one, since a .gguf must have some
VOCABULARY = [*SPECIAL, *_BYTES, "".join(MERGE)]
_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 256,
    "num_hidden_layers": 3, "max_position_embeddings": 256, "pad_token_id": 2,
}  # fmt: skip
MODELS: dict[Kind, tuple[Any, Any]] = {
    "generator": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, bos_token_id=0, eos_token_id=1),
    ),
    "classifier": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**_SIZES, num_labels=3, problem_type="multi_label_classification"),
    ),
}
"""Kind -> the class and the config of its model. All widths are multiples of 256, which some types of .gguf need."""


@dataclass(frozen=True)
class Made:
    """A checkpoint, and its model in float32 as the reference."""

    path: Path
    model: Any


def tokenizer() -> Any:
    """One token per byte, and one merge."""
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(VOCABULARY)}, merges=[MERGE]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def model(kind: Kind, dtype: str, seed: int) -> Any:
    """A model with random weights in `dtype`."""
    made, config = MODELS[kind]
    torch.manual_seed(seed)
    built = made(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if "embed" in name else 0.08)
            parameter.data = parameter.data.to(
                getattr(torch, dtype)
            )  # buffers, such as rotary frequencies, stay float32
    built.config.dtype = dtype
    return built


def single(folder: Path, kind: Kind, dtype: str, seed: int = 0) -> Made:
    """A folder as transformers saves it, with one file of weights."""
    made = model(kind, dtype, seed)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Made(folder, made.float())


def sharded(folder: Path, kind: Kind, dtype: str, seed: int = 0) -> Made:
    """A folder with several files of weights and their index."""
    made = model(kind, dtype, seed)
    made.save_pretrained(folder, max_shard_size="500KB")
    tokenizer().save_pretrained(folder)
    return Made(folder, made.float())


def renamed(folder: Path, kind: Kind, dtype: str, seed: int = 0) -> Made:
    """A folder whose only file of weights has a name of its own."""
    made = single(folder, kind, dtype, seed)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    return made


def cached(folder: Path, kind: Kind, dtype: str, seed: int = 0) -> Made:
    """A snapshot in a cache as huggingface_hub lays it out: every file is a link into `blobs`."""
    repository = folder / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    made = single(snapshot, kind, dtype, seed)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return Made(snapshot, made.model)


FOLDERS: dict[str, Callable[[Path, Kind, str, int], Made]] = {
    "single": single, "sharded": sharded, "renamed": renamed, "hub cache": cached,
}  # fmt: skip
"""How a Hugging Face checkpoint lies on disk -> what makes it."""

# Name of a type of .gguf -> where in a block its scales lie (float16), so that random blocks have sensible values.
_SCALES: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
GGUF_TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", *_SCALES
)  # fmt: skip


def gguf_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """`values` quantised; random blocks with small scales where `gguf` only dequantises a type."""
    if kind.name not in _SCALES:
        return np.asarray(gguf.quantize(values, kind))
    rng = np.random.default_rng(zlib.crc32(values.tobytes()))
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8).reshape(-1, block_bytes)
    # as large as makes the values' spread that of `values`
    for place in _SCALES[kind.name]:
        blocks[:, place : place + 2] = np.float16(1).reshape(1).view(np.uint8)
    flat = gguf.dequantize(blocks.reshape(shape), kind)
    scale = np.float16(values.std() / flat.std())
    for place in _SCALES[kind.name]:
        blocks[:, place : place + 2] = scale.reshape(1).view(np.uint8)
    return np.asarray(blocks.reshape(shape))


def gguf_file(file: Path, kind: str, seed: int = 0) -> Made:
    """The generator as a .gguf whose matrices have the type `kind`; the vectors stay float32, as llama.cpp keeps them.

    The reference has the values that the file's blocks stand for, by `gguf.dequantize`.
    """
    reference = model("generator", "float32", seed)
    tiny_gguf.write_gguf(
        file, reference, "llama", kind=gguf.GGMLQuantizationType[kind], quantise=gguf_blocks, tokenizer=_gguf_tokenizer
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, reference.config.num_hidden_layers)
    parameters = {
        f"{names.get_name(name.removesuffix('.weight'))}.weight": p for name, p in reference.named_parameters()
    }
    for tensor in gguf.GGUFReader(file).tensors:
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        parameter = parameters[tensor.name]
        heads = tiny_gguf.rotated_heads(reference.config, tensor.name)
        values = _halved(values.reshape(parameter.shape), heads) if heads else values.reshape(parameter.shape)
        parameter.data.copy_(torch.tensor(values))
    return Made(file, reference)


def _halved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key product in transformers' order: the inverse of `tiny_gguf.permuted`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    """What `tokenizer` makes, as metadata."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * len(SPECIAL) + [normal] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)


def _unnamed(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {f"{base}weight": (weight / scale).round().to(torch.int8), f"{base}weight_scale": scale}


def _mlx(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    out, inner = weight.shape
    return {
        f"{base}weight": torch.zeros(out, inner // 8, dtype=torch.uint32),
        f"{base}scales": torch.zeros(out, inner // 64, dtype=torch.bfloat16),
        f"{base}biases": torch.zeros(out, inner // 64, dtype=torch.bfloat16),
    }


REFUSED: dict[str, tuple[Callable[[str, torch.Tensor], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "mlx": (_mlx, {"quantization": {"group_size": 64, "bits": 4}}),
    "int8 with scales, unnamed": (_unnamed, {}),
}
"""Method that is not read -> what it stores in place of a matrix (its name up to `weight`, its values), and what it
adds to config.json. The values of the packed ones are zeros: they must be refused before any is read."""

WORD = {method: "scale" if method.endswith("unnamed") else method.split()[0] for method in REFUSED}
"""Method -> what a refusal must name."""


def refused(folder: Path, method: str) -> Path:
    """The generator as `method` stores it."""
    stored, config = REFUSED[method]
    single(folder, "generator", "bfloat16")

    def replaced(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return stored(name.removesuffix("weight"), weight)

    _replace_matrices(folder, replaced, config)
    return folder


def quantised(folder: Path, method: str, seed: int = 0) -> Made:
    """The generator as `method` of quantised.METHODS stores it; the reference has the values that it stores."""
    store, stated = METHODS[method]
    made = single(folder, "generator", "bfloat16", seed)

    def replaced(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts, values = store(weight.float())
        made.model.get_parameter(name).data = values
        return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}

    _replace_matrices(folder, replaced, {"quantization_config": dict(stated)})
    return made


def _replace_matrices(
    folder: Path, replaced: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], config: dict[str, Any]
) -> None:
    """Store something else for each matrix of the blocks, and state it in config.json."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= replaced(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
