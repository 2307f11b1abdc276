"""What TensorRT builds: the reference bundles, whole and stripped, and every architecture of the parity list.

    python benchmarks/tensorrt_builds.py --json benchmarks/results/tensorrt_builds.json

The reference bundles (bundles/minilm, bundles/smollm2, from `make demo`) are copied, cut into 2 stages and built for
all targets in fp16 and bf16, and for one with quantised weights. A second build must build nothing. After one weight is
changed, a third one, for the first target and precision, must build one stage. The architectures of
tests/exporter/test_parity.py are synthesised, exported, and built in 2 stages for all targets; if TensorRT rejects
one, the table shows its reason. The reference checkpoints, saved as bfloat16 by transformers, are exported and built
whole in every precision, stripped too, beside the bundles of the float32 ones. No GPU is needed.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stageline.exporter.commands.show import table
from stageline.exporter.export import export
from stageline.models.tensors import TensorEntry
from stageline.runtime import words
from stageline.runtime.builder.build import BuildOutcome, WantedEngine, build
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.lower import QUANTISED, Precision
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
TARGETS = ("portable", "sm80", "sm89", "sm120")
HALVES_TARGETS = ("sm89", "portable")
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")
STRIPPED_TARGET = QUANTISED_TARGET = "sm89"


@dataclass(frozen=True)
class Engine:
    """One engine of a reference bundle. `plan_bytes`: its engine file on disk."""

    model: str
    stage: int
    target: str
    precision: str
    weights: str
    plan_bytes: int
    build_s: float


@dataclass(frozen=True)
class Again:
    """What later builds did: with nothing changed, and with one tensor of one stage changed."""

    model: str
    engines: int
    first_s: float
    second_s: float
    built_second: int
    changed: str
    of_stage: int
    stages_rebuilt: tuple[int, ...]
    built_third: int


@dataclass(frozen=True)
class Architecture:
    """An architecture of the parity list for one target and precision: bytes and seconds of all stages, or TensorRT's
    reason to reject it."""

    name: str
    target: str
    precision: str
    caches: bool
    plan_bytes: int
    build_s: float
    error: str | None


@dataclass(frozen=True)
class Halves:
    """Bytes of a whole model's engine, from the bundle of its bfloat16 checkpoint and from that of the float32 one."""

    model: str
    target: str
    precision: str
    weights: str
    bfloat16_bytes: int
    float32_bytes: int


def reference(name: str, folder: Path) -> tuple[list[Engine], Again]:
    """Build the reference bundle `name`, full and, for one target, stripped; again; and with one weight changed."""
    bundle = _copy(ROOT / "bundles" / name, folder / name)
    recut(bundle, 2)
    wanted = [WantedEngine(TENSORRT_RTX, target, precision) for target in TARGETS for precision in PRECISIONS]
    begin = time.perf_counter()
    full = _build(bundle, wanted, Options())
    first_s = time.perf_counter() - begin
    begin = time.perf_counter()
    second = _build(bundle, wanted, Options())
    second_s = time.perf_counter() - begin
    stripped = _build(bundle, [kind for kind in wanted if kind.target == STRIPPED_TARGET], Options(stripped=True))
    quantised = _build(bundle, [WantedEngine(TENSORRT_RTX, QUANTISED_TARGET, kind) for kind in QUANTISED], Options())
    tensor, stage = _change_one_weight(bundle)
    third = [outcome for outcome in _build(bundle, wanted[:1], Options()) if outcome.built]
    rebuilt = tuple(sorted({outcome.stage for outcome in third}))
    built = sum(outcome.built for outcome in second)
    engines = [_engine(name, outcome) for outcome in (*full, *stripped, *quantised)]
    return engines, Again(name, len(full), first_s, second_s, built, tensor, stage, rebuilt, len(third))


def _engine(name: str, outcome: BuildOutcome) -> Engine:
    assert outcome.record is not None, outcome.error
    kind, record = outcome.wanted, outcome.record
    weights = "bundle's" if record.options.stripped else "inside"
    return Engine(name, outcome.stage, kind.target, kind.precision, weights, record.plan.size_bytes, record.build_s)


