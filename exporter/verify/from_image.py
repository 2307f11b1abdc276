"""Comparing a bundle with its checkpoint from image to answer: the pixels of a picture, and what a user is given.

The reference is transformers' own image processor and pipeline. `from_text` is the same of texts.
"""

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from stageline.exporter.images import load_processor, sample_pictures
from stageline.exporter.verify.from_text import TextComparison
from stageline.exporter.verify.scale import token_errors, typical
from stageline.models.checkpoint import Checkpoint
from stageline.runtime.bundle.manifest import ImageSettings
from stageline.runtime.engines import Array
from stageline.runtime.images import pixel_values
from stageline.runtime.pipeline import Pipeline

_PIXELS = 1e-4
"""Of the largest value: both resize integers with Pillow, and compute in float32 afterwards."""


def compare_images(
    pipeline: Pipeline, settings: ImageSettings, checkpoint: Checkpoint, model: Any, tolerance: float
) -> tuple[TextComparison, ...]:
    """Compare the open bundle, whose images become pixels by `settings`, with the checkpoint on several pictures."""
    processor = load_processor(checkpoint)
    if processor is None:
        return ()
    manifest = pipeline.bundle.manifest
    hf: Any = None
    if manifest.task == "image-classification":
        count = len(manifest.labels or ()) or None
        hf = transformers.pipeline(manifest.task, model=model, image_processor=processor, device="cpu", top_k=count)
    pixels, answers = [], []
    for picture in sample_pictures():
        given = processor(picture, return_tensors="pt")["pixel_values"]
        pixels.append((picture, pixel_values([picture], settings)[0], given[0].numpy()))
        if hf is not None:
            found = {one["label"]: one["score"] for one in hf(picture)}
            want = np.array([found.get(name, np.nan) for name in manifest.labels or sorted(found)])
            answers.append((picture, pipeline.classify_images([picture])[0], want))
        else:
            name = manifest.outputs[-1].name
            got = pipeline.run({"pixel_values": pixel_values([picture], settings)}, [name])[name][0]
            with torch.no_grad():
                answers.append((picture, got, model(given)[name][0].numpy()))
    value = "scores" if hf is not None else manifest.outputs[-1].name
    return (
        _worst("image to pixels", "pixel_values", pixels, _PIXELS),
        _worst("image to answer", value, answers, tolerance),
    )


def _worst(step: str, value: str, compared: list[tuple[Image.Image, Array, Array]], tolerance: float) -> TextComparison:
    def error(one: tuple[Image.Image, Array, Array]) -> float:
        _, got, want = one
        if got.shape != want.shape:
            return float("inf")
        return float(token_errors(got.ravel(), want.ravel(), typical(want.ravel())).max())

    worst = max(compared, key=lambda one: np.nan_to_num(error(one), nan=np.inf))
    width, height = worst[0].size
    return TextComparison(step, value, error(worst), tolerance, f"a picture of {width} x {height}")
