"""What gpu_proof.py compares with and runs, made on CPUs: small bundles with references, and graphs of real shapes.

    python benchmarks/gpu_materials.py

The small models are random, so that what a token attends to decides the next; their references are computed in float32
by ONNX Runtime on CPUs. Of the real shapes only graphs are kept: gpu_drawing.py draws weights on the machine.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import transformers
from gpu_beside import CONFIG
from gpu_drawing import undraw
from gpu_parity import CAPACITY, CHUNK, SLOTS, played, real_values, script
from gpu_proof import MATERIALS
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array
from stageline.runtime.pipeline import Pipeline

ROWS, LENGTH, PROMPTS, NEW, NEAR, POSITIONS = 5, 33, 8, 24, 5, 512
ENCODERS: dict[str, tuple[Any, ...]] = {
    "bert-float32": ("bert", "BertModel", "float32"),
    "bert-float16": ("bert", "BertModel", "float16"),
    "bert-bfloat16": ("bert", "BertModel", "bfloat16"),
    "windows-bfloat16": ("modernbert", "ModernBertModel", "bfloat16"),
}
DECODERS: dict[str, tuple[Any, ...]] = {
    "llama-float32": ("llama", "LlamaForCausalLM", "float32"),
    "llama-float16": ("llama", "LlamaForCausalLM", "float16"),
    "llama-bfloat16": ("llama", "LlamaForCausalLM", "bfloat16"),
    "llama64-bfloat16": ("llama", "LlamaForCausalLM", "bfloat16", {"head_dim": 64}),
    "windows-bfloat16": ("mistral", "MistralForCausalLM", "bfloat16"),
    "softcap-float16": ("gemma2", "Gemma2ForCausalLM", "float16"),
    "sinks-bfloat16": ("gpt_oss", "GptOssForCausalLM", "bfloat16"),
}
"""Name -> model type, class, type of the weights, and changes to the config."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": None,
    },
    "smollm2": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": None,
    },
    "bertlarge": {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 30522,
    },
    "minilm": {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 384, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522,
    },
}  # fmt: skip
"""Those of Llama 3.2 1B, SmolLM2 135M, BERT large and all-MiniLM-L6-v2, in bfloat16."""


def make_small(
    folder: Path, kind: str, class_name: str, dtype: str, changes: Mapping[str, Any] | None = None
) -> Bundle:
    """Export a tiny random model, with the reference of a whole batch."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, values = Path(scratch) / "checkpoint", {"max_position_embeddings": POSITIONS, **(changes or {})}
        tiny_models.make(kind, class_name, checkpoint, getattr(torch, dtype), **values)
        bundle = export(checkpoint, folder)
    inputs = batch(bundle)
    with Pipeline.open(folder) as pipeline:
        want = real_values(inputs, pipeline.run(inputs)[bundle.manifest.outputs[-1].name])
    _save(folder, {**{f"in.{name}": array for name, array in inputs.items()}, "out": want})
    return bundle


def make_decoder(folder: Path, *case: Any) -> None:
    """The same, with the logits of steps, and the tokens of texts."""
    bundle = make_small(folder, *case)
    assert bundle.manifest.cached, bundle.manifest.no_generation_reason
    assert bundle.manifest.vocabulary is not None
    steps = played(bundle, "onnxruntime", "cpu", script(bundle.manifest.vocabulary, seed=0))
    with np.load(folder / "reference.npz") as reference:
        _save(folder, {**reference, **{f"step.{n}": logits for n, logits in enumerate(steps)}})
    largest = max(float(np.abs(logits).max()) for logits in steps)
    (folder / "tokens.json").write_text(json.dumps({"largest_logit": largest, "texts": tokens_of(bundle)}))


def tokens_of(bundle: Bundle) -> list[dict[str, Any]]:
    """The greedy tokens of prompts; at each place also the likeliest, and how far they are below the first."""
    rng = np.random.default_rng(1)
    vocabulary = bundle.manifest.vocabulary or 3
    prompts = [rng.integers(3, vocabulary, 1 + 6 * n).tolist() for n in range(PROMPTS)]
    with Pipeline.open(bundle.path, slots=SLOTS, capacity=CAPACITY, prefill_chunk=CHUNK) as pipeline:
        running = [pipeline.generate(prompt, max_tokens=NEW, logprobs=NEAR) for prompt in prompts]
        choices = [one.result(120).choices[0] for one in running]
    return [
        {
            "prompt": prompt,
            "tokens": list(choice.token_ids),
            "near": [[[token, entry.top[0][1] - one] for token, one in entry.top] for entry in choice.logprobs],
        }
        for prompt, choice in zip(prompts, choices, strict=True)
    ]


def batch(bundle: Bundle) -> dict[str, Array]:
    """Ragged rows, one full and one of a single token."""
    rng, inputs = np.random.default_rng(2), {}
    lengths = np.array([LENGTH, 1, *rng.integers(2, LENGTH, ROWS - 2)])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    for spec in Signature.of(bundle.manifest).inputs:
        if spec.name == "input_ids":
            inputs[spec.name] = rng.integers(3, bundle.manifest.vocabulary or 9, mask.shape) * mask
        else:
            inputs[spec.name] = mask if spec.name == "attention_mask" else np.zeros_like(mask)
    return inputs


def make_shape(config: dict[str, Any], folder: Path) -> None:
    """Export a shape, with random weights, which the export runs, and leave them out."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        synthesize(config, Path(scratch) / "checkpoint", seed=0, dtype="bfloat16")
        undraw(export(Path(scratch) / "checkpoint", folder))
    (folder / CONFIG).write_text(json.dumps(config))


def make(materials: Path, progress: Callable[[str], None]) -> None:
    """Make all that is not there yet."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def each(kind: str, name: str, build: Callable[[Path], object]) -> None:
        folder, aside = materials / kind / name, materials / kind / f"{name}.unfinished"
        if folder.is_dir():
            return
        progress(f"{kind}/{name}")
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        build(aside)
        aside.rename(folder)

    for name, case in ENCODERS.items():
        each("encoders", name, partial(_made, make_small, case))
    for name, case in DECODERS.items():
        each("decoders", name, partial(_made, make_decoder, case))
    for name, config in SHAPES.items():
        each("shapes", name, partial(make_shape, config))


def _made(maker: Callable[..., object], case: tuple[Any, ...], folder: Path) -> None:
    maker(folder, *case)


def _save(folder: Path, arrays: dict[str, Array]) -> None:
    np.savez_compressed(folder / "reference.npz", **arrays)  # type: ignore[arg-type]


def main() -> None:
    """Make them where gpu_proof.py looks for them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    make(MATERIALS, lambda what: print(what, flush=True))
    print(f"the materials are in {MATERIALS}")


if __name__ == "__main__":
    main()
