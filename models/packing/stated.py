"""What config.json, and the files beside it, state of a quantisation: the method, and how."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stageline.models.json_file import read_json_object

# Files beside config.json that state a quantisation -> the tool that writes them, if they do not name the method.
_COMPANIONS = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
_UNNAMED = "a method that config.json does not name"


class Statement(NamedTuple):
    """A method by its name, and the object that states it."""

    method: str
    values: dict[str, Any]


def statements(config: dict[str, Any], folder: Path) -> list[Statement]:
    """What states a quantisation: config.json, or the files beside it if that says nothing. CheckpointError if one is
    not JSON."""
    found = list(_in_config(config)) or list(_beside(folder))
    return [Statement(_method(values, default), values) for values, default in found]


def _in_config(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each with the method that it means if it does not say."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):  # text_config, ...
        for key, default in (
            ("quantization_config", _UNNAMED),
            ("compression_config", "compressed-tensors"),
            ("quantization", "mlx"),
        ):
            if isinstance(part.get(key), dict) and part[key]:
                yield part[key], default


def _beside(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for name, default in _COMPANIONS.items():
        if (folder / name).is_file():
            yield read_json_object(folder / name), default


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


def details(stated: Mapping[str, Any]) -> str:
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
