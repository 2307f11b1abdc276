"""A small model of images as people have them, and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The images are smaller than the config's, as those of the DINOv2 that people have.
DINO: dict[str, Any] = {
    "model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"], "image_size": 56, "patch_size": 8,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3,
    "id2label": {"0": "cat", "1": "dog", "2": "mat"}, "label2id": {"cat": 0, "dog": 1, "mat": 2},
}  # fmt: skip


def write_dino(folder: Path) -> None:
    """A checkpoint in bfloat16 with a preprocessor_config.json."""
    import transformers
    from stageline.exporter.synthesize import synthesize

    synthesize(DINO, folder, seed=6, dtype="bfloat16")
    processor = transformers.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)


def write_picture(file: Path) -> Path:
    """A picture of 90 x 50."""
    values = np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).resize((90, 50)).save(file)
    return file
