"""A pipeline whose stages are on hosts computes what it computes in one process, and notices when one is lost."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stage_hosts import Link, host_process, hosted, write_key
from stageline.models.errors import EngineError, RequestError, StageLostError
from stageline.runtime.cluster import messages
from stageline.runtime.generation.request import Completion
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.stages import recovery

PROMPTS = ["a cat sat on mats", "a cat sat on a dog", "a cat", "dog ran on mats a cat sat", "mats", "a cat sat on mats"]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def hosts(word_llama: Path, key_file: Path) -> Iterator[list[str]]:
    with hosted(word_llama, key_file) as one, hosted(word_llama, key_file) as other:
        yield [one, other]


def answers(pipeline: Pipeline) -> list[list[int]]:
    """Tokens of prompts that begin alike, more than there are slots, greedy and sampled."""
    requests = [
        pipeline.request(prompt, max_tokens=9, temperature=0.9 * (place % 2), seed=place, n=1 + place % 2)
        for place, prompt in enumerate(PROMPTS)
    ]
    futures = [pipeline.submit(request) for request in requests]
    return [list(choice.token_ids) for future in futures for choice in future.result().choices]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_tokens_are_those_of_one_process(engine: str, word_llama: Path, hosts: list[str], key_file: Path) -> None:
    options: dict[str, Any] = {"engine": engine, "slots": 3, "capacity": 48, "prefill_chunk": 4}
    with Pipeline.open(word_llama, **options) as pipeline:
        wanted = answers(pipeline)
    for devices in (hosts, ["cpu", hosts[1]], [hosts[0], "cpu"], hosts[:1]):
        with Pipeline.open(word_llama, **options, devices=devices, key_file=key_file) as pipeline:
            assert answers(pipeline) == wanted
            stages = pipeline.stats().stages
            assert [stage.device for stage in stages] == [devices[place % len(devices)] for place in range(2)]
            assert all(stage.busy_s > 0 for stage in stages)


def test_outputs_of_batches_are_those_of_one_process(tiny_bundle: Path, key_file: Path) -> None:
    random = np.random.default_rng(2)
    lengths = random.integers(1, 16, 40)
    feed = {
        "input_ids": random.integers(0, 12, (40, 16)),
        "attention_mask": (np.arange(16) < lengths[:, None]).astype(np.int64),
        "token_type_ids": np.zeros((40, 16), np.int64),
    }
    with Pipeline.open(tiny_bundle) as pipeline:
        feed = {spec.name: feed[spec.name] for spec in pipeline.signature.inputs}
        wanted = pipeline.run(feed)
    with (
        hosted(tiny_bundle, key_file) as host,
        Pipeline.open(tiny_bundle, devices=["cpu", host], key_file=key_file) as pipeline,
    ):
        found = pipeline.run(feed)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        assert np.array_equal(array, found[name])


def test_an_error_of_the_host_fails_its_request_and_nothing_else(
    word_llama: Path, hosts: list[str], key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stageline.runtime.engines.onnxruntime import OnnxRuntimeEngine

    step, failing = OnnxRuntimeEngine.step, threading.Event()

    def fails(self: OnnxRuntimeEngine, *arguments: Any) -> Any:
        if failing.is_set():
            raise EngineError("no\nmemory")
        return step(self, *arguments)

    monkeypatch.setattr(OnnxRuntimeEngine, "step", fails)
    with Pipeline.open(word_llama, devices=hosts, key_file=key_file, slots=2) as pipeline:
        wanted = pipeline.generate("a cat", max_tokens=3).result().text
        failing.set()
        with pytest.raises(EngineError, match=rf"stage 0 on {hosts[0]}: no memory"):
            pipeline.generate("a cat", max_tokens=3).result()
        failing.clear()
        assert pipeline.broken is None
        assert pipeline.generate("a cat", max_tokens=3).result().text == wanted


def test_what_cannot_be_opened_is_said_in_one_line(
    word_llama: Path,
    tiny_bundle: Path,
    hosts: list[str],
    key_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other_key = tmp_path / "other"
    other_key.write_text("x" * 64)
    before = threading.active_count()

    def refused(kind: type[Exception], why: str, bundle: Path = word_llama, **options: Any) -> None:
        with pytest.raises(kind, match=why) as raised:
            Pipeline.open(bundle, **{"devices": hosts, "key_file": key_file, **options})
        assert "\n" not in str(raised.value)

    refused(RequestError, r"needs a key; give the file that its host has as key_file", key_file=None)
    refused(EngineError, r"stage 0: no host at tcp.*its key is another one", key_file=other_key)
    refused(
        EngineError, r"no host at tcp://127.0.0.1:9 \(Connection refused\); start one", devices=["tcp://127.0.0.1:9"]
    )
    refused(RequestError, r"is no address of a stage host", devices=["tcp://node1"])
    refused(EngineError, r"is not the pipeline's; copy the whole folder here", bundle=tiny_bundle)
    monkeypatch.setattr(messages, "stageline_version", lambda: "9.9")
    refused(EngineError, r"the pipeline is of Stageline 9.9, this host of")
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before, "threads are left"


def test_stages_on_hosts_are_not_switched(word_llama: Path, hosts: list[str], key_file: Path) -> None:
    with Pipeline.open(word_llama, devices=hosts, key_file=key_file) as pipeline:
        with pytest.raises(RequestError, match="cannot be switched while they serve"):
            pipeline.recut(1)
        with pytest.raises(RequestError, match="cannot be switched while they serve"):
            pipeline.swap_weights(word_llama)
    with (
        Pipeline.open(word_llama, key_file=key_file) as pipeline,
        pytest.raises(RequestError, match="cannot be switched while they serve"),
    ):
        pipeline.recut(2, devices=hosts)


def under_way(pipeline: Pipeline) -> "list[Future[Completion]]":
    """Eight requests, more than there are slots, greedy and sampled."""
    return [
        pipeline.submit(
            pipeline.request(prompt, max_tokens=200, min_tokens=200, temperature=0.8 * (place % 2), seed=place)
        )
        for place, prompt in enumerate((*PROMPTS, *PROMPTS)[:8])
    ]


def tokens(futures: "list[Future[Completion]]") -> list[list[int]]:
    return [list(future.result(60).choices[0].token_ids) for future in futures]


def noticed(pipeline: Pipeline) -> float:
    """Seconds until the pipeline says that a stage is lost."""
    began = time.monotonic()
    while pipeline.recovering is None and pipeline.broken is None:
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    return time.monotonic() - began


def test_a_silent_link_is_noticed_and_nothing_is_lost(word_llama: Path, hosts: list[str], key_file: Path) -> None:
    link = Link(hosts[1])
    with Pipeline.open(word_llama, devices=[hosts[0], link.address], key_file=key_file, slots=4) as pipeline:
        wanted = tokens(under_way(pipeline))
        futures = under_way(pipeline)
        time.sleep(0.1)
        assert not any(future.done() for future in futures)
        link.cut.set()
        assert 1 < noticed(pipeline) < 2.5 + 0.5  # at most 2.5 s; half a second for a busy machine
        assert pipeline.recovering == f"stage 1 on {link.address} is lost: no sign of life for 2 s"
        assert pipeline.broken is None
        link.cut.clear()
        assert tokens(futures) == wanted
        assert pipeline.recovering is None
        assert tokens(under_way(pipeline)) == wanted
    link.close()


def test_a_hung_host_is_noticed_and_a_killed_one_is_told(
    word_llama: Path, hosts: list[str], key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        host_process(word_llama, key_file) as (address, process),
        Pipeline.open(word_llama, devices=[address, hosts[1]], key_file=key_file) as pipeline,
    ):
        futures = under_way(pipeline)
        time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        assert noticed(pipeline) < 2.5 + 0.5
        process.send_signal(signal.SIGCONT)
        wanted = tokens(futures)
        monkeypatch.setattr(recovery, "RECOVERY_S", 0.0)
        futures = under_way(pipeline)
        time.sleep(0.1)
        process.kill()
        assert noticed(pipeline) < 1
        errors = [future.exception(20) for future in futures]
        assert {type(error) for error in errors} == {StageLostError}
        (reason,) = {str(error) for error in errors}
        assert reason.startswith(f"stage 0 on {address} is lost: ")
        assert "cannot be opened again" in reason
        assert pipeline.broken == reason
        with pytest.raises(StageLostError, match="is lost"):
            pipeline.generate("a cat", max_tokens=2).result()
    with Pipeline.open(word_llama, devices=hosts, key_file=key_file) as pipeline:  # the other host lives
        assert tokens(under_way(pipeline)) == wanted


def test_a_pipeline_that_is_taken_over_does_not_take_back(word_llama: Path, hosts: list[str], key_file: Path) -> None:
    with Pipeline.open(word_llama, devices=hosts, key_file=key_file) as earlier:
        futures = under_way(earlier)
        with Pipeline.open(word_llama, devices=hosts, key_file=key_file) as later:
            errors = [future.exception(20) for future in futures]
            assert all("serves a pipeline that was opened later" in str(error) for error in errors if error)
            assert any(errors)
            assert "serves a pipeline that was opened later" in (earlier.broken or "")
            assert later.generate("a cat", max_tokens=2).result()
            assert later.broken is None
