"""The reference model of a .gguf file: what the file says, read by other code than the export's.

gguf's own reader gives the metadata and the tensors, and transformers' loader the config and the weights. transformers
does not read how rotary positions are scaled, so the frequencies are computed here, by the formula of llama.cpp
(`ggml_rope_ext` and `rope_yarn` in ggml), and put in the place of those that the model made. Of the config, only what
transformers leaves out is taken from the export.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from stageline.exporter import skeleton
from stageline.exporter.gguf import config as gguf_config
from stageline.exporter.gguf.tensors import MixtralTensorProcessor
from stageline.models.checkpoint import Checkpoint
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, LlamaTensorProcessor, load_gguf_checkpoint

_OURS = frozenset(
    {
        "model_type", "tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
        "vocab_size",  # transformers counts the tokens, of which a padded vocabulary has fewer than rows
    }
)  # fmt: skip


def load_gguf_reference(checkpoint: Checkpoint, factory: Any, attention: str) -> Any:
    """The model of transformers' `factory` in float32; `attention` is transformers' name. Raises what transformers
    does, and ExportError for a file that the export refuses."""
    file = checkpoint.files[0]
    with _as_one_file(checkpoint.files):
        ours = gguf_config.config(checkpoint)
        theirs = load_gguf_checkpoint(str(file))["config"]
        stated = {name: _one_for_all(value) for name, value in theirs.items() if name in ours.keys() - _OURS}
        config = skeleton.config_of({**ours, **stated, "rope_parameters": _unscaled(ours.get("rope_parameters"))})
        with _llama(config.model_type):
            model = factory.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=torch.float32, attn_implementation=attention,
                local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
        _place_frequencies(model, gguf.GGUFReader(str(file)))  # as transformers names it: it was read
    return model


def _unscaled(parameters: Any) -> Any:
    """rope_parameters without the scaling that the export found; the two sets of LongRoPE stay, since which is used
    depends on the length of a row."""
    if parameters is None or parameters.get("rope_type") == "longrope":
        return parameters
    if "full_attention" in parameters:
        return {kind: _unscaled(held) for kind, held in parameters.items()}
    kept = {name: value for name, value in parameters.items() if name in ("rope_theta", "partial_rotary_factor")}
    return {**kept, "rope_type": "default"}


def _place_frequencies(model: Any, reader: Any) -> None:
    """Give every rotary module of the model the frequencies that the file states."""
    factors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1) for tensor in reader.tensors
               if tensor.name.startswith("rope_f")}  # fmt: skip
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name in [name for name in buffers if name.endswith("inv_freq") and "original" not in name]:
            local = name.startswith("sliding_attention")
            short = factors.get("rope_freqs.weight", factors.get("rope_factors_short.weight"))
            inverse, magnitude = frequencies(reader, len(buffers[name]), None if local else short, local)
            prefix = name.removesuffix("inv_freq")
            for place in (name, f"{prefix}original_inv_freq"):
                setattr(module, place, torch.tensor(inverse, dtype=torch.float32))
            setattr(module, f"{prefix}attention_scaling", magnitude)
            if (long := factors.get("rope_factors_long.weight")) is not None:
                inverse, _ = frequencies(reader, len(long), long, local)
                module.long_inv_freq = torch.tensor(inverse, dtype=torch.float32)


def frequencies(
    reader: Any, pairs: int, factors: NDArray[np.float32] | None, local: bool
) -> tuple[NDArray[np.float64], float]:
    """The angle that each pair of dimensions turns by at position 1, float64 [pairs], and what cosine and sine are
    multiplied by; `local`: those of blocks with a sliding window, which are not scaled."""

    def value(key: str, default: Any) -> Any:
        field = reader.get_field(f"{reader.get_field('general.architecture').contents()}.rope.{key}")
        return default if field is None else field.contents()

    base = value("freq_base_swa", 10000.0) if local else value("freq_base", 10000.0)
    free = base ** (-np.arange(pairs, dtype=np.float64) / pairs) / (1.0 if factors is None else factors)
    if local:
        return free, 1.0
    kind = value("scaling.type", "linear")
    factor = value("scaling.factor", 0.0) or value("scale_linear", 0.0) or 1.0
    magnitude = float(value("scaling.attn_factor", 1.0))
    if kind in ("none", "longrope") or factor == 1.0:
        return free, magnitude
    if kind == "linear":
        return free / factor, magnitude
    architecture = reader.get_field("general.architecture").contents()
    context = value("scaling.original_context_length", reader.get_field(f"{architecture}.context_length").contents())

    def dimension(turns: float) -> float:
        return float(pairs * math.log(context / (turns * 2 * math.pi)) / math.log(base))

    low = max(0.0, math.floor(dimension(value("scaling.yarn_beta_fast", 32.0))))
    high = min(2 * pairs - 1.0, math.ceil(dimension(value("scaling.yarn_beta_slow", 1.0))))
    keep = 1 - np.clip((np.arange(pairs) - low) / max(0.001, high - low), 0, 1)
    return free / factor * (1 - keep) + free * keep, magnitude * (1 + 0.1 * math.log(factor))


@contextmanager
def _as_one_file(files: tuple[Path, ...]) -> Iterator[None]:
    """Inside, gguf's reader gives the tensors of all parts of a split file; a table that transformers makes for each
    module is made once, and no bar of progress is drawn. A file is read once, and its hundred thousands of strings out
    of a plain array: each slice of numpy's memmap costs as much as ten of that."""

    class Parts(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any, *args: Any) -> None:
            with patch.object(np, "memmap", plain):
                super().__init__(path, *args)
            for other in files[1:]:
                self.tensors += _whole(other).tensors

    _whole, mapped = gguf.GGUFReader, np.memmap

    def plain(*args: Any, **kwargs: Any) -> NDArray[Any]:
        return np.asarray(mapped(*args, **kwargs))

    table = lru_cache(maxsize=4)(gguf.get_tensor_name_map)
    with (
        patch.object(gguf, "GGUFReader", lru_cache(maxsize=1)(Parts)),
        patch.object(gguf, "get_tensor_name_map", table),
        patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda tensors, **_: tensors),
    ):
        yield


@contextmanager
def _llama(model_type: str) -> Iterator[None]:
    """Inside, transformers knows what a .gguf of the architecture `llama` with experts is, and how many heads keys have
    where the file does not state it."""
    if model_type != "mixtral":
        with patch.dict(TENSOR_PROCESSORS, {"llama": _StatedHeads}):
            yield
        return
    with (
        patch.dict(gguf.MODEL_ARCH_NAMES, {gguf.MODEL_ARCH.LLAMA: "mixtral"}),
        patch.dict(TENSOR_PROCESSORS, {"llama": MixtralTensorProcessor}),
    ):
        yield


class _StatedHeads(LlamaTensorProcessor):  # type: ignore[misc]
    """transformers leaves queries and keys in llama.cpp's order if the file does not state the heads of keys, and
    takes no list of one number for each block."""

    def __init__(self, config: Any = None) -> None:
        stated = {name: _one_for_all(value) for name, value in (config or {}).items()}
        super().__init__({"num_key_value_heads": stated.get("num_attention_heads"), **stated})


def _one_for_all(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value