def parity(folder: Path, wanted: Sequence[WantedEngine]) -> Iterator[Architecture]:
    """Build every architecture of the parity list for all wanted targets and precisions."""
    spec = importlib.util.spec_from_file_location("test_parity", ROOT / "tests/exporter/test_parity.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(ROOT / "tests/helpers"))  # which it imports
    tests: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    for name, (model_type, values, saved_as) in tests.ARCHITECTURES.items():
        checkpoint = tests.synthesize(folder / name / "checkpoint", model_type, values, saved_as)
        bundle = export(checkpoint, folder / name / "bundle", stages=2)
        outcomes = _build(bundle.path, wanted, Options())
        for kind in wanted:
            mine = [outcome for outcome in outcomes if outcome.wanted == kind]
            errors = [f"stage {outcome.stage}: {outcome.error}" for outcome in mine if outcome.error is not None]
            records = [outcome.record for outcome in mine if outcome.record is not None]
            yield Architecture(
                name,
                kind.target,
                kind.precision,
                bundle.manifest.cached,
                sum(record.plan.size_bytes for record in records),
                sum(record.build_s for record in records),
                errors[0] if errors else None,
            )
        shutil.rmtree(folder / name)


def halves(name: str, folder: Path) -> Iterator[Halves]:
    """Build the reference checkpoint `name`, in bfloat16 and in float32, for `HALVES_TARGETS` in every precision."""
    saved = _saved_in_bfloat16(ROOT / "models/checkpoints" / name, folder / f"{name}.bfloat16")
    twins = (export(saved, folder / f"{name}.halves").path, _copy(ROOT / "bundles" / name, folder / f"{name}.float32"))
    recut(twins[1], 1)
    for options in (Options(), Options(stripped=True)):
        kinds = (*PRECISIONS, *(() if options.stripped else QUANTISED))
        wanted = [WantedEngine(TENSORRT_RTX, target, kind) for target in HALVES_TARGETS for kind in kinds]
        for kind in wanted:
            half, whole = (_engine(name, _build(twin, [kind], options)[0]) for twin in twins)
            yield Halves(name, kind.target, kind.precision, half.weights, half.plan_bytes, whole.plan_bytes)


def _saved_in_bfloat16(checkpoint: Path, to: Path) -> Path:
    """The checkpoint as transformers saves it in bfloat16, with the small files beside it."""
    gguf = next((file.name for file in checkpoint.glob("*.gguf")), None)
    kind = AutoModel if gguf is None else AutoModelForCausalLM
    loaded = kind.from_pretrained(checkpoint, gguf_file=gguf, dtype=torch.bfloat16)
    if gguf is not None:  # transformers does not save a model that it loaded from a .gguf file
        vars(loaded.config).pop("quantization_config", None)
        fresh = type(loaded)(loaded.config).to(torch.bfloat16)
        fresh.load_state_dict(loaded.state_dict())
        AutoTokenizer.from_pretrained(checkpoint, gguf_file=gguf).save_pretrained(to)
        loaded = fresh
    else:
        shutil.copytree(checkpoint, to)
    loaded.save_pretrained(to)
    return to


def _build(path: Path, wanted: Sequence[WantedEngine], options: Options) -> list[BuildOutcome]:
    bundle = Bundle.open(path)
    limit = bundle.manifest.max_positions or 2048
    load = Workload(length=min(128, limit), capacity=min(2048, limit))
    return build(bundle, wanted, load, options, done=lambda outcome: print(".", end="", file=sys.stderr))


def _copy(bundle: Path, to: Path) -> Path:
    shutil.copytree(bundle, to, ignore=shutil.ignore_patterns("engines"))
    return to


def _change_one_weight(path: Path) -> tuple[str, int]:
    """Change one element of a matrix that only the last stage reads; returns its name and that stage."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    last = len(manifest.stages) - 1
    use = manifest.uses[manifest.stages[last].last_block + 1]
    name = next(name for name in use.weights.values() if len(bundle.tensors[name].shape) == 2)
    entry = bundle.tensors[name]
    entry = entry if isinstance(entry, TensorEntry) else next(iter(entry.parts.values()))
    data = np.memmap(entry.file, np.uint8, "r+", entry.offset, (entry.size_bytes,))
    data[1] ^= 1
    data.flush()
    file = entry.file.relative_to(path).as_posix()
    files = tuple(file_entry(path, file) if listed.path == file else listed for listed in manifest.files)
    write_manifest(path, manifest.model_copy(update={"files": files}))
    return name, last


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="stageline-tensorrt-") as folder:
        yield Path(folder)


def _show(
    engines: Sequence[Engine], agains: Sequence[Again], architectures: Sequence[Architecture], twins: Sequence[Halves]
) -> str:
    parts = []
    if engines:
        rows = [
            [e.model, str(e.stage), e.target, e.precision, e.weights, words.size(e.plan_bytes), f"{e.build_s:.1f}"]
            for e in engines
        ]
        head = ["model", "stage", "target", "precision", "weights", "engine", "build s"]
        parts.append(table(head, rows))
    parts += [
        f"{a.model}: {a.engines} engines in {a.first_s:.0f} s; again: {a.built_second} built, {a.second_s:.1f} s; with "
        f"{a.changed} of stage {a.of_stage} changed: {a.built_third} built for {TARGETS[0]} in {PRECISIONS[0]}, of "
        f"stage {', '.join(map(str, a.stages_rebuilt))}"
        for a in agains
    ]
    if architectures:
        rows = [
            [a.name, a.target, a.precision, "yes" if a.caches else "no",
             words.size(a.plan_bytes) if not a.error else "-", f"{a.build_s:.1f}" if not a.error else "-",
             a.error or "builds"]
            for a in architectures
        ]  # fmt: skip
        parts.append(table(["architecture", "target", "precision", "caches", "engines", "build s", ""], rows))
        rejected = sum(a.error is not None for a in architectures)
        parts.append(f"{len(architectures) - rejected} of {len(architectures)} build")
    if twins:
        rows = [
            [t.model, t.target, t.precision, t.weights, words.size(t.bfloat16_bytes), words.size(t.float32_bytes)]
            for t in twins
        ]
        head = ["model", "target", "precision", "weights", "engine of bfloat16", "of float32"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def main() -> None:
    """Run, print the tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["reference", "parity", "halves"], help="run only one part")
    parser.add_argument("--target", action="append", help="of the architectures (default: all)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the architectures")
    parser.add_argument("--json", type=Path, help="write the figures here; a part keeps the other parts of the file")
    arguments = parser.parse_args()
    document: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists():
        document = json.loads(arguments.json.read_text())
    document["tensorrt_rtx"] = TENSORRT_RTX.version

    def keep() -> None:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")

    engines: list[Engine] = []
    agains: list[Again] = []
    architectures: list[Architecture] = []
    twins: list[Halves] = []
    with _folder() as folder:
        if arguments.only in (None, "reference"):
            for name in ("minilm", "smollm2"):
                more, again = reference(name, folder)
                engines += more
                agains.append(again)
            document |= {"engines": [asdict(e) for e in engines], "again": [asdict(a) for a in agains]}
        if arguments.only in (None, "halves"):
            for name in ("minilm", "smollm2"):
                for pair in halves(name, folder):
                    twins.append(pair)
                    document["halves"] = [asdict(twin) for twin in twins]
                    keep()
        if arguments.only in (None, "parity"):
            kinds = [WantedEngine(TENSORRT_RTX, t, p) for t in arguments.target or TARGETS for p in arguments.precision]
            kept = {(a["name"], a["target"], a["precision"]): a for a in document.get("architectures", [])}
            for found in parity(folder, kinds):
                architectures.append(found)
                kept[found.name, found.target, found.precision] = asdict(found)
                document["architectures"] = list(kept.values())
                keep()
    keep()
    print("\n" + _show(engines, agains, architectures, twins))


if __name__ == "__main__":
    main()
