"""Stages exchanged while they serve a small Llama and a small BERT: no request is lost, no token is another."""

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llamas import SIX_BLOCKS
from stageline.exporter.synthesize import synthesize
from stageline.models.errors import BundleError, DeadlineError, EngineError, RequestError, StagelineError
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.engines import ENGINES, Device, Engine, PackedRows, StageFile, Value, engine_factory
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.stages.opening import check_same_model

SECONDS = 20  # for what must happen; nothing takes that long
VOCABULARY, BLOCKS, MOST = SIX_BLOCKS["vocab_size"], SIX_BLOCKS["num_hidden_layers"], 40


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist())


SYSTEM = prompt_of(99, 30)
PROMPTS = [
    *(prompt_of(seed, length) for seed, length in enumerate((1, 3, 8, 17, 33, 70))),
    *(SYSTEM + prompt_of(100 + seed, 3) for seed in range(3)),
]
Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def llamas(export_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of one model with two sets of weights; do not change them."""
    one, folder = export_once(SIX_BLOCKS, stages=2), tmp_path_factory.mktemp("llama")
    synthesize(SIX_BLOCKS, folder / "checkpoint", seed=2, dtype="bfloat16")
    other = Bundle.open(shutil.copytree(one, folder / "bundle"))
    (weights,) = other.manifest.weight_files
    shutil.copy(folder / "checkpoint" / "model.safetensors", other.path / weights)
    files = [file_entry(other.path, e.path) if e.path == weights else e for e in other.manifest.files]
    write_manifest(other.path, other.manifest.model_copy(update={"files": tuple(files)}))
    return [one, other.path]


@pytest.fixture(scope="module")
def want(llamas: list[Path]) -> Callable[..., Tokens]:
    """What undisturbed pipelines of one stage generate: the number of a bundle, a prompt, how many tokens -> tokens."""
    found = []
    for bundle in llamas:
        with Pipeline.open(bundle) as pipeline:
            found.append({prompt: pipeline.submit(request(prompt)).result(SECONDS).choices[0].token_ids
                          for prompt in PROMPTS})  # fmt: skip
    assert not any(found[0][prompt][:8] == found[1][prompt][:8] for prompt in PROMPTS)
    assert len({token for tokens in found[0].values() for token in tokens}) > 40
    return lambda bundle, prompt, tokens=MOST: found[bundle][tuple(prompt)][:tokens]


def request(prompt: Sequence[int], **sampling: Any) -> GenerationRequest:
    deadline_s = sampling.pop("deadline_s", None)
    return GenerationRequest(tuple(prompt), Sampling.of({"max_tokens": MOST, **sampling}), deadline_s)


def tokens_of(future: "Future[Completion]") -> Tokens:
    return future.result(SECONDS).choices[0].token_ids


Step = Callable[[int, Mapping[str, Value]], None]


class Watched:
    """An engine that calls `step` before each step."""

    def __init__(self, engine: Engine, number: int, step: Step) -> None:
        self.engine, self.number, self.before = engine, number, step
        self.input_names, self.output_names, self.max_rows = engine.input_names, engine.output_names, engine.max_rows
        self.packs, self.block_tokens = engine.packs, engine.block_tokens
        self.run, self.copy_slot, self.close = engine.run, engine.copy_slot, engine.close
        self.give_caches, self.take_caches = engine.give_caches, engine.take_caches

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> Mapping[str, Value]:
        self.before(self.number, inputs)
        return self.engine.step(inputs, outputs, rows)


class Opening:
    """Opens engines as a test wants them; `opened` has what each was opened with."""

    def __init__(self) -> None:
        self.opened: list[tuple[StageFile, dict[str, Any]]] = []
        self.before_open: Callable[[StageFile], None] = lambda stage: None
        self.before_step: Step = lambda stage, inputs: None
        self.wrap: Callable[[Watched], Watched] = lambda engine: engine

    def __call__(self, stage: StageFile, device: Device, **settings: Any) -> Engine:
        self.before_open(stage)
        self.opened.append((stage, settings))
        engine = engine_factory("onnxruntime")(stage, device, **settings)
        return self.wrap(Watched(engine, stage.number, lambda number, inputs: self.before_step(number, inputs)))


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Opening:
    """How the engine "watched" opens stages."""
    opening = Opening()
    monkeypatch.setitem(ENGINES, "watched", lambda: opening)
    return opening


class Gate:
    """Lets nobody through until it is opened; `entered` once somebody wants to."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.opened.wait(SECONDS)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def slowly(stage: int, inputs: Mapping[str, Value]) -> None:
    time.sleep(0.002)


def random_cut(rng: random.Random) -> list[int]:
    cuts = sorted(rng.sample(range(1, BLOCKS), rng.randint(0, 3)))
    return [end - first for first, end in zip([0, *cuts], [*cuts, BLOCKS], strict=True)]


# Generation.


@pytest.mark.parametrize("seed", range(2))
def test_no_recut_under_load_loses_a_request_or_changes_a_token(
    llamas: list[Path], want: Callable[..., Tokens], seed: int
) -> None:
    with Pipeline.open(llamas[0], slots=4, prefill_chunk=7, queue=1000) as pipeline:
        stop = threading.Event()

        def client(number: int) -> tuple[int, int]:
            rng = random.Random(100 * seed + number)
            futures = []
            while not stop.is_set():
                prompt, count, n = rng.choice(PROMPTS), rng.randint(1, MOST), rng.choice([1, 1, 1, 3])
                futures.append((prompt, count, pipeline.submit(request(prompt, max_tokens=count, n=n))))
                time.sleep(rng.uniform(0, 0.02))
                if rng.random() < 1 / 4:
                    rng.choice(futures)[2].cancel()
                while sum(not one.done() for *_, one in futures) > 8 and not stop.is_set():
                    time.sleep(0.002)  # a slow machine is kept busy, not buried
            cancelled = 0
            for prompt, count, future in futures:
                try:
                    got = {choice.token_ids for choice in future.result(SECONDS).choices}
                    assert got == {want(0, prompt, count)}
                except CancelledError:
                    cancelled += 1
            return len(futures), cancelled

        with ThreadPoolExecutor(3) as threads:
            clients = [threads.submit(client, number) for number in range(3)]
            rng = random.Random(seed)
            try:
                for _ in range(8):
                    counts = random_cut(rng)
                    pipeline.recut(counts, threads=rng.choice([None, 1, 2]), devices=rng.choice([None, ["cpu"]]))
                    assert list(pipeline.layers) == counts
                    time.sleep(rng.uniform(0, 0.05))
            finally:
                stop.set()
            found = [future.result(4 * SECONDS) for future in clients]
        total, cancelled = (sum(column) for column in zip(*found, strict=True))
        stats = pipeline.stats().generation
        assert stats is not None
        deadline = time.monotonic() + SECONDS
        while stats.running and time.monotonic() < deadline:
            time.sleep(0.005)
            stats = pipeline.stats().generation
            assert stats is not None
        assert (stats.done, stats.cancelled, stats.failed) == (total - cancelled, cancelled, 0)
        assert total - cancelled > 20
        assert 0 <= stats.bubble_ratio < 1


def test_what_ended_continuations_left_in_the_caches_serves_after_a_recut(
    llamas: list[Path], want: Callable[..., Tokens]
) -> None:
    with Pipeline.open(llamas[0], slots=3) as pipeline:
        first = pipeline.submit(request(PROMPTS[-3])).result(SECONDS)
        for counts in ([1, 5], [6], [2, 2, 2]):
            pipeline.recut(counts)
            again = pipeline.submit(request(PROMPTS[-3])).result(SECONDS)
            assert again.cached_tokens == len(PROMPTS[-3]) - 1
            assert again.choices[0].token_ids == first.choices[0].token_ids == want(0, PROMPTS[-3])
        other = pipeline.submit(request(PROMPTS[-2])).result(SECONDS)
        assert other.cached_tokens == len(SYSTEM)
        assert other.choices[0].token_ids == want(0, PROMPTS[-2])


@pytest.mark.parametrize("options", [{"quantise": "int8"}, {"cache_dtype": "float16", "quantise": "int4"}])
def test_stages_are_reopened_as_they_were_opened(llamas: list[Path], opening: Opening, options: dict[str, Any]) -> None:
    with Pipeline.open(llamas[0], slots=2, capacity=96, engine="watched", **options) as pipeline:
        undisturbed = [tokens_of(pipeline.submit(request(prompt))) for prompt in PROMPTS[:5]]
        opening.before_step = slowly
        running = [pipeline.submit(request(prompt)) for prompt in PROMPTS[:5]]
        pipeline.recut([1, 3, 2])
        assert [tokens_of(future) for future in running] == undisturbed
    assert len(opening.opened) == 2 + 3
    assert len({(settings["cache"], settings["quantise"]) for _, settings in opening.opened}) == 1
    assert opening.opened[0][1]["quantise"] == options["quantise"]


def test_stages_that_do_not_open_leave_the_old_ones_serving(
    llamas: list[Path], want: Callable[..., Tokens], opening: Opening
) -> None:
    def refuse(stage: StageFile) -> None:
        if stage.number == 1:
            raise EngineError("stage 1: no memory for it")

    with Pipeline.open(llamas[0], engine="watched", slots=2) as pipeline:
        before = set(threading.enumerate())
        opening.before_open, opening.before_step = refuse, slowly
        running = [pipeline.submit(request(prompt)) for prompt in PROMPTS]
        with pytest.raises(EngineError, match=r"^stage 1: no memory for it$"):
            pipeline.recut([2, 2, 2])
        assert pipeline.stats().changeovers == 0
        assert len(pipeline.layers) == 2
        assert set(threading.enumerate()) <= before
        assert [tokens_of(future) for future in running] == [want(0, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("stage", [0, 2])
def test_caches_that_do_not_move_leave_the_old_stages_serving(
    llamas: list[Path], want: Callable[..., Tokens], opening: Opening, stage: int
) -> None:
    class Stubborn(Watched):
        def __init__(self, inner: Watched) -> None:
            super().__init__(inner.engine, inner.number, inner.before)
            if inner.number == stage:
                self.take_caches = self.refuse

        def refuse(self, caches: Mapping[str, Value]) -> None:
            raise EngineError("the device is gone")

    with Pipeline.open(llamas[0], engine="watched", slots=2) as pipeline:
        before = set(threading.enumerate())
        opening.wrap, opening.before_step = Stubborn, slowly
        running = [pipeline.submit(request(prompt)) for prompt in PROMPTS]
        with pytest.raises(EngineError, match=r"^the device is gone$"):
            pipeline.recut([2, 2, 2])
        batch = pipeline.run({"input_ids": np.array([PROMPTS[2]])})
        assert batch["logits"].shape == (1, len(PROMPTS[2]), VOCABULARY)
        assert [tokens_of(future) for future in running] == [want(0, prompt) for prompt in PROMPTS]
        assert set(threading.enumerate()) <= before
        opening.wrap = lambda engine: engine
        pipeline.recut([2, 2, 2])  # and it can be tried again
        assert tokens_of(pipeline.submit(request(PROMPTS[4]))) == want(0, PROMPTS[4])


def test_requests_cancelled_and_submitted_while_steps_drain(
    llamas: list[Path], want: Callable[..., Tokens], opening: Opening, gate: Gate
) -> None:
    with Pipeline.open(llamas[0], engine="watched", slots=2) as pipeline, ThreadPoolExecutor(1) as threads:
        pipeline.submit(request(PROMPTS[0], max_tokens=1)).result(SECONDS)
        opening.before_step = gate
        doomed, running = pipeline.submit(request(PROMPTS[5])), pipeline.submit(request(PROMPTS[4]))
        assert gate.entered.wait(SECONDS)
        switching = threads.submit(pipeline.recut, [3, 2, 1])
        while len(opening.opened) < 2 + 3:
            time.sleep(0.001)
        assert doomed.cancel()
        later = [pipeline.submit(request(prompt)) for prompt in PROMPTS[1:4]]
        assert not switching.done()
        gate.opened.set()
        assert switching.result(SECONDS).pause_s > 0
        assert tokens_of(running) == want(0, PROMPTS[4])
        assert [tokens_of(future) for future in later] == [want(0, prompt) for prompt in PROMPTS[1:4]]


@pytest.mark.parametrize("when", ["opening", "draining", "finishing"])
def test_close_during_a_switch_ends_everything(llamas: list[Path], opening: Opening, gate: Gate, when: str) -> None:
    before = set(threading.enumerate())
    pipeline = Pipeline.open(llamas[0], engine="watched", slots=2)
    generation = pipeline.start(request(PROMPTS[4], max_tokens=90, min_tokens=90))
    if when == "opening":
        opening.before_open = gate
    else:
        opening.before_step = gate
    with ThreadPoolExecutor(3) as threads:
        if when == "finishing":
            switching = threads.submit(pipeline.swap_weights, llamas[1])
        else:
            switching = threads.submit(pipeline.recut, [3, 2, 1])
        assert gate.entered.wait(SECONDS)
        while when != "opening" and len(opening.opened) < 4:
            time.sleep(0.001)
        second = threads.submit(pipeline.recut, [6])
        closing = threads.submit(pipeline.close)
        with pytest.raises(RequestError, match="closed before this request was finished"):
            generation.result(SECONDS)
        gate.opened.set()
        closing.result(SECONDS)
        for future in (switching, second):
            with pytest.raises(RequestError, match=r"the pipeline (is|was) closed"):
                future.result(SECONDS)
    assert set(threading.enumerate()) <= before
    with pytest.raises(RequestError, match="the pipeline is closed"):
        pipeline.recut(2)


@pytest.mark.parametrize("of", ["generation", "batch"])
def test_a_callback_that_closes_during_a_switch_ends_everything(
    llamas: list[Path], opening: Opening, gate: Gate, of: str
) -> None:
    before = set(threading.enumerate())
    pipeline = Pipeline.open(llamas[0], engine="watched", slots=2)
    opening.before_step = gate
    generating = pipeline.submit(request(PROMPTS[2], max_tokens=1))
    assert gate.entered.wait(SECONDS)
    batch = pipeline.submit({"input_ids": np.array([PROMPTS[2]])})
    (generating if of == "generation" else batch).add_done_callback(lambda _: pipeline.close())
    with ThreadPoolExecutor(1) as threads:
        switching = threads.submit(pipeline.recut, [3, 2, 1])
        while len(opening.opened) < 2 + 3:
            time.sleep(0.001)
        gate.opened.set()
        switching.exception(SECONDS)  # whichever came first
    pipeline.close()
    assert set(threading.enumerate()) <= before


def test_two_switches_at_once_take_turns(llamas: list[Path], want: Callable[..., Tokens]) -> None:
    with Pipeline.open(llamas[0], slots=4) as pipeline, ThreadPoolExecutor(4) as threads:
        running = [pipeline.submit(request(prompt)) for prompt in PROMPTS]
        cuts = [[1, 5], [2, 4], [6], [1, 1, 4]]
        for switching in [threads.submit(pipeline.recut, counts) for counts in cuts]:
            switching.result(SECONDS)
        assert list(pipeline.layers) in cuts
        assert pipeline.stats().changeovers == 4
        assert [tokens_of(future) for future in running] == [want(0, prompt) for prompt in PROMPTS]


def test_a_callback_on_the_pipelines_threads_cannot_switch(llamas: list[Path]) -> None:
    message: Future[BaseException] = Future()

    def switch(_: object) -> None:
        try:
            pipeline.recut(1)
        except BaseException as error:
            message.set_result(error)

    with Pipeline.open(llamas[0]) as pipeline:
        pipeline.submit(request(PROMPTS[0])).add_done_callback(switch)
        error = message.result(SECONDS)
        assert isinstance(error, RequestError)
        assert "use another thread" in str(error)


# What fails while opening.


@pytest.mark.parametrize("part", ["tokenizer", "generator", "rebalancer"])
def test_what_fails_while_opening_leaves_nothing_open(
    llamas: list[Path], opening: Opening, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise StagelineError(f"a broken {part}")

    monkeypatch.setattr(
        {
            "tokenizer": "stageline.runtime.generation.text_model.open_encoder",
            "generator": "stageline.runtime.executor.Generator.__init__",
            "rebalancer": "stageline.runtime.rebalance.rebalancer.Rebalancer.__init__",
        }[part],
        fails,
    )
    closed: list[int] = []

    def noted(engine: Watched) -> Watched:
        inner = engine.close
        engine.close = lambda: (inner(), closed.append(engine.number))[0]
        return engine

    opening.wrap, before = noted, set(threading.enumerate())
    with pytest.raises(StagelineError, match=f"a broken {part}"):
        Pipeline.open(llamas[0], engine="watched", rebalance="advise")
    assert set(threading.enumerate()) <= before
    assert sorted(closed) == [stage.number for stage, _ in opening.opened]
    assert bool(closed) == (part != "tokenizer")  # which is read before any engine is opened


# New weights.


def test_new_weights_serve_those_that_had_not_begun(
    llamas: list[Path], want: Callable[..., Tokens], opening: Opening
) -> None:
    with Pipeline.open(llamas[0], engine="watched", slots=2) as pipeline, ThreadPoolExecutor(1) as threads:
        pipeline.submit(request(PROMPTS[-3])).result(SECONDS)  # leaves its prompt in a cache
        opening.before_step = slowly
        begun = pipeline.submit(request(PROMPTS[0], n=3))  # two of its choices run, one waits
        while not pipeline.stats().stages[0].runs:
            time.sleep(0.001)
        waiting = [pipeline.submit(request(prompt)) for prompt in PROMPTS[1:3]]
        late = pipeline.submit(request(PROMPTS[3], deadline_s=0.001))
        dropped = pipeline.submit(request(PROMPTS[3]))
        swapping = threads.submit(pipeline.swap_weights, llamas[1])
        while len(opening.opened) < 4:
            time.sleep(0.001)
        later = pipeline.submit(request(PROMPTS[-3]))
        assert dropped.cancel()
        swapping.result(SECONDS)
        opening.before_step = lambda stage, inputs: None
        assert [choice.token_ids for choice in begun.result(SECONDS).choices] == [want(0, PROMPTS[0])] * 3
        assert [tokens_of(future) for future in waiting] == [want(1, prompt) for prompt in PROMPTS[1:3]]
        assert later.result(SECONDS).cached_tokens == 0
        assert tokens_of(later) == want(1, PROMPTS[-3])
        with pytest.raises(DeadlineError):
            late.result(SECONDS)
        assert pipeline.bundle.path == llamas[1]
        pipeline.recut(1)
        assert tokens_of(pipeline.submit(request(PROMPTS[4]))) == want(1, PROMPTS[4])
        stats = pipeline.stats().generation
        assert stats is not None
        assert (stats.done, stats.failed, stats.cancelled) == (6, 1, 1)


def test_weights_of_another_model_are_refused(llamas: list[Path], tmp_path: Path, tiny_bundle: Path) -> None:
    with Pipeline.open(llamas[0]) as pipeline:
        with pytest.raises(BundleError, match="its architecture is bert, not llama; open it as a pipeline of its own"):
            pipeline.swap_weights(tiny_bundle)
        with pytest.raises(BundleError, match="no bundle at"):
            pipeline.swap_weights(tmp_path / "nothing")
        assert tokens_of(pipeline.submit(request(PROMPTS[0], max_tokens=2)))


def test_only_weights_may_differ(llamas: list[Path]) -> None:
    running, new = map(Bundle.open, llamas)
    check_same_model(running, new)
    for change, message in (
        ({"vocabulary": 299}, "its vocabulary is 299, not 300"),
        ({"uses": new.manifest.uses[1:]}, "its number of blocks is 5, not 6"),
        ({"max_positions": 64}, "its max positions is 64, not 128"),
        ({"outputs": ()}, r"its outputs is \[\], not \['logits'\]"),
    ):
        with pytest.raises(BundleError, match=message):
            check_same_model(running, replace(new, manifest=new.manifest.model_copy(update=change)))
    name = next(iter(new.tensors))
    wide = {**new.tensors, name: replace(new.tensors[name], shape=(7, 7))}
    with pytest.raises(BundleError, match=rf"its shape of {name} is \(7, 7\), not"):
        check_same_model(running, replace(new, tensors=wide))


# Batches.


def test_batches_go_through_the_stages_that_they_were_queued_for(tiny_bundle: Path) -> None:
    random_ids = np.random.default_rng(0)
    with Pipeline.open(tiny_bundle, queue=32, micro_batch=2) as pipeline, ThreadPoolExecutor(3) as threads:
        inputs = [{"input_ids": random_ids.integers(0, 12, (5, 9))} for _ in range(6)]
        expected = [pipeline.run(one) for one in inputs]
        stop = threading.Event()

        def client(number: int) -> int:
            rng, count = random.Random(number), 0
            while not stop.is_set():
                which = rng.randrange(6)
                future = pipeline.submit(inputs[which])
                if rng.random() < 0.2 and future.cancel():
                    continue
                for name, value in future.result(SECONDS).items():
                    np.testing.assert_array_equal(value, expected[which][name])
                count += 1
            return count

        clients = [threads.submit(client, number) for number in range(3)]
        try:
            for counts in ([3], [1, 1, 1], [2, 1], [1, 2], [3], [1, 1, 1]):
                pipeline.recut(counts)
        finally:
            stop.set()
        assert sum(client.result(SECONDS) for client in clients) > 10
        stats = pipeline.stats()
        assert (stats.failed, stats.in_flight, stats.layers, stats.changeovers) == (0, 0, (1, 1, 1), 6)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 0}, "0 stages do not fit: the model has 6 blocks"),
        ({"stages": 7}, "7 stages do not fit: the model has 6 blocks"),
        ({"stages": [3, 4]}, "layers 3,4 do not fit: give each stage at least 1 block, 6 in all"),
        ({"stages": [6, 0]}, "layers 6,0 do not fit"),
        ({"stages": []}, "layers  do not fit"),
        ({"stages": 2, "threads": 0}, "threads is 0; it must be at least 1"),
        ({"stages": 2, "devices": ["tpu"]}, "unknown device 'tpu'"),
        ({"stages": 1, "devices": ["cpu", "cpu"]}, "2 devices are given for 1 stages"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(llamas: list[Path], arguments: dict[str, Any], message: str) -> None:
    with Pipeline.open(llamas[0]) as pipeline:
        with pytest.raises(StagelineError, match=message):
            pipeline.recut(**arguments)
        assert tokens_of(pipeline.submit(request(PROMPTS[0], max_tokens=2)))
        assert pipeline.stats().changeovers == 0


def test_a_bundle_whose_parts_are_gone_leaves_the_stages_serving(llamas: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(llamas[0], tmp_path / "bundle")
    with Pipeline.open(folder) as pipeline:
        shutil.rmtree(folder / "parts")
        with pytest.raises(BundleError, match=r"parts/.* cannot be read \(No such file or directory\); export"):
            pipeline.recut(1)
        assert tokens_of(pipeline.submit(request(PROMPTS[0], max_tokens=2)))
