"""Which checkpoint formats work with which commands: each command is run on each format and its answer is checked.

    python benchmarks/compatibility.py --json benchmarks/results/compatibility.json --docs docs/compatibility.md

The checkpoints are those of tests/helpers/formats.py: a small generator and a small classifier in every format. A cell
is "yes" with the error against transformers in float32 (a fraction of the largest reference value), "refused" with the
one line that the command printed, WRONG (the error is too large), or "traceback". Engines are built by TensorRT-RTX for
sm89 and emulated on CPU cores. Each format has a process of its own. The JSON is written after each row, and keeps the
rows that were not tried now. Exits with 1 if a cell is WRONG or a traceback.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

TEXT = "The cat sat."
TEXTS = (TEXT, "Ünïcode, too: 今日は!")
TOLERANCE = 1e-3  # the reference has the same weights, and ONNX Runtime computes in float32 on CPU cores
PACKED_TOLERANCE = 0.1
QUANTISED_TOLERANCE = 0.15
"""Of a pipeline that quantises on opening, against transformers with weights rounded so: activations have 8 bits."""
BITS = {"int8": 8, "int4": 4}
SHARE = 0.9  # of tokens, as verify judges engines: random weights make a few tokens turn on the least difference
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
Verdict = Literal["yes", "refused", "WRONG", "traceback"]


@dataclass(frozen=True)
class Cell:
    """What one command did with one format. `error`: against the reference, where there is an answer to compare."""

    verdict: Verdict
    error: float | None = None
    line: str = ""
    seconds: float = 0.0


class RefusedError(Exception):
    """The command refused in one line."""


class WrongError(Exception):
    """The command gave something else than the reference."""


@dataclass
class Subject:
    """A checkpoint under trial: `name` as a user gives it to a command, `reference` in transformers (None: only to be
    refused), and `other`, with the same config and other weights."""

    name: str
    kind: str
    reference: Any
    folder: Path
    other: str | None = None
    other_reference: Any = None
    method: str = ""  # a word that its refusal must hold

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def command(self, *arguments: object) -> str:
        """Run a command as a user would, in this process. What it printed on stdout; RefusedError with its one line."""
        from stageline.exporter.commands import cli

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([str(argument) for argument in arguments])
        if status:
            raise RefusedError((err.getvalue().strip() or out.getvalue().strip()).splitlines()[-1])
        return out.getvalue()

    def opened(self, **options: Any) -> Any:
        """The pipeline, which computes with the exact values of weights that are quantised unless it is told other."""
        from stageline.runtime import Pipeline
        from stageline.runtime.bundle.folder import read_manifest

        return Pipeline.open(self.bundle, **{"quantise": read_manifest(self.bundle).exact, **options})

    @property
    def bound(self) -> float:
        """Of what a command computes, which keeps quantised weights, with activations of 8 bits."""
        from stageline.runtime.bundle.folder import read_manifest

        return PACKED_TOLERANCE if read_manifest(self.bundle).packed else TOLERANCE

    def check(self, pipeline: Any, bound: float, reference: Any = None, share: float = 1.0) -> float:
        """The error of the logits of random ragged rows, padding left out; of the better `share` of tokens."""
        import numpy as np
        import torch

        rng = np.random.default_rng()
        lengths = np.array([200, 1, 37])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        given = {"input_ids": rng.integers(3, 200, mask.shape) * mask + 2 * (1 - mask), "attention_mask": mask}
        if any(spec.name == "token_type_ids" for spec in pipeline.signature.inputs):
            given["token_type_ids"] = np.zeros_like(mask)
        with torch.no_grad():
            model = reference or self.reference
            want = model(**{name: torch.from_numpy(value) for name, value in given.items()}).logits.numpy()
        got = pipeline.run(given)["logits"].astype(np.float32)
        real = mask == 1 if want.ndim == 3 else ...
        return judged(got[real], want[real], bound, share)


def judged(got: Any, want: Any, bound: float, share: float = 1.0) -> float:
    """The largest difference of the better `share` of tokens, as a fraction of the largest value. WrongError beyond the
    bound; NaN is."""
    import numpy as np

    tokens = np.abs(np.asarray(got) - want).max(axis=-1)
    error = float(np.quantile(tokens, share, method="lower") / np.abs(want).max())
    if not error <= bound:
        raise WrongError(f"error {error:.1e}, at most {bound:.0e} is allowed")
    return error


# The commands. Each returns the error of what it gave, or None where there is only a success.


def export(subject: Subject) -> float:
    subject.command("export", subject.name, "-o", subject.bundle, "--stages", 2)
    with subject.opened() as pipeline:
        return subject.check(pipeline, TOLERANCE)


def inspect(subject: Subject) -> None:
    subject.command("inspect", subject.bundle)


def run(subject: Subject) -> float:
    """From text to probabilities, by the checkpoint's own tokenizer and activation."""
    import formats
    import numpy as np
    import torch

    asked = [option for text in TEXTS for option in ("--text", text)]
    answer = json.loads(subject.command("run", subject.bundle, *asked, "--json"))
    tokens = formats.tokenizer()
    worst = 0.0
    for number, text in enumerate(TEXTS):
        with torch.no_grad():
            logits = subject.reference(**tokens(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        if subject.kind == "generator":
            want = logits[-1].softmax(-1).numpy()
            got = {one["id"]: one["probability"] for one in answer["next"][number]}
        else:
            want = logits.sigmoid().numpy()
            got = {int(one["label"].removeprefix("LABEL_")): one["probability"] for one in answer["labels"][number]}
        given = np.array(list(got.values()))
        worst = max(worst, judged(given, want[list(got)], subject.bound))
    return worst


def verify(subject: Subject) -> float:
    done = json.loads(subject.command("verify", subject.bundle, "--against", subject.name, "--json"))
    return float(max(one["relative_error"] for one in done["comparisons"] if "relative_error" in one))


def recut(subject: Subject) -> float:
    subject.command("recut", subject.bundle, "--layers", "2,1")
    with subject.opened() as pipeline:
        return subject.check(pipeline, TOLERANCE)


def quantise(kind: str) -> Callable[[Subject], float]:
    """The error that is shown is against the weights as they are; what is judged is whether they were rounded right."""

    def opened(subject: Subject) -> float:
        with subject.opened(quantise=kind) as pipeline:
            subject.check(pipeline, QUANTISED_TOLERANCE, rounded(subject.reference, BITS[kind]), SHARE)
            return subject.check(pipeline, float("inf"), share=SHARE)

    return opened


def rounded(model: Any, bits: int) -> Any:
    """The model with the matrices of its products rounded as documented: in blocks of 32 along a row, to 2^bits levels
    from their least to their largest value; where one is zero, that is a level."""
    import copy

    import torch

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel() >= 1 << 14:
            blocks = module.weight.detach().reshape(len(module.weight), -1, 32)
            low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
            holds = (blocks == 0).any(-1, keepdim=True)
            low, high = torch.where(holds, low.clamp(max=0), low), torch.where(holds, high.clamp(min=0), high)
            scale = (high - low) / (2**bits - 1)
            scale[scale == 0] = 1
            low = torch.where(holds, (low / scale).round() * scale, low)
            levels = ((blocks - low) / scale).round().clamp(0, 2**bits - 1)
            values = (levels * scale + low).reshape(module.weight.shape)
            module.weight = torch.nn.Parameter(values, requires_grad=False)  # a table that shares it keeps its own
    return model


def build(precision: str, *options: str) -> Callable[[Subject], float]:
    """Build engines for sm89, and compare what they compute, emulated, with ONNX Runtime in float32: the largest error
    of the better nine tenths of tokens, as verify judges it."""

    def built(subject: Subject) -> float:
        shutil.rmtree(subject.bundle / "engines", ignore_errors=True)
        subject.command(
            "build", subject.bundle, "--target", "sm89", "--precision", precision, "--length", 64, "--capacity", 128,
            "--slots", 2, *options,
        )  # fmt: skip
        done = json.loads(
            subject.command(
                "verify", subject.bundle, "--engine", "tensorrt", "--emulated", "--precision", precision, "--json"
            )
        )
        return float(max(one["p90_error"] for one in done["comparisons"] if one["shown"] is None))

    return built


def profile(subject: Subject) -> None:
    subject.command("profile", subject.bundle, "--threads", 1)


def plan(subject: Subject) -> None:
    subject.command("plan", subject.bundle, "--devices", "cpu:0,cpu:1", "--length", 64)


def bench(subject: Subject) -> None:
    store = subject.folder / "runs.db"
    brief = ("--seconds", 0.5, "--repeats", 1, "--warm-up", 0.1, "--concurrency", 1, "--store", store)
    new_tokens = ("--new-tokens", 4) if subject.kind == "generator" else ()
    subject.command("bench", "run", subject.bundle, *brief, *new_tokens, "--json")


def serve(subject: Subject) -> float | None:
    """A completion over HTTP, whose log probabilities are compared; only generators are served."""
    import formats
    import httpx
    import torch

    program, bundle = str(Path(sys.executable).parent / "stageline"), str(subject.bundle)
    command = [program, "serve", bundle, "--name", "m", "--port", "0"]
    with tempfile.TemporaryFile("w+") as err:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                err.seek(0)
                raise RefusedError(err.read().strip().splitlines()[-1])
            url = line.split()[-1]
            asked = {"model": "m", "prompt": TEXT, "max_tokens": 1, "temperature": 0, "logprobs": 3}
            answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
        finally:
            server.terminate()
            server.wait(60)
    if answer.status_code != 200:
        raise RefusedError(answer.json()["error"]["message"])
    got = answer.json()["choices"][0]["logprobs"]["token_logprobs"][0]
    with torch.no_grad():
        logits = subject.reference(**formats.tokenizer()(TEXT, return_tensors="pt", return_token_type_ids=False)).logits
    want = logits[0, -1].log_softmax(-1).max().item()
    return judged(got, want, subject.bound)


def swap(subject: Subject) -> float:
    """Other weights while the pipeline is open."""
    other = subject.folder / "other"
    subject.command("export", subject.other, "-o", other, "--stages", 2)
    with subject.opened() as pipeline:
        pipeline.swap_weights(other)
        return subject.check(pipeline, TOLERANCE, subject.other_reference)


COLUMNS: dict[str, Callable[[Subject], float | None]] = {
    "export": export, "inspect": inspect, "run": run, "verify": verify, "recut": recut, "swap weights": swap,
    "quantise int8": quantise("int8"), "quantise int4": quantise("int4"), "profile": profile, "plan": plan,
    "bench": bench, "serve": serve, **{f"build {precision}": build(precision) for precision in PRECISIONS},
    "build stripped": build("fp16", "--stripped"),
}  # fmt: skip
"""Name of a column -> what it runs. `export` comes first: the others need its bundle."""
OF_THE_GRAPH = ("profile", "plan", "bench")
"""Columns that do not depend on the weights' values: .gguf files of all types but the first become the same bundle."""


def tried(column: Callable[[Subject], float | None], subject: Subject) -> Cell:
    """One cell."""
    from stageline.models.errors import StagelineError

    began = time.perf_counter()
    error, line = None, ""
    verdict: Verdict = "yes"
    try:
        error = column(subject)
    except RefusedError as refused:
        line = str(refused)
        verdict = "refused" if line.startswith("stageline: ") or column is serve else "traceback"
    except StagelineError as refused:
        verdict, line = "refused", str(refused)
    except WrongError as wrong:
        verdict, line = "WRONG", str(wrong)
    except Exception:
        verdict, line = "traceback", traceback.format_exc().strip().splitlines()[-1]
    line = re.sub(re.escape(str(subject.folder)) + r"/?", "", line.removeprefix("stageline: "))
    return Cell(verdict, error, line, time.perf_counter() - began)


def subject_of(name: str, folder: Path) -> Subject:
    """The checkpoint of the row `name`, made in `folder`."""
    import formats

    kind, _, rest = name.partition(": ")
    if kind == "refused":
        return Subject(
            str(formats.refused(folder / "checkpoint", rest)), "generator", None, folder, method=formats.WORD[rest]
        )
    if kind == "quantised":
        made, other = (formats.quantised(folder / n, rest, seed) for seed, n in enumerate(("one", "two")))
        return Subject(str(made.path), "generator", made.model, folder, str(other.path), other.model)
    if kind == "gguf":
        made, other = (formats.gguf_file(folder / f"{n}.gguf", rest, seed) for seed, n in enumerate(("one", "two")))
        return Subject(str(made.path), "generator", made.model, folder, str(other.path), other.model)
    way, dtype = rest.split(", ")
    make = formats.FOLDERS[way]
    made, other = (make(folder / n, kind, dtype, seed) for seed, n in enumerate(("one", "two")))  # type: ignore[arg-type]
    called = "org/name" if way == "hub cache" else str(made.path)
    return Subject(called, kind, made.model, folder, str(other.path), other.model)


def rows() -> list[str]:
    """The names of all rows."""
    import formats
    import quantised

    dtypes = ("bfloat16", "float16", "float32")
    ways = [("single", dtype) for dtype in dtypes] + [(way, "bfloat16") for way in formats.FOLDERS if way != "single"]
    return [
        *(f"{kind}: {way}, {dtype}" for kind in formats.MODELS for way, dtype in ways),
        *(f"gguf: {kind}" for kind in formats.GGUF_TYPES),
        *(f"quantised: {method}" for method in quantised.METHODS),
        *(f"refused: {method}" for method in formats.REFUSED),
    ]


def try_row(name: str, columns: list[str]) -> dict[str, Cell]:
    """All cells of a row; only the first where there is no bundle."""
    with tempfile.TemporaryDirectory() as folder:
        if "hub cache" in name:  # read when the library is imported
            os.environ.update(HF_HUB_CACHE=str(Path(folder) / "one"), HF_HUB_OFFLINE="1")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        subject = subject_of(name, Path(folder))
        cells = {"export": tried(export if subject.reference else export_only, subject)}
        if name.startswith("gguf") and name != "gguf: F32":
            columns = [column for column in columns if column not in OF_THE_GRAPH]
        if (subject.bundle / "manifest.json").is_file():
            cells |= {column: tried(COLUMNS[column], subject) for column in columns if column != "export"}
        return cells


def export_only(subject: Subject) -> None:
    """Export what has no reference: packed zeros, which nothing may take for weights."""
    try:
        subject.command("export", subject.name, "-o", subject.bundle)
    except RefusedError as refused:
        if subject.method not in str(refused).lower():
            raise WrongError(f"refused without the word {subject.method!r}: {refused}") from refused
        raise
    raise WrongError("exported, though its method is not read")


def shown(cell: Cell | None) -> str:
    """A cell as a table shows it."""
    if cell is None:
        return ""
    if cell.verdict == "yes":
        return "yes" if cell.error is None else f"{cell.error:.0e}"
    return cell.verdict


def page(results: dict[str, dict[str, Cell]]) -> str:
    """docs/compatibility.md."""
    lines = [
        "# Compatibility", "",
        "What each command does with each checkpoint format, tried with small random models. A figure is the largest",
        "error against transformers in float32, as a fraction of the largest value, for the weights as the file",
        "states them; *yes* stands where a command gives no values. Builds are TensorRT-RTX engines for sm89,",
        "emulated and compared with ONNX Runtime. Weights that are quantised when a pipeline opens must give what",
        "transformers gives with weights rounded in the same way; the figure is what that costs nine tenths of the",
        "tokens of a model with random weights. `python benchmarks/compatibility.py` makes this page.", "",
    ]  # fmt: skip
    groups: dict[str, dict[str, dict[str, Cell]]] = {}
    for name, cells in results.items():
        groups.setdefault(name.partition(": ")[0], {})[name.partition(": ")[2]] = cells
    titles = {
        "generator": "A generator (Llama)", "classifier": "A classifier of several labels (BERT)",
        "gguf": "A .gguf file (Llama), by the type of its matrices",
    }  # fmt: skip
    said = {"gguf": "Their bundles differ in values alone, so what depends on the graph was tried with the first."}
    for group, title in titles.items():
        if group not in groups:
            continue
        names = list(groups[group])
        lines += [
            f"## {title}",
            "",
            *([said[group], ""] if group in said else []),
            "| | " + " | ".join(names) + " |",
            "|---|" + "---|" * len(names),
        ]
        for column in COLUMNS:
            lines.append(f"| {column} | " + " | ".join(shown(groups[group][n].get(column)) for n in names) + " |")
        refusals = {
            f"{name}, {column}": cell.line
            for name in names for column, cell in groups[group][name].items() if cell.verdict != "yes"
        }  # fmt: skip
        lines += ["", *(f"- {place}: `{line}`" for place, line in refusals.items())] + [""] * bool(refusals)
    if "refused" in groups:
        lines += ["## Methods that are not read", "", "They are refused by name.", "", "| | export says |", "|---|---|"]
        lines += [f"| {name} | `{cells['export'].line}` |" for name, cells in groups["refused"].items()] + [""]
    return "\n".join(lines)


def main() -> None:
    """Try all rows, print a line for each, write JSON and the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--missing", action="store_true", help="only rows that the JSON does not hold")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row, in its own process
    arguments = parser.parse_args()
    columns = arguments.columns.split(",")
    if arguments.row:
        print(json.dumps({name: asdict(cell) for name, cell in try_row(arguments.row, columns).items()}))
        return
    results: dict[str, dict[str, Cell]] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
        results = {name: {n: Cell(**cell) for n, cell in kept[name].items()} for name in rows() if name in kept}
    for name in rows():
        if arguments.only not in name or (arguments.missing and name in results):
            continue
        command = [sys.executable, __file__, "--row", name, "--columns", arguments.columns]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            last = (done.stderr.strip() or f"died with status {done.returncode}").splitlines()[-1]
            results[name] = {"export": Cell("traceback", line=last)}
        else:
            found = {n: Cell(**cell) for n, cell in json.loads(done.stdout.splitlines()[-1]).items()}
            results[name] = {**results.get(name, {}), **found}
        print(f"{name:40}", ", ".join(f"{c} {shown(cell)}" for c, cell in results[name].items()), flush=True)
        for column, cell in results[name].items():
            if cell.line:
                print(f"    {column}: {cell.line}", flush=True)
        results = {n: results[n] for n in rows() if n in results}
        if arguments.json:
            document = {n: {c: asdict(cell) for c, cell in cells.items()} for n, cells in results.items()}
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.docs:
        arguments.docs.write_text(page(results))
    bad = [cell for cells in results.values() for cell in cells.values() if cell.verdict in ("WRONG", "traceback")]
    print(f"{len(results)} rows, {sum(map(len, results.values()))} cells, {len(bad)} WRONG or a traceback")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
