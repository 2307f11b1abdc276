"""A folder that is no checkpoint is told what it is, and what works."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}


def refusal(folder: Path, files: dict[str, Any]) -> str:
    """What is said of a folder with these files: JSON where an object is given, else empty."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content) if content is not None else "")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "what", "way_out"),
    [
        (
            {"adapter_config.json": LORA, "adapter_model.safetensors": None},
            "holds an adapter of type LORA, not a whole model; merge it into its base model org/base",
            "merge_and_unload().save_pretrained(NEW_FOLDER)",
        ),
        ({"adapter_config.json": {**LORA, "peft_type": "IA3"}, "config.json": {}}, "type IA3", "merge_and_unload"),
        (
            {"adapter_config.json": {**LORA, "peft_type": "PROMPT_TUNING"}},
            "type PROMPT_TUNING, not a whole model, and that type cannot be merged",
            "export its base model org/base alone",
        ),
        ({"adapter_config.json": [1]}, "holds an adapter, not a whole model", "merge it"),
        ({"adapter_model.bin": None}, "holds an adapter (adapter_model.bin)", "merge it into its base model"),
        (
            {"model_index.json": {"_class_name": "StableDiffusionPipeline"}, "text_encoder/config.json": {}},
            "a diffusers pipeline (StableDiffusionPipeline)",
            "its text_encoder folder is a checkpoint of its own",
        ),
        (
            {"params.json": {}, "consolidated.safetensors": None, "tokenizer.model.v3": None},
            "consolidated.safetensors, a checkpoint as Meta's or Mistral's own code writes it",
            "Hugging Face's layout",
        ),
        ({"params.json": {}, "consolidated.00.pth": None}, "consolidated.00.pth, a checkpoint as Meta's", "convert_"),
        ({"config.json": {}, "tf_model.h5": None}, "only in tf_model.h5, which is TensorFlow's", "from_tf=True"),
        ({"config.json": {}, "flax_model.msgpack": None}, "which is Flax's", "from_flax=True"),
        ({"config.json": {}, "onnx/model.onnx": None}, "onnx/model.onnx, a model compiled for ONNX", "give the"),
        (
            {"config.json": {}, "openvino_model.xml": None, "openvino_model.bin": None},
            "openvino_model.xml, a model compiled for OpenVINO",
            "give the checkpoint that it was made from",
        ),
        (
            {"config.json": {}, "optimizer.pt": None, "pytorch_model.bin": None, "training_args.bin": None},
            "only in pytorch_model.bin, and reading a pickle can run any code",
            "save_pretrained",
        ),
        (
            {"config.json": {"architectures": ["LlamaForCausalLM"]}, "pytorch_model.bin": None},
            "only in pytorch_model.bin",
            "LlamaForCausalLM.from_pretrained(FOLDER)",  # AutoModel would save it without its head
        ),
        ({"config.json": {}, "training_args.bin": None}, "has no weights", "download them"),
        ({"pytorch_model.bin": None}, "only in pytorch_model.bin", "save_pretrained"),
        ({"checkpoint-500/config.json": {}}, "its folder checkpoint-500 has", "give that folder"),
        ({"model.safetensors": None}, "has weights but no config.json", "download it"),
    ],
)  # fmt: skip
def test_what_it_is_and_what_works(tmp_path: Path, files: dict[str, Any], what: str, way_out: str) -> None:
    said = refusal(tmp_path, files)
    assert what in said
    assert way_out in said
    assert "\n" not in said


def test_an_adapter_beside_a_whole_model_is_not_ignored(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    said = refusal(tmp_path, {"config.json": {"model_type": "llama"}, "adapter_config.json": LORA})
    assert "holds a whole model and an adapter beside it" in said
    assert "move that file away" in said


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS, "a pointer of Git LFS in place of the file; fetch the file: git lfs pull"),
        (b"<!doctype html><html></html>", "a web page in place of the file; download it again"),
        (b"PK\x03\x04" + bytes(range(40)), "a zip archive, as torch.save writes its pickles; save the model again"),
        (b"\x80\x02" + bytes(range(1, 40)), "a pickle; save the model again, as safetensors"),
    ],
)
def test_a_file_that_is_another_than_its_name_says_is_told(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "model.safetensors":
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name} is {what}"):
        Checkpoint.open(tmp_path / name if name == "model.gguf" else tmp_path)


def test_a_gguf_under_another_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) * 8)
    with pytest.raises(CheckpointError, match=r"is a .gguf file; give it a name that ends so"):
        Checkpoint.open(tmp_path)
