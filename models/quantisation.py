"""The refusal of a checkpoint that is quantised with a method that is not read, by the method's name."""

from collections.abc import Iterable

from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.packing import recognise
from stageline.models.packing.stated import statements

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
_NARROW = ("float8_", "float6_", "float4_")
_PLAIN = "export the unquantised checkpoint, or a .gguf of it"


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config.json, or a file beside it, states that its weights are quantised with a method
    that is not read.

    Raises:
        CheckpointError: they are; the message names the method, and what works.
    """
    for statement in statements(checkpoint.config, checkpoint.path):
        unread = recognise.unread(statement)
        if unread is not None:
            raise CheckpointError(f"{checkpoint.path} is quantised with {unread}, which is not read yet; {_PLAIN}")


def quantised_with(names: Iterable[str]) -> str | None:
    """The method, or the methods, that tensors of these names belong to; None if no name tells."""
    found = {method for name in names for ending, method in _TRACES.items() if name.endswith(ending)}
    return sorted(found, key=lambda methods: (methods.count(" "), methods))[0] if found else None


def not_stated(method: str | None) -> str:
    """The refusal of tensors that are quantised with `method` (None: nothing names it) and of no weight that the config
    states to be, as part of a sentence."""
    return (
        f"quantised{f' with {method}' if method else ''} in a way that config.json does not state; bring the "
        f"config.json that it was saved with, or {_PLAIN}"
    )


def is_narrow(dtype: str) -> bool:
    """Whether a dtype (NumPy name) is a float of 8 bits or less, which weights have only with a scale."""
    return dtype.startswith(_NARROW)
