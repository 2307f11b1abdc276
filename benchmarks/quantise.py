"""What quantising at export costs SmolLM2: perplexity by bits and group, beside the float checkpoint's.

    python benchmarks/quantise.py FOLDER [--gguf FILE] [--output FILE]

FOLDER: a checkpoint of floats. A row gives the perplexity where an engine computes with the numbers as they are
(OpenVINO, in float32), and in ONNX Runtime, which also rounds activations to 8 bits. `--gguf`: a row for a file whose
weights are quantised already. Needs the extras cpu, openvino and export.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stageline.exporter.export import export
from stageline.exporter.quantise.choice import Quantisation
from stageline.exporter.verify.perplexity import Perplexity, evaluation_texts, perplexity
from stageline.runtime.options import PipelineOptions

WAYS = [Quantisation(dtype, group) for dtype in ("int8", "int4") for group in (32, 64, 128)]
ENGINES = ("openvino", "onnxruntime")


def _row(name: str, source: Path, checkpoint: Path, quantise: Quantisation | None) -> dict[str, Any]:
    """Export and measure one way; print its line of the table."""
    print(f"{name} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(source, Path(folder) / "bundle", quantise=quantise)
        found = {
            engine: perplexity(bundle.path, checkpoint, evaluation_texts(), PipelineOptions(engine=engine))
            for engine in ENGINES
        }
        size = bundle.weight_bytes
    print(f"| {name} | {size / 1e6:.0f} | {' | '.join(_cell(found[engine]) for engine in ENGINES)} |", flush=True)
    return {"name": name, "weight_bytes": size, **{engine: asdict(one) for engine, one in found.items()}}


def _cell(found: Perplexity) -> str:
    assert found.increase is not None
    return f"{found.perplexity:.2f} ({found.increase:+.2%}) | {found.agreement:.1%}"


def main() -> None:
    """Measure and print every row, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    print("| weights | MB | perplexity | same token | in onnxruntime | same token |\n|---|---|---|---|---|---|")
    rows = [_row("float32", given.folder, given.folder, None)]
    if given.gguf is not None:
        rows.append(_row(f"{given.gguf.name}, as it is", given.gguf, given.folder, None))
    rows += [_row(f"{way.dtype}, group {way.group}", given.folder, given.folder, way) for way in WAYS]
    if given.output is not None:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
