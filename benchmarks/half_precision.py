"""bfloat16 and float16 checkpoints of many architectures: how far is each engine, and torch itself, from float32?

    python benchmarks/half_precision.py --json benchmarks/results/half_precision.json

The architectures are those of tests/exporter/test_parity.py and test_cached.py, tiny and random, saved in half
precision. torch in float32 with the same weights is the reference. Compared with it are the bundle on CPU cores (ONNX
Runtime, which computes in float32), its stages as lowered for TensorRT in the checkpoint's type (emulated: each value
is rounded to its type), and torch in the checkpoint's type. An error is the largest over all values of 8 rows of 33
tokens, or of 8 images, as a fraction of the largest value. "Same" is the share of tokens, or of rows, whose largest
element is that of the reference. Exits with 1 if the CPU's error is above 1e-4, or the lowered one above twice torch's
own (and above the tolerance of `stageline verify`).
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from stageline.exporter.commands.show import table
from stageline.exporter.export import export
from stageline.exporter.verify.engines import TOLERANCE
from stageline.runtime import Pipeline
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, StageFile
from stageline.runtime.engines.tensorrt.lower import Precision, lower

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "tests/exporter")]
ROWS, LENGTH = 8, 33
CPU_TOLERANCE = 1e-4
PRECISION: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Row:
    """One architecture in one type: errors, and shares of equal largest elements."""

    name: str
    dtype: str
    cpu: float
    lowered: float
    torch: float
    cpu_same: float
    lowered_same: float
    torch_same: float

    @property
    def holds(self) -> bool:
        """Whether no figure is beyond its bound."""
        bound = max(TOLERANCE[PRECISION[self.dtype]], 2 * self.torch)
        return self.cpu <= CPU_TOLERANCE and self.lowered <= bound


def architectures() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Name, model type, config and class of each."""
    test_parity, test_cached = (importlib.import_module(name) for name in ("test_parity", "test_cached"))
    for name, (model_type, values, saved_as) in test_parity.ARCHITECTURES.items():
        yield name, model_type, values, saved_as
    for model_type, saved_as, values in test_cached.CACHED.values():
        yield model_type, model_type, values, saved_as


def inputs_of(bundle: Bundle, seed: int) -> dict[str, Array]:
    """Random full rows: the caches of an emulated stage begin at place 0."""
    from parity import random_inputs

    inputs = random_inputs(bundle, seed, ROWS, LENGTH)
    if "attention_mask" in inputs:
        inputs["attention_mask"][:] = 1
        inputs["input_ids"] = np.random.default_rng(seed).integers(3, bundle.manifest.vocabulary, (ROWS, LENGTH))
    return inputs


def lowered(bundle: Bundle, precision: Precision, inputs: dict[str, Array]) -> Array:
    """The last output of the bundle's stages as lowered for TensorRT, emulated."""
    values = dict(Signature.of(bundle.manifest).check_inputs(inputs)[0])
    for number, stage in enumerate(bundle.manifest.stages):
        file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
        values |= EmulatedStage(lower(file, precision, LENGTH, stripped=False), ROWS, LENGTH).run(values)
    return np.asarray(values[bundle.manifest.outputs[-1].name], np.float32)


def in_torch(checkpoint: Path, saved_as: str, dtype: str, inputs: dict[str, Array]) -> Array:
    """The first output of transformers, with eager attention, computed in `dtype`."""
    kind = getattr(transformers, saved_as)
    model = kind.from_pretrained(checkpoint, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
    given = {
        name: torch.from_numpy(np.array(value))
        if value.dtype.kind == "i"
        else torch.from_numpy(value.astype(np.float32)).to(model.dtype)  # NumPy alone knows no bfloat16
        for name, value in inputs.items()
    }
    with torch.no_grad():
        result: Array = model(**given)[0].float().numpy()
    return result


def error(got: Array, want: Array) -> float:
    """The largest difference, as a fraction of the largest value; infinite where a value is no number."""
    found = float(np.abs(got - want).max() / np.abs(want).max())
    return found if np.isfinite(found) else float("inf")


def same(got: Array, want: Array) -> float:
    """The share of rows along the last axis whose largest element is the same."""
    return float(np.mean(got.argmax(-1) == want.argmax(-1)))


def measure(name: str, model_type: str, values: dict[str, Any], saved_as: str, dtype: str, folder: Path) -> Row:
    """Export an architecture in a type and compare."""
    synthesize = importlib.import_module("test_parity").synthesize
    checkpoint = synthesize(folder / "checkpoint", model_type, values, saved_as, dtype)
    bundle = export(checkpoint, folder / "bundle")
    inputs = inputs_of(bundle, seed=1)
    want = in_torch(checkpoint, saved_as, "float32", inputs)
    with Pipeline.open(bundle.path) as pipeline:
        cpu = pipeline.run(inputs)[bundle.manifest.outputs[-1].name].astype(np.float32)
    half, own = lowered(bundle, PRECISION[dtype], inputs), in_torch(checkpoint, saved_as, dtype, inputs)
    found = (cpu, half, own)
    return Row(name, dtype, *(error(got, want) for got in found), *(same(got, want) for got in found))


def main() -> None:
    """Measure, print a line for each and the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="architectures whose name holds this")
    parser.add_argument("--dtype", nargs="+", choices=PRECISION, default=list(PRECISION))
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: list[Row] = []
    for name, model_type, values, saved_as in architectures():
        for dtype in arguments.dtype if arguments.only in name else ():
            with tempfile.TemporaryDirectory(prefix="stageline-half-") as folder:
                found.append(measure(name, model_type, values, saved_as, dtype, Path(folder)))
            print(found[-1], flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    rows = [
        [r.name, r.dtype, *(f"{e:.1e}" for e in (r.cpu, r.lowered, r.torch)),
         *(f"{100 * s:.1f}%" for s in (r.cpu_same, r.lowered_same, r.torch_same)), "" if r.holds else "BEYOND"]
        for r in found
    ]  # fmt: skip
    head = ["architecture", "type", "CPU", "lowered", "torch", "same: CPU", "lowered", "torch", ""]
    print("\n" + table(head, rows))
    sys.exit(not all(row.holds for row in found))


if __name__ == "__main__":
    main()
