"""How a checkpoint's images become pixels: what its preprocessor_config.json says, as the runtime can do it.

transformers makes the image processor; its settings are taken over, and what they give is compared with what it gives.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import transformers
from PIL import Image
from stageline.exporter.trace import quiet
from stageline.models.checkpoint import Checkpoint
from stageline.runtime.bundle.manifest import ImageSettings
from stageline.runtime.images import pixel_values

_FILES = ("preprocessor_config.json", "processor_config.json")
_SIZES = ((50, 70), (301, 200), (224, 224), (33, 518))  # height and width of the images that are compared
_ALIKE = 1e-4


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's image processor as transformers makes it; None if it has none, or one that cannot be made."""
    if not any((checkpoint.path / name).is_file() for name in _FILES):
        return None
    with quiet():
        try:
            return transformers.AutoImageProcessor.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=False, backend="pil"
            )  # torchvision, if it is installed, resizes to other values
        except Exception:  # each class of processor raises its own
            return None


def image_settings(checkpoint: Checkpoint, notes: list[str]) -> ImageSettings | None:
    """Settings that give what the checkpoint's image processor gives; None if there are none, and a note says why."""
    processor = load_processor(checkpoint)
    if processor is None:
        why = f"transformers makes no image processor of {' or '.join(_FILES)}"
    else:
        pictures = list(sample_pictures())
        try:
            want = [np.asarray(processor(one, return_tensors="np")["pixel_values"][0]) for one in pictures]
        except Exception as error:  # as above
            want, why = [], f"its {type(processor).__name__} fails ({' '.join(str(error).split())[:200]})"
        else:
            why = f"its {type(processor).__name__} does what the runtime does not"
        for settings in _candidates(processor) if want else ():
            if settings.size is not None and _gives(pictures, want, settings):
                return settings
    notes.append(f"the bundle takes pixel_values only, no image files: {why}")
    return None


def sample_pictures() -> Iterator[Image.Image]:
    """Smooth random pictures of several sizes, as unlike each other as photographs."""
    rng = np.random.default_rng(0)
    for height, width in _SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        yield coarse.resize((width, height), Image.Resampling.BICUBIC)


def _gives(pictures: list[Image.Image], want: list[Any], settings: ImageSettings) -> bool:
    return all(
        got.shape == pixels.shape and np.abs(got - pixels).max() <= _ALIKE
        for got, pixels in (
            (pixel_values([one], settings)[0], pixels) for one, pixels in zip(pictures, want, strict=True)
        )
    )


def _candidates(processor: Any) -> Iterator[ImageSettings]:
    """What the processor's attributes may mean: as they stand, or with the larger image that some classes crop from
    (ConvNeXT and PoolFormer by `crop_pct`, LeViT by a rule of its own)."""

    def stated(flag: str, name: str) -> Any:
        return getattr(processor, name, None) if getattr(processor, flag, None) else None

    size, crop = stated("do_resize", "size") or {}, stated("do_center_crop", "crop_size") or {}
    edge = size.get("shortest_edge")
    common: dict[str, Any] = {
        "resample": int(getattr(processor, "resample", None) or Image.Resampling.BILINEAR),
        "scale": stated("do_rescale", "rescale_factor"),
        "mean": stated("do_normalize", "image_mean"),
        "std": stated("do_normalize", "image_std"),
    }
    cropped = (crop["height"], crop["width"]) if crop.get("height") and crop.get("width") else None
    if size.get("height") and size.get("width"):
        yield ImageSettings(resize=(size["height"], size["width"]), crop=cropped, **common)
    elif edge and not size.get("longest_edge"):
        yield ImageSettings(shortest_edge=edge, crop=cropped, **common)
        yield ImageSettings(resize=(edge, edge), crop=cropped, **common)
        for share in (getattr(processor, "crop_pct", None), 224 / 256):
            if share:
                yield ImageSettings(shortest_edge=int(edge / share), crop=cropped or (edge, edge), **common)
