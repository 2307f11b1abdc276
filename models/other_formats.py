"""What a folder holds that is no checkpoint we read, in one sentence with the nearest way that works."""

import json
from pathlib import Path

# peft's types that add inputs to the model and not to its weights, so that nothing can be merged
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT")
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # the likeliest first
_NOT_WEIGHTS = ("openvino_", "training_args", "optimizer", "scheduler", "rng_state", "scaler")
_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; fetch the file: git lfs pull",
    b"<": "a web page in place of the file; download it again, logged in if the Hub asks for that",
    b"PK\x03\x04": "a zip archive, as torch.save writes its pickles; save the model again, as safetensors",
    b"\x80": "a pickle; save the model again, as safetensors",
    b"GGUF": "a .gguf file; give it a name that ends so, and its path",
}
"""How a file begins that is another one than its name says, and what it is."""
START_BYTES = 32
"""So many of its bytes tell."""
_FROM_OTHERS = {
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "saved_model.pb": "TensorFlow",
    "*.ckpt.index": "TensorFlow",
}
_COMPILED = {
    "openvino_*.xml": "OpenVINO",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "*.engine": "TensorRT",
    "*.plan": "TensorRT",
    "*.mlpackage": "Core ML",
    "*.tflite": "TensorFlow Lite",
}


def what_it_holds(folder: Path) -> str | None:
    """A sentence on what is in `folder`, which has no weights that we read; None if nothing there is known."""
    for kind in (adapter, _diffusers, _original, _other_framework, _compiled, _pickled):
        said = kind(folder)
        if said is not None:
            return f"{folder} {said}"
    return None


def another_file(start: bytes) -> str | None:
    """What a file is that begins so and is none of the kind that its name says; None if that does not show."""
    return next((what for begin, what in _STARTS.items() if start.startswith(begin)), None)


def adapter(folder: Path) -> str | None:
    """What to do with an adapter, if the folder holds one."""
    stated = _json(folder / "adapter_config.json")
    if stated is None:
        files = names(folder, "adapter_model.*")
        return f"holds an adapter ({files[0]}), not a whole model; merge it into its base model" if files else None
    kind = stated.get("peft_type")
    base = stated.get("base_model_name_or_path") or stated.get("model_name")
    what = f"holds {f'an adapter of type {kind}' if kind else 'an adapter'}, not a whole model"
    if kind in _PROMPTS:
        return f"{what}, and that type cannot be merged; export its base model{f' {base}' if base else ''} alone"
    return (
        f"{what}; merge it into its base model{f' {base}' if base else ''} with peft, and export what that saves: "
        "PeftModel.from_pretrained(BASE_MODEL, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
    )


def _diffusers(folder: Path) -> str | None:
    stated = _json(folder / "model_index.json")
    if stated is None:
        return None
    kind = stated.get("_class_name", "of unknown kind")
    parts = sorted(file.parent.name for file in folder.glob("*text_encoder*/config.json"))
    return f"holds a diffusers pipeline ({kind}), which is not read; " + (
        f"its {parts[0]} folder is a checkpoint of its own" if parts else "export a model of transformers"
    )


def _original(folder: Path) -> str | None:
    consolidated = names(folder, "consolidated*")
    if not consolidated or (folder / "config.json").is_file():
        return None
    return (
        f"holds {consolidated[0]}, a checkpoint as Meta's or Mistral's own code writes it; use the same model in "
        "Hugging Face's layout (config.json and model*.safetensors), or make that with the convert_*_weights_to_hf.py "
        "of its architecture in transformers"
    )


def _other_framework(folder: Path) -> str | None:
    for pattern, framework in _FROM_OTHERS.items():
        found = names(folder, pattern)
        if found and not _pickles(folder):
            return (
                f"has its weights only in {found[0]}, which is {framework}'s; use a version of the checkpoint with "
                "model.safetensors, or convert it with a transformers below 5, which still read it: "
                f"{_saved_class(folder)}.from_pretrained(FOLDER, from_{'flax' if framework == 'Flax' else 'tf'}=True)"
            )
    return None


def _compiled(folder: Path) -> str | None:
    for pattern, engine in _COMPILED.items():
        found = names(folder, pattern)
        if found and not _pickles(folder):
            return f"holds {found[0]}, a model compiled for {engine}; give the checkpoint that it was made from"
    return None


def _pickled(folder: Path) -> str | None:
    pickles = _pickles(folder)
    if not pickles:
        return None
    return (
        f"has its weights only in {pickles[0]}, and reading a pickle can run any code; convert it where you trust it: "
        f"{_saved_class(folder)}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) with transformers"
    )


def _saved_class(folder: Path) -> str:
    """The class that keeps the head of the model, from its config.json."""
    names = (_json(folder / "config.json") or {}).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "AutoModel"


def _pickles(folder: Path) -> list[str]:
    return [n for pattern in _PICKLES for n in names(folder, pattern) if not n.startswith(_NOT_WEIGHTS)]


def _json(file: Path) -> dict[str, object] | None:
    """The object in a JSON file; None without one, empty if it is damaged (its name tells enough)."""
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def names(folder: Path, *patterns: str) -> list[str]:
    """The files in `folder` of these patterns, by their paths in it, sorted."""
    return sorted(file.relative_to(folder).as_posix() for pattern in patterns for file in folder.glob(pattern))
