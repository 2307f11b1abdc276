"""The runner of the proof on a GPU: what a part costs the others."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import gpu_proof
import pytest
from gpu_proof import Part, run_all

WRITES = (
    "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({'figures': [{'n': %d, 'ok': %s}]}))"
)
SCRIPTS = {
    "good": WRITES % (1, True),
    "hangs": WRITES % (2, False)
    + "; import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    + "; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    + "; pathlib.Path(sys.argv[1] + '.pid').write_text(str(child.pid)); time.sleep(600)",
    "dies": "import os; os.abort()",
    "raises": "raise ValueError('no such kernel')",
    "writes half": "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"figures\": [')",
    "skips": 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"skipped": "there is no GPU"}\')',
    "last": WRITES % (3, True),
}


def run(out: Path, names: Sequence[str], seconds: float = 60, limit_s: float = 30) -> list[gpu_proof.Outcome]:
    def command(part: Part) -> list[str]:
        return [sys.executable, "-c", SCRIPTS[part.name], str(out / f"{part.name}.json")]

    return run_all([Part(name, limit_s, "a test") for name in names], command, seconds, out)


def test_a_part_that_hangs_costs_only_itself_and_what_it_found_is_kept(tmp_path: Path) -> None:
    began = monotonic()
    good, hangs, last = run(tmp_path, ["good", "hangs", "last"], limit_s=1)
    assert monotonic() - began < 15
    assert [good.state, hangs.state, last.state] == ["done", "out of time", "done"]
    assert [outcome.figures[0]["n"] for outcome in (good, hangs, last)] == [1, 2, 3]
    child = Path(tmp_path / "hangs.json.pid").read_text()
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # what it started has ended, too
    assert "hangs: out of time" in (tmp_path / "summary.md").read_text()
    assert "1 NOT OK" in (tmp_path / "summary.md").read_text()


def test_a_part_that_dies_raises_or_writes_nonsense_costs_only_itself(tmp_path: Path) -> None:
    dies, raises, half, skips, last = run(tmp_path, ["dies", "raises", "writes half", "skips", "last"])
    assert (dies.state, dies.why) == ("failed", "exit status -6: it said nothing")
    assert (raises.state, raises.why) == ("failed", "exit status 1: ValueError: no such kernel")
    assert (half.state, half.figures) == ("done", [])
    assert (skips.state, skips.why) == ("skipped", "there is no GPU")
    assert last.figures == [{"n": 3, "ok": True}]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["state"] for part in summary["parts"]] == ["failed", "failed", "done", "skipped", "done"]


def test_parts_for_which_no_time_is_left_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof, "LEAST_S", 0.5)
    outcomes = run(tmp_path, ["hangs", "good"], seconds=1)
    assert [outcome.state for outcome in outcomes] == ["out of time", "skipped"]
    assert not (tmp_path / "good.json").exists()


def test_shares_are_of_what_was_measured() -> None:
    figures = {
        "driver": [{"copy": "on the device", "gb_per_s": 2000.0}, {"copy": "pinned, to the device", "gb_per_s": 50.0}],
        "decode": [
            {"shape": "s", "stages": 1, "rows": 8, "gb_per_s": 1500.0, "step_ms": 1.0},
            {"shape": "s", "stages": 4, "rows": 8, "gb_per_s": 1400.0, "step_ms": 1.06},
            {"shape": "s", "error": "refused", "ok": False},
        ],
        "rates": [{"type": "bfloat16", "tflop_per_s": 500.0}],
        "encode": [{"shape": "e", "stages": 1, "rows": 8, "length": 128, "tflop_per_s": 250.0}],
    }
    one, four, encode = gpu_proof.shares_of(figures)
    assert (one["share_of_bandwidth"], four["share_of_bandwidth"], encode["share_of_bf16_rate"]) == (0.75, 0.7, 0.5)
    assert "hop_us" not in one
    assert four["hop_us"] == 20.0
    without = gpu_proof.shares_of({**figures, "driver": [], "rates": []})
    assert without == [{"shape": "s", "stages": 1, "rows": 8}, {"shape": "s", "stages": 4, "rows": 8, "hop_us": 20.0}]


@pytest.mark.parametrize("arguments", [["--only", "everything"], ["--minutes", "0"], []])
def test_wrong_arguments_are_one_line(arguments: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments else []
    done = subprocess.run(
        [sys.executable, gpu_proof.__file__, *arguments, *out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
