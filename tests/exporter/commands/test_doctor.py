"""`stageline doctor`: a page for a person, a document for a machine, whatever is missing."""

import json
from dataclasses import replace
from typing import get_args

import pytest
from stageline.exporter.commands.cli import main
from stageline.exporter.commands.common import EngineName
from stageline.exporter.commands.doctor import text
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.doctor import (
    CheckpointStatus,
    CpuInfo,
    EngineStatus,
    Extra,
    GpuInfo,
    MigDevice,
    NvidiaDriver,
    diagnose,
)
from stageline.runtime.engines import ENGINES


def test_doctor_shows_devices_engines_and_how_to_install_what_is_absent() -> None:
    found = replace(
        diagnose(),
        cpu=CpuInfo("EPYC", (0, 2), 8_000_000_000, None),
        driver=NvidiaDriver(None, None, "no NVIDIA driver"),
        gpus=(),
        engines=(
            EngineStatus("onnxruntime", "onnxruntime", "1.32.0", "CPU cores", (), "pip install a"),
            EngineStatus("tensorrt", "tensorrt-rtx", None, "NVIDIA RTX GPUs", ("sm89", "portable"), "pip install b"),
        ),
        extras=(Extra("cpu", {"x": "1"}, "pip install c"), Extra("gpu", {"x": "1", "y": None}, "pip install d")),
        checkpoints=(CheckpointStatus("minilm", "/c/minilm", "fetch e"), CheckpointStatus("smollm2", None, "fetch f")),
        problems=(),
    )
    assert [" ".join(line.split()) for line in text(found).splitlines()[1:]] == [
        "driver: no NVIDIA driver",
        "",
        "device name",
        "cpu EPYC 2 cores, 8.00 GB of memory",
        "",
        "engine package version runs on builds for install",
        "onnxruntime onnxruntime 1.32.0 CPU cores -",
        "tensorrt tensorrt-rtx absent NVIDIA RTX GPUs sm89 portable pip install b",
        "",
        "extra packages install",
        "cpu complete",
        "gpu absent: y pip install d",
        "",
        "checkpoint folder fetch",
        "minilm /c/minilm",
        "smollm2 absent fetch f",
    ]


def test_doctor_prints_the_diagnosis_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == f"{text(diagnose())}\n"


def test_engine_takes_the_names_that_doctor_lists() -> None:
    assert {engine.name for engine in diagnose().engines} == set(ENGINES) == set(get_args(EngineName))


def test_doctor_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    message = json.loads(capsys.readouterr().out)
    assert message["cpu"]["cores"] == list(allowed_cores())
    assert {"driver", "gpus", "engines", "extras", "checkpoints", "problems"} <= set(message)


def test_gpus_are_shown_with_their_parts() -> None:
    part = MigDevice("H100 MIG 3g.40gb", "MIG-1", 40_000_000_000)
    gpu = GpuInfo(0, "H100", "GPU-1", "9.0", 80_000_000_000, 79_000_000_000, (part,))
    message = text(
        replace(diagnose(), driver=NvidiaDriver("595.71", "13.2", None), gpus=(gpu,), problems=("something",))
    )
    assert "driver: NVIDIA 595.71, CUDA up to 13.2" in message
    assert "cuda:0" in message
    assert "compute capability 9.0, 80.0 GB, 79.0 GB free" in message
    assert "MIG, 40.0 GB" in message
    assert message.endswith("problem: something")
