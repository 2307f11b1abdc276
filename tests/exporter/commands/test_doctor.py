"""`stageline doctor`: a page for a person, a document for a machine, whatever is missing."""

import json
from dataclasses import replace

import pytest
from stageline.exporter.commands.cli import main
from stageline.exporter.commands.doctor import text
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.doctor import GpuInfo, MigDevice, NvidiaDriver, diagnose


def test_doctor_tells_engines_devices_and_what_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"{len(allowed_cores())} cores" in told
    assert "onnxruntime-cuda" in told
    for name in ("minilm", "smollm2", "driver:", "tensorrt-rtx"):
        assert name in told


def test_doctor_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cpu"]["cores"] == list(allowed_cores())
    assert {"driver", "gpus", "engines", "extras", "checkpoints", "problems"} <= set(told)


def test_gpus_are_shown_with_their_parts() -> None:
    part = MigDevice("H100 MIG 3g.40gb", "MIG-1", 40_000_000_000)
    gpu = GpuInfo(0, "H100", "GPU-1", "9.0", 80_000_000_000, 79_000_000_000, (part,))
    told = text(replace(diagnose(), driver=NvidiaDriver("595.71", "13.2", None), gpus=(gpu,), problems=("something",)))
    assert "driver: NVIDIA 595.71, CUDA up to 13.2" in told
    assert "cuda:0" in told
    assert "compute capability 9.0, 80.0 GB, 79.0 GB free" in told
    assert "MIG, 40.0 GB" in told
    assert told.endswith("problem: something")
