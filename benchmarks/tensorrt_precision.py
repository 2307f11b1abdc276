"""How far bfloat16 is from float32, token by token: the lowered stages, emulated, and torch in bfloat16.

    python benchmarks/tensorrt_precision.py bundles/smollm2 models/checkpoints/smollm2 \\
        --json benchmarks/results/tensorrt_precision.json

For a model that generates text. A copy of the bundle is cut into one stage per block and run on prompts of random
tokens. torch runs the same weights in bfloat16, with rotary tables in float32, as transformers loads them. Both are
compared with torch in float32. The error of a token is relative to its largest value (to 1 if that is smaller). If the
lowering were wrong, its errors would differ from torch's. No GPU is needed.
"""

import argparse
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stageline.exporter.commands.show import table
from stageline.exporter.verify.against_torch import load_reference
from stageline.exporter.verify.engines import TOLERANCE
from stageline.models.checkpoint import Checkpoint
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, StageFile
from stageline.runtime.engines.tensorrt.lower import Precision, lower

PROMPTS, BATCH, LENGTH = 256, 32, 33
PRECISION: Precision = "bf16"
LOGITS = "logits"


@dataclass(frozen=True)
class Errors:
    """The errors of one value over all tokens of all prompts. `outside`: tokens beyond the tolerance of
    `stageline verify`; `outside_early`: those of them at places 0 to 3 of their prompt; `top1`: the share of tokens
    whose largest element is the same as in float32."""

    what: str
    value: str
    median: float
    p90: float
    p99: float
    max: float
    tokens: int
    outside: int
    outside_early: int
    top1: float


@dataclass(frozen=True)
class Block:
    """The token with the worst error of the lowered stages at the middle block, behind one block."""

    prompt: int
    token: int
    value: str
    largest: float
    lowered_error: float
    torch_error: float


class Lowered:
    """The lowered model, one stage per block, emulated."""

    def __init__(self, bundle: Bundle) -> None:
        self.signature = Signature.of(bundle.manifest)
        self.stages = [
            EmulatedStage(
                lower(
                    StageFile(number, bundle.path / stage.file, bundle.path, stage.caches),
                    PRECISION,
                    LENGTH,
                    stripped=False,
                ),
                BATCH,
                LENGTH,
            )
            for number, stage in enumerate(bundle.manifest.stages)
        ]

    def values(self, ids: Array) -> dict[str, Array]:
        """Every stage's outputs for prompts [rows, length], all of full length. Caches begin at place 0."""
        values = dict(self.signature.check_inputs({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0])
        for stage in self.stages:
            values |= stage.run(values)
        return values


def torch_values(model: Any, ids: Array) -> dict[str, Array]:
    """torch's values behind each block, and its logits, in float32."""
    values: dict[str, Array] = {}
    with ExitStack() as hooks, torch.no_grad():
        for number, block in enumerate(model.model.layers, 1):
            hooks.enter_context(block.register_forward_hook(_keep(values, f"hidden.{number}")))
        values[LOGITS] = model(torch.from_numpy(ids)).logits.float().numpy()
    return values


def _keep(values: dict[str, Array], name: str) -> Any:
    def hook(module: torch.nn.Module, given: Any, output: Any) -> None:
        values[name] = (output[0] if isinstance(output, tuple) else output).float().numpy()

    return hook


def in_bfloat16(model: Any) -> Any:
    """A copy of a float32 model with its weights in bfloat16."""
    rotary = copy.deepcopy(model.model.rotary_emb)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.model.rotary_emb = rotary
    return half


def token_errors(got: Array, want: Array) -> Array:
    """The error of each token [rows, length] of values [rows, length, width]."""
    result: Array = np.abs(got - want).max(axis=-1) / np.abs(want).max(axis=-1).clip(min=1)
    return result


def measure(bundle: Bundle, model: Any, seed: int) -> Iterator[Errors | Block]:
    """The errors behind the middle block and at the end, and those of the worst token, block by block."""
    middle = f"hidden.{len(bundle.manifest.stages) // 2}"
    runs = {"lowered": Lowered(bundle).values}
    half = in_bfloat16(model)
    runs["torch"] = lambda ids: torch_values(half, ids)
    rng = np.random.default_rng(seed)
    errors: dict[tuple[str, str], list[Array]] = {(what, value): [] for value in (middle, LOGITS) for what in runs}
    same: dict[tuple[str, str], list[Array]] = {key: [] for key in errors}
    trail: list[Block] = []
    worst = -1.0
    for begin in range(0, PROMPTS, BATCH):
        ids = rng.integers(0, bundle.manifest.vocabulary, (BATCH, LENGTH))
        want = torch_values(model, ids)
        got = {what: run(ids) for what, run in runs.items()}
        for (what, value), found in errors.items():
            found.append(token_errors(got[what][value], want[value]))
            same[what, value].append(got[what][value].argmax(axis=-1) == want[value].argmax(axis=-1))
        latest = errors["lowered", middle][-1]
        if latest.max() > worst:
            worst = float(latest.max())
            row, token = divmod(int(latest.argmax()), LENGTH)
            trail = [
                Block(
                    begin + row, token, name, float(np.abs(want[name][row, token]).max()),
                    *(float(token_errors(got[w][name], want[name])[row, token]) for w in ("lowered", "torch")),
                )
                for name in want
                if name in got["lowered"]
            ]  # fmt: skip
    for (what, value), found in errors.items():
        all_errors = np.concatenate(found)
        outside = all_errors > TOLERANCE[PRECISION]
        median, p90, p99, largest = (float(q) for q in np.quantile(all_errors, [0.5, 0.9, 0.99, 1]))
        top1 = float(np.mean(same[what, value]))
        early = int(outside[:, :4].sum())
        yield Errors(what, value, median, p90, p99, largest, all_errors.size, int(outside.sum()), early, top1)
    yield from trail


def main() -> None:
    """Measure, print the tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stageline-precision-") as folder:
        path = Path(folder) / "bundle"
        shutil.copytree(arguments.bundle, path, ignore=shutil.ignore_patterns("engines"))
        recut(path, len(Bundle.open(path).manifest.uses) - 2)
        bundle = Bundle.open(path)
        model = load_reference(Checkpoint.open(arguments.checkpoint), bundle.manifest)
        found = list(measure(bundle, model, arguments.seed))
    errors = [figure for figure in found if isinstance(figure, Errors)]
    blocks = [figure for figure in found if isinstance(figure, Block)]
    rows = [
        [e.value, e.what, *(f"{q:.1e}" for q in (e.median, e.p90, e.p99, e.max)),
         f"{e.outside} of {e.tokens}", str(e.outside_early), f"{100 * e.top1:.1f}%"]
        for e in errors
    ]  # fmt: skip
    head = ["value", "", "median", "9 of 10", "99 of 100", "max", "outside", "of these at places 0-3", "same top-1"]
    print(table(head, rows))
    trail = [
        [f"{b.prompt}/{b.token}", b.value, f"{b.largest:.0f}", f"{b.lowered_error:.1e}",
         f"{b.torch_error:.1e}"]
        for b in blocks
    ]  # fmt: skip
    print("\n" + table(["prompt/token", "value", "largest", "lowered", "torch"], trail))
    if arguments.json is not None:
        document = {"errors": [asdict(e) for e in errors], "worst_token": [asdict(b) for b in blocks]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
