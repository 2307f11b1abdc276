"""Image files as the tensor that a model of images reads, with Pillow alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import RequestError, StagelineError
from stageline.runtime.bundle.manifest import ImageSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Union[str, Path, "Image"]  # a name in quotes has no operator |


def pixel_values(images: Sequence[Picture], settings: ImageSettings) -> NDArray[np.float32]:
    """Images, or the files that hold them, as float32 [images, 3, height, width].

    A picture is turned as its camera says, and transparency is left out, as in transformers' pipelines.

    Raises:
        RequestError: there are no images, or one cannot be read.
        StagelineError: Pillow is not installed.
    """
    if not images:
        raise RequestError("there are no images; give at least one")
    return np.stack([_pixels(_opened(image), settings) for image in images])


def _opened(image: Picture) -> "Image":
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise StagelineError('images need Pillow, which is not installed: pip install "stageline[image]"') from error
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{image} cannot be read as an image ({error}); give a picture, such as a PNG") from error


def _pixels(image: "Image", settings: ImageSettings) -> NDArray[np.float32]:
    width, height = image.size
    if settings.shortest_edge is not None:
        short = settings.shortest_edge
        new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(new, settings.resample)
    elif settings.resize is not None:
        image = image.resize(settings.resize[::-1], settings.resample)
    if settings.crop is not None:
        (width, height), (high, wide) = image.size, settings.crop
        left, top = (width - wide) // 2, (height - high) // 2
        image = image.crop((left, top, left + wide, top + high))  # beyond its edges are zeros
    values: NDArray[np.float32] = np.asarray(image).astype(np.float32)
    if settings.scale is not None:
        values *= np.float32(settings.scale)
    if settings.mean is not None and settings.std is not None:
        values -= np.array(settings.mean, np.float32)
        values /= np.array(settings.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))
