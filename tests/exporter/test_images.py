"""Checkpoints of models of images: their image processor is followed from file to answer, or a note says why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from images import DINO, write_dino, write_picture
from stageline.exporter.commands import cli
from stageline.exporter.export import export
from stageline.exporter.images import image_settings
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.against_torch import verify
from stageline.models.checkpoint import Checkpoint
from stageline.runtime import Pipeline
from stageline.runtime.bundle.folder import Bundle, write_manifest
from stageline.runtime.bundle.manifest import ImageSettings

Sides = tuple[Path, Path]


@pytest.fixture(scope="module")
def dino(made_once: Callable[..., Path]) -> Sides:
    """A checkpoint and its bundle; do not change them."""
    source = made_once("dino-from", write_dino)
    return source, made_once("dino", lambda folder: export(source, folder))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_picture(tmp_path / "picture.png")


def test_an_image_file_is_classified_as_by_transformers(
    dino: Sides, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, bundle = dino
    model = transformers.AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    want = {
        one["label"]: one["score"]
        for one in transformers.pipeline("image-classification", model=model, image_processor=processor)(str(picture))
    }
    with Pipeline.open(bundle) as pipeline:
        got = pipeline.classify_images([picture])[0]
    assert np.abs(got - [want["cat"], want["dog"], want["mat"]]).max() <= 1e-5
    assert cli.main(["run", str(bundle), "--image", str(picture), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["labels"]
    assert found[0] == {
        "label": max(want, key=want.__getitem__),
        "probability": pytest.approx(max(want.values()), 1e-4),
    }


def test_verify_compares_from_image_to_answer(dino: Sides, tmp_path: Path) -> None:
    source, bundle = dino
    done = verify(bundle, source, seed=3)
    assert done.passed
    assert [text.step for text in done.texts] == ["image to pixels", "image to answer"]
    opened = Bundle.open(bundle)
    assert opened.manifest.image is not None
    darker = opened.manifest.image.model_copy(update={"scale": 1 / 512})
    shutil.copytree(bundle, tmp_path / "b")
    write_manifest(tmp_path / "b", opened.manifest.model_copy(update={"image": darker}))
    done = verify(tmp_path / "b", source, seed=3)
    assert [text.passed for text in done.texts] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--text", "a cat"], "is a model of images; give --image"),
        (["--text", "a cat", "--image", "x.png"], "not several of them"),
        (["--image", "x.png"], "x.png cannot be read as an image"),
    ],
)
def test_what_is_not_an_image_is_one_line(
    dino: Sides, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(dino[1]), *arguments]) in (1, 2)
    assert line in capsys.readouterr().err


def test_a_model_of_text_takes_no_images(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(tiny_bundle), "--image", "x.png"]) == 1
    assert "is a model of text; give --text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (transformers.ViTImageProcessorPil(size={"height": 20, "width": 30}, do_normalize=False), (20, 30)),
        (transformers.DeiTImageProcessorPil(size={"height": 26, "width": 26}, crop_size={"height": 20, "width": 20}),
         (20, 20)),
        (transformers.ConvNextImageProcessorPil(size={"shortest_edge": 30}), (30, 30)),
        (transformers.ConvNextImageProcessorPil(size={"shortest_edge": 384}), (384, 384)),
        (transformers.LevitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
         (28, 28)),
        (transformers.PoolFormerImageProcessorPil(size={"shortest_edge": 27}, crop_size={"height": 27, "width": 27}),
         (27, 27)),
        (transformers.CLIPImageProcessorPil(do_rescale=False, size={"shortest_edge": 9},
                                            crop_size={"height": 9, "width": 8}), (9, 8)),
        (transformers.EfficientNetImageProcessorPil(size={"height": 20, "width": 20}), None),
        (transformers.BitImageProcessorPil(size={"shortest_edge": 20}, do_center_crop=False), None),
    ],
)  # fmt: skip
def test_settings_are_proven_or_left_out(tmp_path: Path, processor: Any, size: tuple[int, int] | None) -> None:
    synthesize({**DINO, "num_hidden_layers": 1}, tmp_path / "c", seed=1, dtype="bfloat16")
    processor.save_pretrained(tmp_path / "c")
    notes: list[str] = []
    found = image_settings(Checkpoint.open(tmp_path / "c"), notes)
    assert (found and found.size) == size
    assert len(notes) == (size is None)


def test_without_a_processor_a_note_says_so(tmp_path: Path) -> None:
    synthesize({**DINO, "num_hidden_layers": 1}, tmp_path / "c", seed=1, dtype="bfloat16")
    notes: list[str] = []
    assert image_settings(Checkpoint.open(tmp_path / "c"), notes) is None
    assert notes[0].startswith("the bundle takes pixel_values only, no image files")
    assert ImageSettings(crop=(3, 4), shortest_edge=2).size == (3, 4)
