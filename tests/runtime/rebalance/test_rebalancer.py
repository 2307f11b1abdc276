"""The thread that watches a pipeline, on engines whose blocks take known times."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.models.errors import EngineError, RequestError
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines import ENGINES, Device, Engine, PackedRows, StageFile, Value, engine_factory
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.rebalance.costs import UseSeconds, use_seconds
from stageline.runtime.rebalance.policy import PolicySettings
from stageline.runtime.rebalance.rebalancer import Rebalancer, RebalanceStats

SECONDS = 20  # for what must happen; nothing takes that long
BLOCKS, BLOCK_S = 6, 0.002
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
QUICK = PolicySettings(window_s=0.1, windows=2, min_runs=3, rest_s=0.2)


class Timed:
    """An engine that takes `BLOCK_S` for each of its blocks, and longer on a slow device."""

    slow: Mapping[int, float] = {}

    def __init__(self, engine: Engine, stage: StageFile) -> None:
        self.engine, self.stage = engine, stage
        self.input_names, self.output_names, self.max_rows = engine.input_names, engine.output_names, engine.max_rows
        self.packs, self.block_tokens = engine.packs, engine.block_tokens
        self.run, self.copy_slot, self.close = engine.run, engine.copy_slot, engine.close
        self.give_caches, self.take_caches = engine.give_caches, engine.take_caches

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> Mapping[str, Value]:
        time.sleep(BLOCK_S * len(self.stage.caches) * self.slow.get(self.stage.number, 1.0))
        return self.engine.step(inputs, outputs, rows)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks in stages of five and one; do not change it."""
    folder = tmp_path_factory.mktemp("llama")
    synthesize(LLAMA, folder / "checkpoint", seed=1, dtype="bfloat16")
    export(folder / "checkpoint", folder / "bundle")
    return recut(folder / "bundle", [5, 1]).path


Opened = Callable[..., Pipeline]


@pytest.fixture
def opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Opens the bundle on timed engines; `fails` is called before an engine opens, `slow` tells how slow stages are."""

    def begin(
        fails: Callable[[], None] = lambda: None, slow: Mapping[int, float] | None = None, **options: Any
    ) -> Pipeline:
        def factory(stage: StageFile, device: Device, **settings: Any) -> Engine:
            fails()
            return Timed(engine_factory("onnxruntime")(stage, device, **settings), stage)

        monkeypatch.setattr(Timed, "slow", slow or {})
        monkeypatch.setitem(ENGINES, "timed", lambda: factory)
        return Pipeline.open(bundle, engine="timed", slots=4, **options)

    return begin


def watch(pipeline: Pipeline, auto: bool) -> Rebalancer:
    """What `Pipeline.open(rebalance=...)` starts, with shorter windows."""
    pipeline._rebalancer = Rebalancer(pipeline._executor, "auto" if auto else "advise", QUICK)
    return pipeline._rebalancer


def keep_busy(pipeline: Pipeline, until: Callable[[], bool]) -> list[tuple[int, ...]]:
    """Generate in all slots until it holds; the tokens of all that was generated."""
    deadline = time.monotonic() + SECONDS
    futures = []
    while not until():
        assert time.monotonic() < deadline, pipeline.stats()
        requests = [pipeline.generate([5, seed + 3], max_tokens=40, min_tokens=40) for seed in range(4)]
        futures += requests
        while not until() and not all(one.future.done() for one in requests):
            assert time.monotonic() < deadline, pipeline.stats()
            time.sleep(0.01)
    return [one.result(SECONDS).choices[0].token_ids for one in futures]


def test_auto_makes_an_uneven_cut_even_and_follows_a_slow_stage(opened: Opened) -> None:
    with opened() as pipeline:
        watch(pipeline, auto=True)
        tokens = keep_busy(pipeline, lambda: pipeline.layers == (3, 3))
        stats = pipeline.stats()
        assert stats.changeovers >= 1
        assert stats.last_changeover is not None
        Timed.slow = {0: 2.5}
        tokens += keep_busy(pipeline, lambda: pipeline.layers in ((2, 4), (1, 5)))
        assert len(set(tokens)) == 4  # the same four texts over and over


def test_advise_says_so_and_changes_nothing(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "stageline.rebalance")
    with opened() as pipeline:
        watch(pipeline, auto=False)
        found: list[RebalanceStats] = []

        def advised() -> bool:
            stats = pipeline.stats().rebalance
            found.extend([stats] if stats is not None and stats.advice is not None else [])
            # a first window may hold times of a machine that was busy with something else, and be better told later
            return bool(found) and found[-1].advice is not None and found[-1].advice.layers == (3, 3)

        keep_busy(pipeline, advised)
        reported = found[-1]
        assert reported.advice is not None
        assert (reported.mode, reported.advice.layers, reported.advice.now) == ("advise", (3, 3), (5, 1))
        assert reported.advice.gain > 0.3
        assert (pipeline.layers, pipeline.stats().changeovers) == ((5, 1), 0)
        assert any("layers 3,3 instead of 5,1 would have" in record.message for record in caplog.records)
        pipeline.recut([3, 3])  # taken by hand: it does not hold any more
        after = pipeline.stats().rebalance
        assert after is not None
        assert after.advice is None


def test_costs_are_those_of_the_weights_that_were_opened(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def reported(*arguments: Any) -> UseSeconds:
        asked.append(arguments[3:])
        return use_seconds(*arguments)

    monkeypatch.setattr("stageline.runtime.rebalance.rebalancer.use_seconds", reported)
    with opened(quantise="int8", rebalance="advise") as pipeline:
        keep_busy(pipeline, lambda: bool(asked))
    assert set(asked) == {("int8", "timed")}


def test_stages_that_do_not_open_are_reported_and_it_serves_on(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    armed = threading.Event()

    def fails() -> None:
        if armed.is_set():
            raise EngineError("no memory for a stage")

    with opened(fails) as pipeline:
        armed.set()
        watch(pipeline, auto=True)
        keep_busy(pipeline, lambda: any("the stages stay as they are" in r.message for r in caplog.records))
        assert "the stages stay as they are: no memory for a stage" in [r.message for r in caplog.records]
        assert pipeline.layers == (5, 1)
        armed.clear()
        keep_busy(pipeline, lambda: pipeline.layers == (3, 3))  # it tries again


def test_an_idle_pipeline_is_left_alone_and_closes_at_once(opened: Opened) -> None:
    before = set(threading.enumerate())
    with opened(rebalance="auto") as pipeline:
        reported = pipeline.stats().rebalance
        assert reported is not None
        assert (reported.mode, reported.advice) == ("auto", None)
        assert pipeline.run({"input_ids": np.array([[5, 6, 7]])})["logits"].shape == (1, 3, 100)
    assert set(threading.enumerate()) <= before


def test_an_unknown_mode_is_refused(opened: Opened) -> None:
    with pytest.raises(RequestError, match="rebalance is 'on'; it must be one of off, advise, auto"):
        opened(rebalance="on")
