"""What quantising at export costs SmolLM2: perplexity by bits and group, beside the float checkpoint's.

    python benchmarks/quantise.py FOLDER [--gguf FILE] [--only NAME] [--output FILE]

FOLDER: a checkpoint of floats. A row gives the perplexity where an engine computes with the numbers as they are
(OpenVINO, in float32), and in ONNX Runtime, which also rounds activations to 8 bits. `--gguf`: a row for a file whose
weights are quantised already. `--only`: one way, by its name in the table, such as "int4, group 32, gptq". Needs the
extras cpu, openvino and export.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stageline.exporter.export import export
from stageline.exporter.quantise.choice import Quantisation
from stageline.exporter.verify.perplexity import Perplexity, evaluation_texts, perplexity
from stageline.runtime.options import PipelineOptions

WAYS = [Quantisation(dtype, group) for dtype in ("int8", "int4") for group in (32, 64, 128)]
WAYS += [Quantisation("int4", group, "gptq") for group in (32, 128)]
ENGINES = ("openvino", "onnxruntime")


def _row(name: str, source: Path, checkpoint: Path, quantise: Quantisation | None) -> dict[str, Any]:
    """Export and measure one way; print its line of the table."""
    print(f"{name} ...", file=sys.stderr)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(source, Path(folder) / "bundle", quantise=quantise)
        seconds = time.perf_counter() - begin
        found = {
            engine: perplexity(bundle.path, checkpoint, evaluation_texts(), PipelineOptions(engine=engine))
            for engine in ENGINES
        }
        size = bundle.weight_bytes
    print(f"| {name} | {size / 1e6:.0f} | {' | '.join(_cell(found[engine]) for engine in ENGINES)} |", flush=True)
    return {
        "name": name,
        "weight_bytes": size,
        "export_s": seconds,
        **{engine: asdict(one) for engine, one in found.items()},
    }


def _name(way: Quantisation) -> str:
    return f"{way.dtype}, group {way.group}" + (", gptq" if way.method == "gptq" else "")


def _cell(found: Perplexity) -> str:
    assert found.increase is not None
    return f"{found.perplexity:.2f} ({found.increase:+.2%}) | {found.agreement:.1%}"


def main() -> None:
    """Measure and print every row, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=[_name(way) for way in WAYS], metavar="NAME")
    given = parser.parse_args()
    print("| weights | MB | perplexity | same token | in onnxruntime | same token |\n|---|---|---|---|---|---|")
    rows = [] if given.only else [_row("float32", given.folder, given.folder, None)]
    if given.gguf is not None:
        rows.append(_row(f"{given.gguf.name}, as it is", given.gguf, given.folder, None))
    chosen = [way for way in WAYS if given.only in (None, _name(way))]
    rows += [_row(_name(way), given.folder, given.folder, way) for way in chosen]
    if given.output is not None:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
