"""Everything worth knowing of a machine with a GPU, in a given time, the most valuable first.

    python benchmarks/gpu_proof.py --minutes 8 --out FOLDER

Each part is a process of its own with a time limit of its own, and writes its figures as they come: a part that hangs
or dies costs only itself. FOLDER then has NAME.json and NAME.log of each part, and summary.json and summary.md, which
are written again after each. docs/gpu.md says what is measured, and how to run it on a machine without a package index.
Exits with 1 if a part failed, ran out of time, or found what is not ok.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

HERE = Path(__file__).parent
MATERIALS = HERE.parent / ".cache" / "gpu_proof"
"""What parts compare with and run: made by gpu_materials.py, or brought by the kit."""
LEAST_S = 5.0  # a part that has less is not begun
_DYING_S = 5.0  # a killed process that waits for its driver may not end
_ROWS_SHOWN = 40


@dataclass(frozen=True)
class Part:
    """A part: its name (a function of gpu_parts.py), its time limit, and what it shows."""

    name: str
    limit_s: float
    shows: str


PARTS = (
    Part("driver", 40, "the driver, what is installed, and copies"),
    Part("cuda_tests", 60, "the tests of the CUDA layer"),
    Part("encoder_parity", 60, "encoders in ONNX Runtime on CUDA against CPUs"),
    Part("decoder_parity", 90, "decoders, with their caches, in ONNX Runtime on CUDA against CPUs"),
    Part("generation", 60, "tokens in ONNX Runtime on CUDA against CPUs"),
    Part("decode", 180, "tokens per second, memory bandwidth, gaps between stages, energy"),
    Part("encode", 60, "encoders: tokens per second"),
    Part("rates", 30, "torch's copies and matrix products"),
    Part("torch_beside", 150, "torch and transformers with the same shapes"),
    Part("tensorrt", 120, "TensorRT: builds, errors, tokens per second"),
)


@dataclass
class Outcome:
    """How a part ended (`done`, `skipped`, `failed`, `out of time`), why, and what it found until then."""

    name: str
    state: str
    seconds: float
    why: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How many of its figures are beyond their bounds."""
        return sum(row.get("ok") is False for row in self.figures)

    @property
    def line(self) -> str:
        """One line for people."""
        found = f"{len(self.figures)} figures" + (f", {self.wrong} NOT OK" if self.wrong else "")
        return f"{self.name}: {self.state} in {self.seconds:.1f} s, {found}" + (f": {self.why}" if self.why else "")


def run_part(part: Part, command: Sequence[str], out: Path, limit_s: float) -> Outcome:
    """Run a part as the process `command`, which writes `out`/NAME.json, for at most `limit_s` seconds."""
    log, began = out / f"{part.name}.log", monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
    outcome = Outcome(part.name, "done", monotonic() - began)
    written = _read(out / f"{part.name}.json")
    outcome.figures, skipped = written.get("figures", []), written.get("skipped")
    if code is None:
        outcome.state, outcome.why = "out of time", f"it was stopped after {limit_s:.0f} s"
    elif code != 0:
        lines = log.read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        outcome.state, outcome.why = "failed", f"exit status {code}: {said[:300]}"
    elif skipped is not None:
        outcome.state, outcome.why = "skipped", skipped
    return outcome


def run_all(
    parts: Sequence[Part], command: Callable[[Part], Sequence[str]], seconds: float, out: Path
) -> list[Outcome]:
    """Run the parts in turn while there is time, and write the summary after each."""
    ends = monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        left = ends - monotonic()
        if left < LEAST_S:
            outcomes.append(Outcome(part.name, "skipped", 0.0, "no time is left"))
        else:
            limit_s = min(part.limit_s, left)
            print(f"{part.name}: {part.shows} (at most {limit_s:.0f} s, {left:.0f} s are left)", flush=True)
            outcomes.append(run_part(part, command(part), out, limit_s))
        print(outcomes[-1].line, flush=True)
        summarise(outcomes, out)
    return outcomes


def summarise(outcomes: Sequence[Outcome], out: Path) -> str:
    """Write summary.json and summary.md; returns the latter."""
    shares = shares_of({outcome.name: outcome.figures for outcome in outcomes})
    document = {"parts": [asdict(outcome) for outcome in outcomes], "shares": shares}
    _write(out / "summary.json", json.dumps(document, indent=1))
    lines = ["# Proof on a GPU", ""]
    for outcome in outcomes:
        lines += [f"## {outcome.line}", ""]
        lines += [f"- {_row(row)}" for row in outcome.figures[:_ROWS_SHOWN]]
        if len(outcome.figures) > _ROWS_SHOWN:
            lines.append(f"- and {len(outcome.figures) - _ROWS_SHOWN} more, in {outcome.name}.json")
        lines += [""] if outcome.figures else []
    if shares:
        lines += [
            "## Shares of what this GPU can do, and hops between stages",
            "",
            *(f"- {_row(row)}" for row in shares),
            "",
        ]
    text = "\n".join(lines)
    _write(out / "summary.md", text)
    return text


def shares_of(figures: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The share of the measured bandwidth of memory that decoding reaches, and of the measured rate of matrix products
    that encoders reach; and what each further stage on the same GPU adds to a step of decoding (`hop_us`)."""
    copies = [row["gb_per_s"] for row in figures.get("driver", ()) if row.get("copy") == "on the device"]
    products = [row["tflop_per_s"] for row in figures.get("rates", ()) if row.get("type") == "bfloat16"]
    found: list[dict[str, Any]] = []
    decoded = [row for row in figures.get("decode", ()) if "step_ms" in row]
    alone = {(row["shape"], row["rows"]): row["step_ms"] for row in decoded if row["stages"] == 1}
    for row in decoded:
        kept = {name: row[name] for name in ("shape", "stages", "rows")}
        if copies:
            kept["share_of_bandwidth"] = round(row["gb_per_s"] / max(copies), 3)
        if row["stages"] > 1 and (row["shape"], row["rows"]) in alone:
            more_ms = row["step_ms"] - alone[row["shape"], row["rows"]]
            kept["hop_us"] = round(more_ms / (row["stages"] - 1) * 1e3, 1)
        found.append(kept)
    for row in figures.get("encode", ()):
        if products and "tflop_per_s" in row:
            kept = {name: row[name] for name in ("shape", "stages", "rows", "length")}
            found.append({**kept, "share_of_bf16_rate": round(row["tflop_per_s"] / max(products), 3)})
    return found


def _row(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):  # it wrote nothing
        return {}
    return found


def _write(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text(text)
    aside.replace(file)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started; one that does not die is left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_DYING_S)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end; it is left behind", flush=True)


def main() -> None:
    """Run the parts, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", metavar="PART", choices=[part.name for part in PARTS], help="run this part alone")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes is {arguments.minutes:g}; give more than 0")
    out: Path = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out} cannot be made ({error.strerror}); give another folder")
    for part in PARTS:
        (out / f"{part.name}.json").unlink(missing_ok=True)  # of an earlier run

    def command(part: Part) -> list[str]:
        return [sys.executable, str(HERE / "gpu_parts.py"), part.name, str(MATERIALS), str(out / f"{part.name}.json")]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the running part ends with this process
    chosen = [part for part in PARTS if arguments.only in (None, part.name)]
    outcomes = run_all(chosen, command, arguments.minutes * 60, out)
    print("\n" + summarise(outcomes, out))
    sys.exit(any(outcome.state in ("failed", "out of time") or outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
