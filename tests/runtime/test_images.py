"""Images become the pixels that transformers' image processors make of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stageline.models.errors import RequestError
from stageline.runtime.bundle.manifest import ImageSettings
from stageline.runtime.images import pixel_values
from transformers import BitImageProcessorPil, ViTImageProcessorPil
from transformers.image_utils import load_image

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> Image.Image:
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[:, :, 0] if channels == 1 else values)


@pytest.mark.parametrize("size", [(40, 60), (61, 35), (16, 16), (7, 90), (1, 1)])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_pixels_are_those_of_transformers(size: tuple[int, int], resample: int) -> None:
    """To a size, or by the shorter side and cropped; the crop is larger than some pictures then."""
    image = picture(np.random.default_rng(size[0]), *size)
    common: dict[str, Any] = {"resample": resample, "image_mean": list(MEAN), "image_std": list(STD)}
    ours: dict[str, Any] = {"resample": resample, "scale": 1 / 255, "mean": MEAN, "std": STD}
    square = ViTImageProcessorPil(size={"height": 24, "width": 18}, **common)
    cropped = BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 17}, **common)
    for processor, settings in (
        (square, ImageSettings(resize=(24, 18), **ours)),
        (cropped, ImageSettings(shortest_edge=20, crop=(24, 17), **ours)),
    ):
        want = np.asarray(processor(image, return_tensors="np")["pixel_values"])
        got = pixel_values([image], settings)
        assert got.dtype == np.float32
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-5


def test_files_are_opened_as_transformers_opens_them(tmp_path: Path) -> None:
    """Turned as the camera says, gray and transparent ones in RGB."""
    rng = np.random.default_rng(1)
    turned = picture(rng, 20, 30)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    picture(rng, 30, 20, 1).save(tmp_path / "gray.png")
    picture(rng, 30, 20, 4).save(tmp_path / "clear.png")
    files = [tmp_path / name for name in ("turned.png", "gray.png", "clear.png")]
    got = pixel_values(files, ImageSettings(resize=(30, 20)))
    for file, pixels in zip(files, got, strict=True):
        want = np.asarray(load_image(str(file))).transpose(2, 0, 1)
        assert np.array_equal(pixels, want)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    for wrong, line in (
        ([tmp_path / "a.png"], "a.png cannot be read as an image"), ([tmp_path / "none.png"], "No such file"),
        ([tmp_path], "cannot be read as an image"), ([], "there are no images"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=line):
            pixel_values(wrong, ImageSettings(resize=(4, 4)))


def test_an_image_too_large_to_unpack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(np.random.default_rng(0), 40, 40).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RequestError, match="cannot be read as an image"):
        pixel_values([tmp_path / "bomb.png"], ImageSettings(resize=(4, 4)))
