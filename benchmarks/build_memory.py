"""How much host memory does TensorRT-RTX take to build a stage?

    python benchmarks/build_memory.py --json benchmarks/results/build_memory.json

Stages of SmolLM2's shapes and of Llama's of 1, 8 and 70 billion parameters, bfloat16, with random weights (TensorRT
keeps equal ones once), each built in a process of its own for sm89. The peak is the most memory that the process had
resident, files that it has mapped included. No stage is built whose estimate is above --max-memory. The estimate was
fitted to all models but the one of 360 million parameters.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import export_cost
from stageline.exporter.commands.show import table
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.runtime import words
from stageline.runtime.builder.memory import build_bytes, peak_bytes
from stageline.runtime.builder.processes import Workers
from stageline.runtime.builder.profiles import narrowed, profiles_of
from stageline.runtime.builder.worker import Request
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import StageFile
from stageline.runtime.engines.tensorrt.lower import Precision, lower
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload

LOAD = Workload(length=128, capacity=2048)
MODELS = {
    **export_cost.MODELS,
    "SmolLM2 135M shapes": export_cost.llama(576, 30, 1536, 9, 3, True, 49_152),
    "Llama 360M shapes": export_cost.llama(960, 32, 2560, 15, 5, True, 49_152),  # SmolLM2 360M's
}
CUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "SmolLM2 135M shapes": ({}, (10, 20)),
    "Llama 360M shapes": ({}, (3, 12)),
    "Llama 1B shapes": ({}, (1, 1, 2, 4, 1)),
    "Llama 8B shapes": ({}, (1, 1, 2)),
    "Llama 70B shapes": ({"vocab_size": 8192}, (1,)),
}
"""What its config has else, and the blocks of its stages: the first also has the embeddings, the last the head."""


@dataclass(frozen=True)
class Row:
    """One build. `read_bytes` are the stage's weights in the bundle, `engine_bytes` the same in the engine's types."""

    model: str
    stage: int
    blocks: int
    precision: Precision
    read_bytes: int
    engine_bytes: int
    plan_bytes: int
    peak_bytes: int

    @property
    def estimate_bytes(self) -> float:
        """What `build --max-memory` reckons with."""
        return peak_bytes(self.blocks, self.read_bytes, self.engine_bytes, self.precision)


def bundles(folder: Path, only: str) -> Iterator[tuple[str, Bundle]]:
    """The models, exported."""
    for name, (changes, cut) in CUTS.items():
        if only in name:
            where = folder / name.replace(" ", "-")
            config = {**MODELS[name], **changes, "num_hidden_layers": sum(cut)}
            synthesize(config, where / "checkpoint", seed=1, dtype="bfloat16")
            yield name, export(where / "checkpoint", where / "bundle", stages=cut)
            shutil.rmtree(where)


def measure(
    model: str, bundle: Bundle, number: int, precision: Precision, folder: Path, max_bytes: float
) -> Row | None:
    """Build one stage; None where it would take more than `max_bytes`."""
    stage = bundle.manifest.stages[number]
    file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
    lowered = lower(file, precision, LOAD.capacity, stripped=False)
    engine_bytes = sum(weight.size_bytes for weight in lowered.weights.values())
    read_bytes = sum(t.nbytes for t in {w.tensor.name: w.tensor for w in lowered.weights.values()}.values())
    if build_bytes(bundle, number, precision) > max_bytes:
        print(f"{model}, stage {number}, {precision}: not built, too large", file=sys.stderr)
        return None
    request = Request(
        stage=file,
        flavour="tensorrt-rtx",
        target="sm89",
        precision=precision,
        capacity=LOAD.capacity,
        profiles=narrowed(profiles_of(bundle.manifest, LOAD), lowered.inputs),
        options=Options(),
        plan=folder / "plan",
        report=folder / "report",
    )
    answer: Any = Workers().run(request, lambda step: None)
    if "result" not in answer:
        sys.exit(f"{model}, stage {number}, {precision}: {answer}")
    result = answer["result"]
    blocks = stage.last_block - stage.first_block + 1
    plan_bytes = result["plan"]["size_bytes"]
    return Row(model, number, blocks, precision, read_bytes, engine_bytes, plan_bytes, result["peak_bytes"])


def main() -> None:
    """Measure, print a line for each build and the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp16", "fp32", "int8", "int4"])
    parser.add_argument("--max-memory", type=float, default=8, metavar="GB", help="of a build (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures here; rows of other models stay")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.json is not None and arguments.json.exists():
        rows = [Row(**row) for row in json.loads(arguments.json.read_text())]
    with tempfile.TemporaryDirectory(prefix="stageline-memory-") as temporary:
        folder = Path(temporary)
        for model, bundle in bundles(folder, arguments.only):
            for number in range(len(bundle.manifest.stages)):
                for precision in arguments.precision:
                    row = measure(model, bundle, number, precision, folder, arguments.max_memory * 1e9)
                    if row is None:
                        continue
                    print(row, flush=True, file=sys.stderr)
                    same = (row.model, row.stage, row.precision)
                    rows = [one for one in rows if (one.model, one.stage, one.precision) != same] + [row]
                    if arguments.json is not None:
                        arguments.json.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")
    print(_shown(rows))


def _shown(rows: Sequence[Row]) -> str:
    lines = [
        [r.model, str(r.stage), str(r.blocks), r.precision]
        + [words.size(size) for size in (r.read_bytes, r.engine_bytes, r.plan_bytes, r.peak_bytes, r.estimate_bytes)]
        for r in rows
    ]
    return table(["model", "stage", "blocks", "precision", "weights", "in engine", "plan", "peak", "estimate"], lines)


if __name__ == "__main__":
    main()
