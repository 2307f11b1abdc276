"""A bundle against transformers: the inputs, the reference, and the comparison at every way of cutting it."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.pipeline import Pipeline


def random_inputs(bundle: Bundle, seed: int, rows: int = 5, length: int = 19) -> dict[str, np.ndarray]:
    """Fresh inputs: ragged rows padded on the right, one of them full and one of a single token; or random images."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for spec in Signature.of(bundle.manifest).inputs:
        shape = [{"batch": rows, "length": length}[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "attention_mask":
            lengths = np.array([length, 1, *rng.integers(2, length, rows - 2)])
            made[spec.name] = (np.arange(length) < lengths[:, None]).astype(np.int64)
        elif spec.name == "token_type_ids":
            made[spec.name] = rng.integers(0, 2, shape)
        elif spec.name == "input_ids":
            made[spec.name] = rng.integers(3, bundle.manifest.vocabulary, shape)
        else:
            made[spec.name] = rng.standard_normal(shape).astype(np.float32)  # pipelines take half precision so
    if "attention_mask" in made:
        made["input_ids"][made["attention_mask"] == 0] = 0
    return made


def reference(checkpoint: Path, saved_as: str) -> Any:
    """The model in transformers, with eager attention in float32, whatever its weights are stored in."""
    load = getattr(transformers, saved_as).from_pretrained
    return load(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def outputs_of(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The model's first output."""
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return np.asarray(result[0])


def check_every_cut(path: Path, model: Any, tolerance: float) -> None:
    """At 1 stage, 2 stages and one block a stage, the bundle gives what the model gives, padding left out."""
    bundle = Bundle.open(path)
    output = bundle.manifest.outputs[-1].name
    for seed, stages in enumerate((1, 2, bundle.manifest.blocks)):
        bundle = recut(path, stages)
        inputs = random_inputs(bundle, seed)
        with Pipeline.open(path) as pipeline:
            got = pipeline.run(inputs)[output]
        want = outputs_of(model, inputs)
        real = inputs["attention_mask"] == 1 if "attention_mask" in inputs and got.ndim == 3 else ...
        assert got.shape == want.shape
        assert np.abs(got[real] - want[real]).max() <= tolerance, f"{stages} stages"
    if kept := os.environ.get("STAGELINE_PARITY"):  # for tests/reality
        name = re.sub(r"\W+", "-", os.environ["PYTEST_CURRENT_TEST"].split("::")[-1])
        shutil.copytree(path, Path(kept) / name, dirs_exist_ok=True)
