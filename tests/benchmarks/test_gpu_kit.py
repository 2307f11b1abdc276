"""The kit for a GPU machine: what is taken out of a CUDA library, and weights that are drawn there."""

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import gpu_drawing
import gpu_kit
import numpy as np
import pytest
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.pipeline import Pipeline


def fatbin(*codes: tuple[int, bytes]) -> bytes:
    """A fat binary of codes (compute capability, bytes) as NVIDIA's fatbinary writes it."""
    entries = b"".join(
        struct.pack("<HHIQIIIIQQQQ", 2, 0x101, 64, len(code), 0, 0, 0, capability, 0, 0, 0, 0) + code
        for capability, code in codes
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_only_code_for_other_gpus_is_zeroed() -> None:
    before, other = b"\x7fELF" + struct.pack("<I", 0xBA55ED50) + b"no fat binary", b"between"
    parts = [before, fatbin((80, b"a" * 40), (90, b"b" * 24)), other, fatbin((120, b"c" * 8)), b"end"]
    library = bytearray(b"".join(parts))
    assert gpu_kit.slim(library, 90) == 48
    parts[1], parts[3] = fatbin((80, bytes(40)), (90, b"b" * 24)), fatbin((120, bytes(8)))
    assert library == b"".join(parts)


def test_a_gpu_without_code_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="no code for compute capability 100; it has: 80, 90"):
        gpu_kit.slim(bytearray(fatbin((80, b"a"), (90, b"b"))), 100)


def test_the_script_fits_a_short_command_and_is_valid(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(gpu_kit.RUN.replace("{parts}", "2"))
    assert script.stat().st_size < 2000
    subprocess.run(["bash", "-n", script], check=True)


def test_weights_are_drawn_where_the_bundle_is(tmp_path: Path, tiny_llama: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "bundle"))
    before = Bundle.open(folder)
    gpu_drawing.undraw(before)
    assert not list(folder.rglob("*.safetensors"))
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(folder)
    gpu_drawing.draw(folder)
    drawn = Bundle.open(folder)
    assert {n: (t.shape, t.offset) for n, t in drawn.tensors.items()} == {
        n: (t.shape, t.offset) for n, t in before.tensors.items()
    }
    ids: dict[str, Any] = {"input_ids": np.array([[3, 4, 5]])}
    with Pipeline.open(folder) as pipeline:
        assert np.isfinite(pipeline.run(ids)["logits"]).all()
    (file,) = (folder / name for name in drawn.manifest.weight_files)
    written = file.stat().st_mtime_ns
    gpu_drawing.draw(folder)  # they are there
    assert file.stat().st_mtime_ns == written
