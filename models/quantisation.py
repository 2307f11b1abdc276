"""How a checkpoint was quantised, told from its files and its tensors' names, so that a refusal can name the method."""

from collections.abc import Iterable, Iterator
from typing import Any

from stageline.models.checkpoint import Checkpoint, read_json_object
from stageline.models.errors import CheckpointError

# Files beside config.json that state a quantisation -> the tool that writes them, if they do not name the method.
_COMPANIONS = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
# How a tensor's name ends that is no weight but what one was quantised with -> whose name that is.
_TRACES = {
    ".SCB": "bitsandbytes",
    ".weight.absmax": "bitsandbytes",
    ".weight.nested_absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".weight.nested_quant_map": "bitsandbytes",
    ".weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".weight.quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".g_idx": "gptq",
    ".qzeros": "gptq or awq",
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale": "compressed-tensors, fbgemm_fp8 or modelopt",
    ".weight_scale_2": "modelopt",
    ".weight_zero_point": "compressed-tensors",
    ".input_scale": "compressed-tensors or modelopt",
    ".input_zero_point": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".k_scale": "fp8, of its KV cache",
    ".v_scale": "fp8, of its KV cache",
    ".activation_scale": "fp8",
    ".input_scale_ub": "fbgemm_fp8",
    "_proj_blocks": "mxfp4",
    "_proj_scales": "mxfp4",
    ".weight_scales": "eetq",
    ".weight._data": "quanto",
    ".weight._scale": "quanto",
    ".weight:qdata": "torchao",
    ".weight:scale": "torchao",
    ".codebooks": "aqlm",
    ".codes": "aqlm",
    ".centroids.weight": "vptq",
    ".dense_weights": "spqr",
    ".W_q": "hqq",
    ".scales": "gptq, awq or mlx",
    ".biases": "mlx",
}
# The methods that transformers turns into plain weights on any processor, and the class that asks for it.
_DEQUANTISED_BY = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
_NARROW = ("float8_", "float6_", "float4_")
_PLAIN = "export the unquantised checkpoint, or a .gguf of it"
_UNNAMED = "a method that config.json does not name"


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config.json, or a file beside it, states that its weights are quantised.

    Raises:
        CheckpointError: they are; the message names the method, and what works.
    """
    for stated, default in _statements(checkpoint):
        method = _method(stated, default)
        details = _details(stated)
        raise CheckpointError(
            f"{checkpoint.path} is quantised with {method}{f' ({details})' if details else ''}, which is not read yet; "
            + _way_out(method)
        )


def quantised_with(names: Iterable[str]) -> str | None:
    """The method, or the methods, that tensors of these names belong to; None if no name tells."""
    found = {method for name in names for ending, method in _TRACES.items() if name.endswith(ending)}
    return sorted(found, key=lambda methods: (methods.count(" "), methods))[0] if found else None


def not_read(method: str | None) -> str:
    """The refusal of tensors that are quantised with `method` (None: nothing names it), as part of a sentence."""
    return f"quantised{f' with {method}' if method else ''}, which is not read yet; {_PLAIN}"


def is_narrow(dtype: str) -> bool:
    """Whether a dtype (NumPy name) is a float of 8 bits or less, which weights have only with a scale."""
    return dtype.startswith(_NARROW)


def _statements(checkpoint: Checkpoint) -> Iterator[tuple[dict[str, Any], str]]:
    """What states a quantisation, each with the method that it means if it does not say."""
    config = checkpoint.config
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):  # text_config, ...
        for key, default in (
            ("quantization_config", _UNNAMED),
            ("compression_config", "compressed-tensors"),
            ("quantization", "mlx"),
        ):
            if isinstance(part.get(key), dict) and part[key]:
                yield part[key], default
    for name, default in _COMPANIONS.items():
        if (checkpoint.path / name).is_file():
            yield read_json_object(checkpoint.path / name), default


def _method(stated: dict[str, Any], default: str) -> str:
    named = stated.get("quant_method")
    if isinstance(named, str) and named:
        return named
    for keys, method in (
        (("load_in_8bit", "load_in_4bit"), "bitsandbytes"),
        (("config_groups", "sparsity_config"), "compressed-tensors"),
        (("quant_algo", "producer"), "modelopt"),
    ):
        if any(stated.get(key) for key in keys):
            return method
    return "mlx" if default == _UNNAMED and {"group_size", "bits"} <= stated.keys() else default


def _details(stated: dict[str, Any]) -> str:
    """Bits, groups and kinds, as far as the method states them."""
    inner = stated.get("quantization")
    flat = {**stated, **inner} if isinstance(inner, dict) else dict(stated)
    groups = flat.get("config_groups")
    if isinstance(groups, dict) and groups:
        first = next(iter(groups.values()))
        weights = first.get("weights") if isinstance(first, dict) else None
        flat = {**(weights if isinstance(weights, dict) else {}), **flat}
    bits = _first(flat, "bits", "w_bit", "nbits", "num_bits")
    if bits is None and (flat.get("load_in_4bit") or flat.get("load_in_8bit")):
        bits = 4 if flat.get("load_in_4bit") else 8
    group = _first(flat, "group_size", "q_group_size")
    kind = _first(flat, "quant_algo", "format", "bnb_4bit_quant_type", "weights", "quant_type")
    block = flat.get("weight_block_size")
    said = [
        f"{bits} bits" if isinstance(bits, int) else "",
        f"groups of {group}" if isinstance(group, int) and group > 0 else "",
        f"blocks of {' x '.join(map(str, block))}" if isinstance(block, list) and block else "",
        kind if isinstance(kind, str) else "",
    ]
    return ", ".join(part for part in said if part)


def _first(values: dict[str, Any], *keys: str) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _way_out(method: str) -> str:
    if method not in _DEQUANTISED_BY:
        return _PLAIN
    return (
        f"{_PLAIN}, or write plain weights with transformers: from_pretrained(FOLDER, quantization_config="
        f"{_DEQUANTISED_BY[method]}(dequantize=True)).save_pretrained(NEW_FOLDER)"
    )
