"""`stageline serve` as a process: what it says, and how it ends."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from stageline.exporter.commands.cli import main
from stageline.runtime.bundle.folder import Bundle, write_manifest

COMMAND = [sys.executable, "-c", "from stageline.exporter.commands.cli import main; raise SystemExit(main())", "serve"]


@pytest.fixture(scope="module")
def llama(word_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny Llama."""
    return Path(shutil.copytree(word_llama, tmp_path_factory.mktemp("serve") / "llama"))


@contextmanager
def serving(*arguments: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its address, and what it said."""
    command = [*COMMAND, *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment or None
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, process.stderr.read() if process.stderr else ""
        yield process, said.split()[-1], said
    finally:
        process.kill()
        process.communicate()


def test_it_answers_and_a_signal_lets_it_finish(llama: Path) -> None:
    with serving(llama) as (process, url, said):
        assert said.startswith("serving llama at http://127.0.0.1:")
        body: dict[str, Any] = {
            "model": "llama",
            "prompt": "a cat",
            "min_tokens": 240,
            "max_tokens": 240,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            begun = next(lines)
            process.send_signal(signal.SIGTERM)
            message = [begun, *filter(None, lines)]
        assert message[-1] == "data: [DONE]"
        assert json.loads(message[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_options_reach_the_service(llama: Path) -> None:
    options = ["--name", "tiny", "--slots", "3", "--capacity", "32", "--threads", "1", "--cache-dtype", "float16"]
    with serving(
        llama, *options, "--max-body-mb", "1", "--queue", "5", "--rebalance", "advise", STAGELINE_API_KEY="sesame"
    ) as (
        process,
        url,
        _,
    ):
        headers = {"authorization": "Bearer sesame"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        (model,) = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 32)
        metrics = httpx.get(f"{url}/metrics").text
        assert 'stageline_slots{model="tiny"} 3.0' in metrics
        assert 'stageline_rebalance_gain{model="tiny"} 0.0' in metrics
        assert 'stageline_switches_total{model="tiny"} 0.0' in metrics
        long = {"model": "tiny", "prompt": "a" * 2**20}
        assert httpx.post(f"{url}/v1/completions", json=long, headers=headers).status_code == 413
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def message(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    status = main(["serve", *map(str, arguments)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return status, said


def test_what_cannot_be_served_is_reported_in_a_line(
    llama: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_task = Path(shutil.copytree(tiny_bundle, tmp_path / "fill-mask"))
    write_manifest(other_task, Bundle.open(other_task).manifest.model_copy(update={"task": "fill-mask"}))
    status, said = message(capsys, other_task, "--port", "0")
    assert status == 1
    assert "can neither generate, embed nor classify texts: its task is fill-mask" in said
    status, said = message(capsys, tmp_path / "nothing", "--port", "0")
    assert status == 1
    assert "nothing" in said
    (tmp_path / "other").mkdir()
    shutil.copytree(llama, tmp_path / "other" / "llama")
    status, said = message(capsys, llama, tmp_path / "other" / "llama", "--port", "0")
    assert status == 2
    assert "two bundles are called 'llama'" in said
    status, said = message(capsys, llama, "--name", "a", "--name", "b", "--port", "0")
    assert status == 2
    assert "2 names for 1 bundle;" in said
    for options, exit_status, wrong in (
        (["--cache-memory", "1kB"], 1, "cache_memory is 1,000 bytes; 8 slots of "),
        (["--cache-memory", "1kB", "--engine", "openvino"], 1, "a row of 64 takes "),
        (["--cache-memory", "much"], 2, "'much' is not a size such as 8GB or 512MB"),
        (["--error-budget", "0.1"], 2, "--error-budget is for --engine auto"),
    ):
        status, said = message(capsys, llama, "--port", "0", *options)
        assert status == exit_status
        assert wrong in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, said = message(capsys, llama, "--port", str(taken.getsockname()[1]))
    assert status == 1
    assert "Address already in use" in said
