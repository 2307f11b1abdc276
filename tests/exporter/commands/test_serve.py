"""`stageline serve` as a process: what it says, and how it ends."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from stageline.exporter.commands.cli import app, main
from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle, write_manifest
from stageline.runtime.service.server import unix_socket
from typer.main import get_command

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
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
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
        (["--prefix-cache", "1kB"], 1, "prefix_cache is 1,000 bytes; the least that onnxruntime keeps, "),
        (["--prefix-cache", "1kB", "--engine", "tensorrt"], 1, "prefix_cache is for engines on CPUs; "),
        (["--tpot-target", "50"], 2, "'50' is not a time such as 50ms or 0.5s"),
        (["--draft", "eagle"], 1, "draft is 'eagle'; it must be off, lookup or the folder of a bundle"),
        (["--error-budget", "0.1"], 2, "--error-budget is for --engine auto"),
    ):
        status, said = message(capsys, llama, "--port", "0", *options)
        assert status == exit_status
        assert wrong in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, said = message(capsys, llama, "--port", str(taken.getsockname()[1]))
    assert status == 1
    assert "Address already in use" in said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    """A certificate for localhost, its key, and a context that trusts it."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    made, context = authority.issue_cert("localhost", "127.0.0.1"), ssl.create_default_context()
    authority.configure_trust(context)
    made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    made.private_key_pem.write_to_path(folder / "key.pem")
    return folder / "cert.pem", folder / "key.pem", context


def test_a_file_and_the_environment_configure_it(
    llama: Path, certificate: tuple[Path, Path, ssl.SSLContext], tmp_path: Path
) -> None:
    """Two models with limits of their own, over TLS on a Unix socket that somebody left behind."""
    path, (cert, key, context) = tmp_path / "s", certificate
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    config = tmp_path / "serve.toml"
    config.write_text(f"""
        unix-socket = "{path}"
        tls-cert = "{cert}"
        tls-key = "{key}"
        root-path = "/llm"
        api-key = ["one", "two"]
        allowed-hosts = ["models.example", "other.example"]
        max-body-mb = 1
        slots = 5
        capacity = 64
        threads = 1
        [models.small]
        bundle = "{llama}"
        capacity = 32
        queue = 3
        [models.large]
        bundle = "{llama}"
        slots = 7
    """)
    environment = {
        "STAGELINE_SERVE_CONFIG": str(config),
        "STAGELINE_SERVE_SLOTS": "4",
        "STAGELINE_SERVE_MAX_BODY_MB": "2",
    }
    with serving("--slots", "2", **environment) as (process, url, said):
        assert said.split()[:3] == ["serving", "small,", "large"]
        assert url == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        transport = httpx.HTTPTransport(uds=str(path), verify=context)
        with httpx.Client(transport=transport, base_url="https://localhost") as client:
            for prefix in ("/llm", ""):  # a proxy may leave it, or take it off
                assert client.get(f"{prefix}/health").status_code == 200
                assert client.get(f"{prefix}/v1/models").status_code == 401
            client.headers["authorization"] = "Bearer two"
            found = {one["id"]: one["max_model_len"] for one in client.get("/v1/models").json()["data"]}
            assert found == {"small": 32, "large": 64}
            assert client.get("/v1/models", headers={"host": "other.example"}).status_code == 200
            assert client.get("/v1/models", headers={"host": "third.example"}).status_code == 421
            metrics = client.get("/metrics").text
            for name in found:  # the command line goes first
                assert f'stageline_slots{{model="{name}"}} 2.0' in metrics
            assert client.post("/v1/completions", content=b" " * 1_500_000).status_code == 400
            assert client.post("/v1/completions", content=b" " * 2_200_000).status_code == 413
        with pytest.raises(StagelineError, match="another process listens on"), unix_socket(path):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not path.exists()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("slots =", "is not TOML"),
        ("slotz = 3", "unknown name 'slotz'; known: allowed-hosts, api-key,"),
        ("config = 'x'", "unknown name 'config'"),
        ("slots = 0", "slots: must be at least 1"),
        ("slots = 1.5", "slots: must be a whole number"),
        ("slots = true", "slots is True; give a text or a number"),
        ("engine = 'cuda'", "engine: 'cuda' is not one of"),
        ("models = 3", "models is not of tables; write [models.NAME]"),
        ("[models.a]\nslots = 3", "[models.a] has no bundle;"),
        ("[models.a]\nbundle = 'x'\nport = 3", "[models.a]: unknown name 'port'; known: bundle, cache-dtype,"),
        ("[models.a]\nbundle = 'x'\nqueue = 0", "[models.a]: queue: must be at least 1"),
        ("[models.a]\nbundle = 'x'\ncache-memory = 'much'", "'much' is not a size such as 8GB"),
        ("port = 0", "there is nothing to serve; give a BUNDLE, or --config with [models.NAME]"),
    ],
)
def test_what_a_file_gets_wrong_is_reported_in_a_line(
    text: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "serve.toml").write_text(text)
    status, said = message(capsys, "--config", tmp_path / "serve.toml")
    assert status == 2
    assert wrong in said


def test_every_option_may_come_from_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    names = [option.opts[0] for option in get_command(app).commands["serve"].params if option.opts[0].startswith("--")]
    assert len(names) > 20
    for name in names:
        if name != "--help":
            assert f"STAGELINE_SERVE_{name[2:].replace('-', '_').upper()}" in said, name


def test_what_cannot_be_listened_on_is_reported_in_a_line(
    llama: Path, certificate: tuple[Path, Path, ssl.SSLContext], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key, _ = certificate
    other, encrypted = tmp_path / "other.pem", tmp_path / "encrypted.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    encrypted.write_text(key.read_text().replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"))
    (tmp_path / "file").touch()
    for options, status, wrong in (
        (["--tls-cert", cert, "--tls-key", other], 1, "key values mismatch"),
        (["--tls-cert", cert], 1, "(not in PEM)"),
        (["--tls-cert", cert, "--tls-key", encrypted], 1, "cannot use --tls-cert"),
        (["--tls-cert", tmp_path / "none", "--tls-key", key], 1, "(No such file or directory)"),
        (["--tls-key", key], 2, "--tls-key needs --tls-cert"),
        (["--root-path", "llm"], 2, "give a path such as /llm"),
        (["--unix-socket", tmp_path / "file"], 1, "is there, and no socket"),
        (["--unix-socket", tmp_path / "none" / "s"], 1, "cannot listen on"),
        (["--unix-socket", tmp_path / ("x" * 200)], 1, "cannot listen on"),
        (["--ping-s", "0"], 2, "--ping-s"),
        (["--otlp-endpoint", "localhost:4318"], 2, "give a URL such as http://localhost:4318"),
    ):
        found, said = message(capsys, llama, *options)
        assert found == status, said
        assert wrong in said
