"""Generation by a small Llama of random weights, against transformers' own, whatever else is in flight."""

import asyncio
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stageline.exporter.export import export
from stageline.models.errors import CheckpointError, DeadlineError, EngineError, QueueFullError, RequestError
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines import ENGINES, Array, Device, Engine, PackedRows, StageFile, engine_factory
from stageline.runtime.generation.detokenize import TextStream
from stageline.runtime.generation.request import Completion, Delta, GenerationRequest, Sampling
from stageline.runtime.generation.stream import Generation
from stageline.runtime.pipeline import Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SECONDS = 20  # for what must happen; nothing takes that long
VOCABULARY = 300
ENDS = range(2, 12)
MOST = 24  # new tokens that the reference has for each prompt
WORDS = [f"w{number}" for number in range(VOCABULARY + 1)]  # one that the model does not have


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist())


SYSTEM = prompt_of(99, 30)
PROMPTS = [
    *(prompt_of(seed, length) for seed, length in enumerate((1, 2, 3, 5, 8, 17, 33, 64, 70))),
    *(SYSTEM + prompt_of(100 + seed, 3) for seed in range(3)),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1,
        eos_token_id=list(ENDS), pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bundles(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns the model's bundle in `stages` stages; do not change it."""
    folder = tmp_path_factory.mktemp("generator")
    model.save_pretrained(folder / "checkpoint")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "checkpoint" / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }} {% endfor %}w7"
    (folder / "checkpoint" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    export(folder / "checkpoint", folder / "1")

    @cache
    def cut(stages: int) -> Path:
        bundle = folder / str(stages)
        if stages > 1:
            shutil.copytree(folder / "1", bundle)
            recut(bundle, stages)
        return bundle

    return cut


@pytest.fixture(scope="module")
def want(model: LlamaForCausalLM) -> Callable[[Sequence[int], int], tuple[int, ...]]:
    """What transformers' generate goes on with, greedily: a prompt and a number of tokens -> tokens."""

    @cache
    def longest(prompt: tuple[int, ...]) -> tuple[int, ...]:
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=MOST)
        return tuple(out[0, len(prompt) :].tolist())

    return lambda prompt, tokens: longest(tuple(prompt))[:tokens]


def ended(tokens: Sequence[int]) -> bool:
    return tokens[-1] in ENDS


def log_softmax(model: LlamaForCausalLM, prompt: Sequence[int], tokens: Sequence[int]) -> Array:
    """torch's log probabilities [tokens, vocabulary] at the place of each of `tokens`."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    found: Array = logits.double().log_softmax(-1).numpy()
    return found


def words(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def tokens_of(future: "Future[Completion] | Generation") -> tuple[int, ...]:
    return future.result(SECONDS).choices[0].token_ids


def request(prompt: Sequence[int], deadline_s: float | None = None, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), Sampling.of({"max_tokens": 10, **sampling}), deadline_s)


Hook = Callable[[int, Mapping[str, Array]], None]


class Hooked:
    """An engine that calls `before` at each step, and `after` with what it computed."""

    def __init__(self, engine: Engine, number: int, before: Hook, after: Hook) -> None:
        self.engine, self.number, self.before, self.after = engine, number, before, after
        self.input_names, self.output_names, self.max_rows = engine.input_names, engine.output_names, engine.max_rows
        self.packs, self.block_tokens = engine.packs, engine.block_tokens
        self.run, self.copy_slot, self.close = engine.run, engine.copy_slot, engine.close

    def step(self, inputs: Mapping[str, Array], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        self.before(self.number, inputs)
        values = self.engine.step(inputs, outputs, rows)
        self.after(self.number, values)
        return values


@pytest.fixture
def hooked(bundles: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    """Opens a pipeline of `stages` stages whose engines call `before` (stage, inputs) and `after` (stage, outputs)."""

    def nothing(stage: int, values: Mapping[str, Array]) -> None:
        pass

    def begin(
        stages: int, before: Hook = nothing, after: Hook = nothing, engine: str = "onnxruntime", **options: Any
    ) -> Pipeline:
        def factory(stage: StageFile, device: Device, **settings: Any) -> Engine:
            return Hooked(engine_factory(engine)(stage, device, **settings), stage.number, before, after)

        monkeypatch.setitem(ENGINES, "hooked", lambda: factory)
        return Pipeline.open(bundles(stages), engine="hooked", **options)

    return begin


class Gate:
    """Holds the steps of stage 0 until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, stage: int, inputs: Mapping[str, Array]) -> None:
        if stage == 0:
            self.entered.set()
            assert self.opened.wait(SECONDS)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


# The right tokens.

of_rows_and_of_blocks = pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])


@of_rows_and_of_blocks
@pytest.mark.parametrize(
    ("stages", "slots", "chunk"), [(1, 5, 64), (1, 1, 3), (2, 2, 1), (2, 5, 3), (3, 5, 64), (3, 1, 64), (3, 2, 3)]
)
def test_greedy_tokens_are_those_of_transformers(
    bundles: Callable[[int], Path],
    want: Callable[..., tuple[int, ...]],
    stages: int,
    slots: int,
    chunk: int,
    engine: str,
) -> None:
    with Pipeline.open(bundles(stages), engine=engine, slots=slots, prefill_chunk=chunk) as pipeline:
        futures = [pipeline.submit(request(prompt, max_tokens=MOST)) for prompt in PROMPTS]
        assert [tokens_of(future) for future in futures] == [want(prompt, MOST) for prompt in PROMPTS]


def test_the_reference_is_worth_comparing_with(want: Callable[..., tuple[int, ...]]) -> None:
    found = [want(prompt, MOST) for prompt in PROMPTS]
    assert len({token for tokens in found for token in tokens}) > 40
    assert any(ended(tokens) for tokens in found)
    assert sum(not ended(tokens) for tokens in found) > 4


@of_rows_and_of_blocks
def test_tokens_are_right_whenever_requests_come_and_whichever_are_cancelled(
    bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]], engine: str
) -> None:
    with Pipeline.open(bundles(2), engine=engine, slots=4, prefill_chunk=7, queue=1000) as pipeline:

        def client(seed: int) -> int:
            rng = random.Random(seed)
            futures = []
            for _ in range(40):
                prompt = rng.choice(PROMPTS)
                count = rng.randint(1, MOST)
                futures.append((prompt, count, pipeline.submit(request(prompt, max_tokens=count))))
                time.sleep(rng.uniform(0, 0.002))
                if rng.random() < 1 / 3:
                    rng.choice(futures)[2].cancel()
            cancelled = 0
            for prompt, count, future in futures:
                try:
                    assert tokens_of(future) == want(prompt, count)
                except CancelledError:
                    cancelled += 1
            return cancelled

        for prompt in PROMPTS:
            want(prompt, 1)
        with ThreadPoolExecutor(5) as threads:
            cancelled = sum(threads.map(client, range(5)))
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert (stats.done, stats.cancelled, stats.failed) == (200 - cancelled, cancelled, 0)
        assert 10 < cancelled < 100
        assert tokens_of(pipeline.submit(request(PROMPTS[5]))) == want(PROMPTS[5], 10)


def test_tokens_are_right_where_rows_are_set_back_for_want_of_blocks(
    bundles: Callable[[int], Path], model: LlamaForCausalLM, want: Callable[..., tuple[int, ...]]
) -> None:
    manifest = Bundle.open(bundles(2)).manifest
    values = sum(spec.heads * (spec.key_size + spec.value_size) for stage in manifest.stages for spec in stage.caches)
    memory = values * 4 * 160  # 5 blocks of 32 tokens
    prompts = [prompt for seed in range(200, 220) if len(want(prompt := prompt_of(seed, 30), MOST)) > 6][:6]
    with Pipeline.open(bundles(2), engine="openvino", slots=6, cache_memory=memory) as pipeline:
        futures = [pipeline.submit(request(prompt, max_tokens=MOST, prompt_logprobs=0)) for prompt in prompts]
        assert [tokens_of(future) for future in futures] == [want(prompt, MOST) for prompt in prompts]
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert stats.set_back > 0
        for prompt, future in zip(prompts, futures, strict=True):  # computed once more, but known once
            found = future.result().prompt_logprobs
            check_logprobs(found[1:], log_softmax(model, prompt[:1], prompt[1:]), prompt[1:], 0)


def eventually(pipeline: Pipeline, holds: Callable[[Any], bool]) -> Any:
    """The pipeline's stats of generation, once they are so."""
    deadline = time.monotonic() + SECONDS
    while True:
        stats = pipeline.stats().generation
        if holds(stats):
            return stats
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)


def test_logprobs_are_torchs_log_softmax(bundles: Callable[[int], Path], model: LlamaForCausalLM) -> None:
    with Pipeline.open(bundles(2)) as pipeline:
        futures = [pipeline.submit(request(prompt, logprobs=4, temperature=1.5, seed=1)) for prompt in PROMPTS]
        for prompt, future in zip(PROMPTS, futures, strict=True):
            choice = future.result(SECONDS).choices[0]
            expected = log_softmax(model, prompt, choice.token_ids)
            assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
            for place, entry in enumerate(choice.logprobs):
                assert entry.logprob == pytest.approx(expected[place, entry.token_id], abs=1e-4)
                best = np.sort(expected[place])[::-1][:4]
                np.testing.assert_allclose([value for _, value in entry.top], best, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "stages", "slots", "chunk"),
    [
        ("onnxruntime", 1, 5, 64), ("onnxruntime", 2, 2, 1), ("onnxruntime", 3, 4, 7),
        ("openvino", 1, 2, 7), ("openvino", 2, 5, 64), ("openvino", 3, 4, 7), ("hooked", 2, 4, 7),
    ],
)  # fmt: skip
def test_logprobs_of_prompts_are_torchs_log_softmax(
    bundles: Callable[[int], Path],
    model: LlamaForCausalLM,
    want: Callable[..., tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    stages: int,
    slots: int,
    chunk: int,
) -> None:
    """Beside prompts of which none are asked for, and with rows that decode; `hooked`: steps of ranges of slots."""

    def of_ranges(stage: StageFile, device: Device, **settings: Any) -> Engine:
        opened = Hooked(engine_factory("onnxruntime")(stage, device, **settings), 0, lambda *_: None, lambda *_: None)
        opened.packs = False
        return opened

    monkeypatch.setitem(ENGINES, "hooked", lambda: of_ranges)
    with Pipeline.open(bundles(stages), engine=engine, slots=slots, prefill_chunk=chunk) as pipeline:
        asked = [
            {"max_tokens": place % 3, "prompt_logprobs": place % 2 * 3, "n": 1 + place % 2}
            for place in range(len(PROMPTS))
        ]
        beside = [pipeline.submit(request(prompt)) for prompt in PROMPTS[3:7]]
        futures = [pipeline.submit(request(prompt, **more)) for prompt, more in zip(PROMPTS, asked, strict=True)]
        assert [tokens_of(future) for future in beside] == [want(prompt, 10) for prompt in PROMPTS[3:7]]
        for prompt, more, future in zip(PROMPTS, asked, futures, strict=True):
            completion = future.result(SECONDS)
            drawn = want(prompt, MOST)[: more["max_tokens"]]
            assert [choice.token_ids for choice in completion.choices] == [drawn] * more["n"]
            if not drawn:
                assert completion.choices[0].finish_reason == "length"
                assert completion.choices[0].text == ""
            nothing, *found = completion.prompt_logprobs
            assert nothing is None
            check_logprobs(found, log_softmax(model, prompt[:1], prompt[1:]), prompt[1:], more["prompt_logprobs"])
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert stats.generated_tokens == sum(
            len(choice.token_ids) for future in (*beside, *futures) for choice in future.result().choices
        )


def check_logprobs(found: Sequence[Any], expected: Array, tokens: Sequence[int], count: int) -> None:
    """Log probabilities of tokens, with the `count` likeliest, against torch's [tokens, vocabulary]."""
    assert [entry.token_id for entry in found] == list(tokens)
    for row, entry in zip(expected, found, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[::-1][:count], atol=1e-4)


def test_a_prompt_in_the_cache_is_computed_again_for_its_logprobs(
    bundles: Callable[[int], Path], model: LlamaForCausalLM
) -> None:
    prompt = PROMPTS[7]
    for engine in ("onnxruntime", "openvino"):
        with Pipeline.open(bundles(2), engine=engine, slots=2, prefill_chunk=16) as pipeline:
            plain = [pipeline.submit(request(prompt)).result(SECONDS) for _ in range(2)][1]
            scored = pipeline.submit(request(prompt, prompt_logprobs=0)).result(SECONDS)
            again = pipeline.submit(request(prompt)).result(SECONDS)
        assert (plain.cached_tokens > 30, scored.cached_tokens, again.cached_tokens > 30) == (True, 0, True)
        assert plain.choices == scored.choices == again.choices
        check_logprobs(scored.prompt_logprobs[1:], log_softmax(model, prompt[:1], prompt[1:]), prompt[1:], 0)


def test_a_broken_logit_of_a_prompt_fails_its_request(hooked: Callable[..., Pipeline]) -> None:
    def after(stage: int, values: Mapping[str, Array]) -> None:
        if "logits" in values and len(values["logits"]) > 5:
            values["logits"][4, 0, 5] = np.nan

    with hooked(1, after=after, slots=3) as pipeline:
        with pytest.raises(EngineError, match="the largest logit of prompt token 5 is nan"):
            pipeline.submit(request(PROMPTS[6], prompt_logprobs=0)).result(SECONDS)
        assert len(tokens_of(pipeline.submit(request(PROMPTS[6])))) == 10


def test_logprobs_of_a_prompt_are_there_before_the_first_piece(bundles: Callable[[int], Path]) -> None:
    with Pipeline.open(bundles(2), prefill_chunk=8) as pipeline:
        generation = pipeline.generate(PROMPTS[7], max_tokens=3, n=2, prompt_logprobs=1)
        for _ in generation:
            assert len(generation.prompt_logprobs) == len(PROMPTS[7])
        assert generation.result().prompt_logprobs == tuple(generation.prompt_logprobs)


def test_a_half_precision_cache_is_close(bundles: Callable[[int], Path], model: LlamaForCausalLM) -> None:
    with Pipeline.open(bundles(2), cache_dtype="float16", prefill_chunk=16) as pipeline:
        futures = [pipeline.submit(request(prompt, logprobs=0)) for prompt in PROMPTS]
        for prompt, future in zip(PROMPTS, futures, strict=True):
            choice = future.result(SECONDS).choices[0]
            expected = log_softmax(model, prompt, choice.token_ids)
            got = [entry.logprob for entry in choice.logprobs]
            np.testing.assert_allclose(got, expected[np.arange(len(got)), list(choice.token_ids)], atol=0.05)
            np.testing.assert_allclose(got, expected.max(axis=1), atol=0.1)  # so nearly the likeliest


def test_the_same_seed_gives_the_same_tokens_alone_and_in_company(bundles: Callable[[int], Path]) -> None:
    settings = {"temperature": 1.0, "top_p": 0.95, "max_tokens": MOST}
    with Pipeline.open(bundles(2), slots=5, prefill_chunk=16) as pipeline:
        alone = [tokens_of(pipeline.submit(request(p, seed=i, **settings))) for i, p in enumerate(PROMPTS)]
        company = [pipeline.submit(request(p, seed=i, **settings)) for i, p in enumerate(PROMPTS)]
        assert [tokens_of(future) for future in company] == alone
        unlike = pipeline.submit(request(PROMPTS[4], seed=77, **settings))
        assert tokens_of(unlike) != alone[4]


def test_choices_are_drawn_from_seeds_of_their_own_and_share_the_prompt(bundles: Callable[[int], Path]) -> None:
    prompt = PROMPTS[6]
    with Pipeline.open(bundles(2), slots=3) as pipeline:
        alone = [tokens_of(pipeline.submit(request(prompt, temperature=1.0, seed=5 + i))) for i in range(5)]
        pipeline.submit(request(prompt_of(500, 60), max_tokens=1)).result(SECONDS)
        before = pipeline.stats().stages[0].runs
        completion = pipeline.submit(request(prompt, temperature=1.0, seed=5, n=5)).result(SECONDS)
        assert [choice.token_ids for choice in completion.choices] == alone
        assert completion.completion_tokens == sum(map(len, alone))
        assert pipeline.stats().stages[0].runs > before


def test_a_common_beginning_is_not_computed_twice(
    bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]
) -> None:
    first, second, third = PROMPTS[-3:]
    with Pipeline.open(bundles(2), slots=3, prefill_chunk=8) as pipeline:
        completions = [pipeline.submit(request(first)).result(SECONDS) for _ in range(2)]
        completions += [future.result(SECONDS) for future in map(pipeline.submit, map(request, (second, third)))]
        assert [completion.cached_tokens for completion in completions] == [0, 32, 30, 30]
        tokens = [completion.choices[0].token_ids for completion in completions]
        assert tokens == [want(prompt, 10) for prompt in (first, first, second, third)]
        grown = (*third, *tokens[3], *prompt_of(7, 4))
        again = pipeline.submit(request(grown)).result(SECONDS)
        assert again.cached_tokens == len(third) + len(tokens[3]) - 1  # the last token drawn was not computed
        assert again.choices[0].token_ids == want(grown, 10)


# Where it ends.


def test_it_ends_at_max_tokens_at_an_end_token_and_at_capacity(
    bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]
) -> None:
    ending = next(prompt for prompt in PROMPTS if ended(want(prompt, MOST)))
    with Pipeline.open(bundles(2), capacity=80) as pipeline:
        assert pipeline.capacity == 80
        short = pipeline.submit(request(PROMPTS[5], max_tokens=1)).result(SECONDS).choices[0]
        assert (short.token_ids, short.finish_reason) == (want(PROMPTS[5], 1), "length")
        stopped = pipeline.submit(request(ending, max_tokens=None)).result(SECONDS).choices[0]
        assert (stopped.token_ids, stopped.finish_reason) == (want(ending, MOST), "stop")
        assert stopped.text == " " + words(stopped.token_ids[:-1])
        prompt = PROMPTS[8]
        full = pipeline.submit(request(prompt, max_tokens=None, min_tokens=11)).result(SECONDS).choices[0]
        assert (len(full.token_ids), full.finish_reason) == (80 - 70 + 1, "length")
        assert full.token_ids == want(prompt, 11)
        last = pipeline.submit(request(prompt_of(1, 80), max_tokens=None)).result(SECONDS).choices[0]
        assert len(last.token_ids) == 1
        with pytest.raises(RequestError, match="81 tokens, a cache slot holds 80"):
            pipeline.submit(request(prompt_of(1, 81)))


def test_min_tokens_keep_end_and_stop_tokens_away(
    bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]
) -> None:
    ending = next(prompt for prompt in PROMPTS if ended(want(prompt, MOST)))
    with Pipeline.open(bundles(1)) as pipeline:
        tokens = tokens_of(pipeline.submit(request(ending, max_tokens=MOST, min_tokens=MOST)))
        assert len(tokens) == MOST
        assert not set(tokens) & set(ENDS)
        expected = want(PROMPTS[8], 10)
        stop = expected[4]
        assert stop not in expected[:4]
        choice = pipeline.submit(request(PROMPTS[8], stop_token_ids=[stop])).result(SECONDS).choices[0]
        assert (choice.token_ids, choice.finish_reason) == (expected[:5], "stop")
        assert choice.text == " " + words(expected[:4])
        kept = tokens_of(pipeline.submit(request(PROMPTS[8], stop_token_ids=[stop], min_tokens=5)))
        assert kept[:4] == expected[:4]
        assert stop not in kept[:5]


def test_stop_texts_end_it_and_are_not_part_of_the_text(
    bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]
) -> None:
    expected = want(PROMPTS[8], 10)
    stop = f"{WORDS[expected[4]]} {WORDS[expected[5]][:2]}"  # ends inside a word
    with Pipeline.open(bundles(2)) as pipeline:
        choice = pipeline.submit(request(PROMPTS[8], stop=stop)).result(SECONDS).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.token_ids == expected[:6]
        assert choice.text == " " + words(expected[:4]) + " "
        untouched = pipeline.submit(request(PROMPTS[8], stop=["nothing like it"])).result(SECONDS).choices[0]
        assert untouched.text == " " + words(expected)


def test_pieces_joined_are_the_completion(bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]) -> None:
    with Pipeline.open(bundles(2), slots=2) as pipeline:
        generation = pipeline.generate(words(PROMPTS[4]), max_tokens=12, n=3, temperature=1.0, seed=0, logprobs=1)
        pieces: list[Delta] = list(generation)
        completion = generation.result(0)
        assert completion.prompt_tokens == len(PROMPTS[4])
        for number, choice in enumerate(completion.choices):
            own = [piece for piece in pieces if piece.choice == number]
            assert "".join(piece.text for piece in own) == choice.text
            shown = choice.token_ids[:-1] if choice.finish_reason == "stop" else choice.token_ids
            assert choice.text == " " + words(shown)
            assert tuple(token for piece in own for token in piece.token_ids) == choice.token_ids
            assert tuple(entry for piece in own for entry in piece.logprobs) == choice.logprobs
            assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert "".join(map(str, pipeline.generate(words(PROMPTS[4]), max_tokens=6))) == " " + words(want(PROMPTS[4], 6))


def test_the_next_step_is_on_its_way_before_the_text_is_made(
    hooked: Callable[..., Pipeline], want: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [threading.Event() for _ in range(6)]
    steps = iter(begun)
    made = []

    def before(stage: int, inputs: Mapping[str, Array]) -> None:
        next(steps).set()

    def push(self: TextStream, token_ids: Sequence[int]) -> str:
        if len(made) < 5:  # no step follows the last token
            assert begun[len(made) + 1].wait(SECONDS)
        made.append(token_ids)
        return original(self, token_ids)

    original = TextStream.push
    monkeypatch.setattr(TextStream, "push", push)
    with hooked(1, before) as pipeline:
        completion = pipeline.submit(request(PROMPTS[8], max_tokens=6)).result(SECONDS)
    assert completion.text == " " + words(want(PROMPTS[8], 6))
    assert len(made) == 6


def test_pieces_come_while_the_next_step_computes(hooked: Callable[..., Pipeline]) -> None:
    read = [threading.Event() for _ in range(6)]
    steps = iter([None, *read])

    def before(stage: int, inputs: Mapping[str, Array]) -> None:
        piece = next(steps)
        assert piece is None or piece.wait(SECONDS)

    with hooked(1, before) as pipeline:
        for piece, event in zip(pipeline.generate(words(PROMPTS[8]), max_tokens=6), read, strict=True):
            assert piece.token_ids
            event.set()


def test_no_step_follows_a_stop_text(hooked: Callable[..., Pipeline], want: Callable[..., tuple[int, ...]]) -> None:
    steps = []
    expected = want(PROMPTS[8], 10)
    with hooked(1, lambda stage, inputs: steps.append(stage)) as pipeline:
        choice = pipeline.submit(request(PROMPTS[8], stop=WORDS[expected[4]])).result(SECONDS).choices[0]
        assert choice.token_ids == expected[:5]
    assert len(steps) == 5


# What goes wrong.


def test_what_cannot_be_run_is_refused_at_once(bundles: Callable[[int], Path]) -> None:
    with Pipeline.open(bundles(1)) as pipeline:
        for prompt, message in (
            ("", "the prompt has no tokens"),
            ((), "the prompt has no tokens"),
            ((1, -1), "token 1 of the prompt is -1, outside the vocabulary"),
            ((1, VOCABULARY), f"token 1 of the prompt is {VOCABULARY}, outside the vocabulary"),
            (f"w1 w{VOCABULARY}", f"token 1 of the prompt is {VOCABULARY}, outside the vocabulary"),
            ((1.5,), "token 0 of the prompt is 1.5; give whole numbers"),
            ((True,), "token 0 of the prompt is True"),
        ):
            with pytest.raises(RequestError, match=message):
                pipeline.generate(prompt, repetition_penalty=1.5)
        assert pipeline.generate((1, 2), max_tokens=3).result(SECONDS).completion_tokens <= 3
        stats = pipeline.stats().generation
        assert stats is not None
        assert (stats.failed, stats.done) == (0, 1)


def test_a_deadline_ends_a_request_wherever_it_is(
    hooked: Callable[..., Pipeline], gate: Gate, want: Callable[..., tuple[int, ...]]
) -> None:
    with hooked(2, gate, slots=1) as pipeline:
        running = pipeline.submit(request(PROMPTS[4], deadline_s=0.1))
        waiting = pipeline.submit(request(PROMPTS[5], deadline_s=0.1))
        patient = pipeline.submit(request(PROMPTS[6], deadline_s=SECONDS))
        for future in (running, waiting):
            with pytest.raises(DeadlineError, match=r"not finished within 0\.1 s \(0 tokens were drawn\)"):
                future.result(SECONDS)
        gate.opened.set()
        assert tokens_of(patient) == want(PROMPTS[6], 10)
        assert eventually(pipeline, lambda stats: stats.running == 0).failed == 2


def test_a_deadline_is_kept_in_the_midst_of_generating(hooked: Callable[..., Pipeline]) -> None:
    def slow(stage: int, inputs: Mapping[str, Array]) -> None:
        time.sleep(0.02)

    with hooked(1, slow) as pipeline:
        generation = pipeline.generate(PROMPTS[0], max_tokens=100, min_tokens=100, deadline_s=0.3)
        pieces: list[Delta] = []
        with pytest.raises(DeadlineError, match=r"\([1-9][0-9]* tokens were drawn\)"):
            pieces.extend(generation)
        assert 1 <= len(pieces) < 20


def test_a_full_queue_says_so_or_waits(
    hooked: Callable[..., Pipeline], gate: Gate, want: Callable[..., tuple[int, ...]]
) -> None:
    with hooked(1, gate, slots=1, queue=2) as pipeline, ThreadPoolExecutor(1) as threads:
        futures = [pipeline.submit(request(prompt)) for prompt in PROMPTS[:2]]
        with pytest.raises(QueueFullError, match="2 requests are not finished"):
            pipeline.submit(request(PROMPTS[2]), wait=False)
        with pytest.raises(QueueFullError, match=r"after 0\.01 s"):
            pipeline.submit(request(PROMPTS[2]), timeout=0.01)
        patient = threads.submit(pipeline.submit, request(PROMPTS[2]))
        gate.opened.set()
        futures.append(patient.result(SECONDS))
        assert [tokens_of(future) for future in futures] == [want(prompt, 10) for prompt in PROMPTS[:3]]


def test_of_those_that_wait_the_lowest_priority_goes_first(hooked: Callable[..., Pipeline], gate: Gate) -> None:
    order: list[int] = []
    with hooked(1, gate, slots=1) as pipeline:
        pipeline.submit(request(PROMPTS[3]))
        assert gate.entered.wait(SECONDS)
        futures = []
        for number, priority in enumerate((1, 0, 2, -5, 0)):
            asked = pipeline.request(PROMPTS[4], max_tokens=2, priority=priority)
            futures.append(pipeline.submit(asked))
            futures[-1].add_done_callback(lambda _, number=number: order.append(number))
        eventually(pipeline, lambda stats: stats.waiting == 5)
        gate.opened.set()
        for future in futures:
            future.result(SECONDS)
        assert order == [3, 1, 4, 0, 2]
        with pytest.raises(RequestError, match="priority is 'high'"):
            pipeline.request(PROMPTS[4], priority="high")  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [1, 3])
def test_cancelled_requests_free_their_slots(
    hooked: Callable[..., Pipeline], gate: Gate, want: Callable[..., tuple[int, ...]], stages: int
) -> None:
    with hooked(stages, gate, slots=2, queue=4) as pipeline:
        futures = [pipeline.submit(request(PROMPTS[7], max_tokens=None)) for _ in range(4)]
        assert gate.entered.wait(SECONDS)
        assert all(future.cancel() for future in futures)
        later = [pipeline.submit(request(prompt)) for prompt in PROMPTS[4:7]]
        gate.opened.set()
        assert [tokens_of(future) for future in later] == [want(prompt, 10) for prompt in PROMPTS[4:7]]
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert (stats.done, stats.cancelled, stats.waiting) == (3, 4, 0)


def test_close_ends_everything_in_flight(hooked: Callable[..., Pipeline], gate: Gate) -> None:
    before = set(threading.enumerate())
    pipeline = hooked(2, gate, slots=2, queue=3)
    generation = pipeline.start(request(PROMPTS[6]))
    futures = [generation.future, *(pipeline.submit(request(prompt)) for prompt in PROMPTS[4:6])]
    assert gate.entered.wait(SECONDS)
    with ThreadPoolExecutor(4) as threads:
        late = threads.submit(pipeline.submit, request(PROMPTS[7]))  # waits for a place
        reading = threads.submit(list, generation)
        closing = [threads.submit(pipeline.close) for _ in range(2)]
        for future in futures:
            with pytest.raises(RequestError, match="closed before this request was finished"):
                future.result(SECONDS)
        with pytest.raises(RequestError, match="the pipeline is closed"):
            late.result(SECONDS)
        with pytest.raises(RequestError, match="closed before"):
            reading.result(SECONDS)
        gate.opened.set()
        for closed in closing:
            closed.result(SECONDS)
    pipeline.close()
    with pytest.raises(RequestError, match="the pipeline is closed"):
        pipeline.generate(PROMPTS[0])
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("of", ["generation", "batch"])
def test_close_from_a_callback_ends_all_threads(bundles: Callable[[int], Path], of: str) -> None:
    """A callback runs on the thread that finished the request: the driver's or a stage's."""
    before = set(threading.enumerate())
    pipeline = Pipeline.open(bundles(3), slots=5)
    others = [pipeline.submit(request(prompt, max_tokens=50, min_tokens=50)) for prompt in PROMPTS[4:8]]
    closed = threading.Event()

    def close(_: object) -> None:
        pipeline.close()
        closed.set()

    if of == "generation":
        pipeline.submit(request(PROMPTS[0], max_tokens=2)).add_done_callback(close)
    else:
        pipeline.submit({"input_ids": np.array([PROMPTS[3]])}).add_done_callback(close)
    assert closed.wait(SECONDS)
    for future in others:
        with pytest.raises(RequestError, match="closed before"):
            future.result(SECONDS)
    pipeline.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_that_raises_fails_the_requests_of_that_step_alone(
    hooked: Callable[..., Pipeline], want: Callable[..., tuple[int, ...]], stage: int
) -> None:
    unlucky = PROMPTS[6]
    armed = threading.Event()

    def before(number: int, inputs: Mapping[str, Array]) -> None:
        past = inputs["past_lengths"]
        if armed.is_set() and number == stage and ((past >= len(unlucky) + 4) & (past < 60)).any():
            armed.clear()
            raise ValueError("out of luck\nsecond line")

    with hooked(3, before, slots=3, prefill_chunk=16) as pipeline:
        armed.set()
        doomed = pipeline.submit(request(unlucky, max_tokens=MOST))
        others = [pipeline.submit(request(prompt)) for prompt in (*PROMPTS[1:5], PROMPTS[7], *PROMPTS[1:5])]
        with pytest.raises(
            EngineError, match=rf"^stage {stage} failed in step \d+: ValueError: out of luck$"
        ) as message:
            doomed.result(SECONDS)
        assert isinstance(message.value.__cause__, ValueError)
        failed = 0
        for prompt, future in zip((*PROMPTS[1:5], PROMPTS[7], *PROMPTS[1:5]), others, strict=True):
            try:
                assert tokens_of(future) == want(prompt, 10)
            except EngineError:
                failed += 1
        assert failed <= 2  # those that shared its step
        later = [pipeline.submit(request(prompt)) for prompt in (unlucky, *PROMPTS[-3:])]
        assert [tokens_of(future) for future in later] == [want(prompt, 10) for prompt in (unlucky, *PROMPTS[-3:])]
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert (stats.done, stats.failed) == (13 - failed, 1 + failed)


@of_rows_and_of_blocks
def test_stages_that_often_raise_never_give_wrong_tokens(
    hooked: Callable[..., Pipeline], want: Callable[..., tuple[int, ...]], engine: str
) -> None:
    rng, lock = random.Random(4), threading.Lock()

    def before(stage: int, inputs: Mapping[str, Array]) -> None:
        with lock:
            if rng.random() < 0.01:
                raise RuntimeError("again")

    with hooked(3, before, engine=engine, slots=4, prefill_chunk=8, queue=500) as pipeline:
        futures = [(prompt, pipeline.submit(request(prompt, n=1 + i % 2))) for i, prompt in enumerate(PROMPTS * 12)]
        failed = 0
        for prompt, future in futures:
            try:
                assert {choice.token_ids for choice in future.result(SECONDS).choices} == {want(prompt, 10)}
            except EngineError:
                failed += 1
        assert 5 < failed < len(futures) - 20


def test_broken_logits_fail_their_own_request_only(
    hooked: Callable[..., Pipeline], want: Callable[..., tuple[int, ...]]
) -> None:
    def after(stage: int, values: Mapping[str, Array]) -> None:
        if "logits" in values and len(values["logits"]) == 3 and armed:
            values["logits"][1, 0, 5] = np.nan
            armed.clear()

    armed: list[int] = []
    with hooked(1, after=after, slots=3) as pipeline:
        armed.append(1)
        futures = [pipeline.submit(request(prompt, max_tokens=MOST)) for prompt in PROMPTS[6:9]]
        ends = [future.exception(SECONDS) for future in futures]
        broken = [end for end in ends if end is not None]
        assert len(broken) == 1
        assert isinstance(broken[0], EngineError)
        assert "is nan: numbers overflowed" in str(broken[0])
        for prompt, future, end in zip(PROMPTS[6:9], futures, ends, strict=True):
            if end is None:
                assert tokens_of(future) == want(prompt, MOST)
        again = [pipeline.submit(request(prompt)) for prompt in PROMPTS[6:9]]
        assert [tokens_of(future) for future in again] == [want(prompt, 10) for prompt in PROMPTS[6:9]]


@of_rows_and_of_blocks
def test_a_cache_full_of_nan_harms_nobody_who_comes_after(
    hooked: Callable[..., Pipeline], want: Callable[..., tuple[int, ...]], engine: str
) -> None:
    """What a slot held of an earlier request is behind the lengths, and never read."""
    armed = [1]

    def before(stage: int, inputs: Mapping[str, Array]) -> None:
        if stage == 1 and armed:
            hidden = next(v for v in inputs.values() if v.dtype == np.float32)
            hidden[:] = np.nan

    with hooked(2, before, engine=engine, slots=1) as pipeline:
        with pytest.raises(EngineError, match="nan"):
            pipeline.submit(request(prompt_of(8, 100))).result(SECONDS)
        armed.clear()
        for prompt in (PROMPTS[5], PROMPTS[0], PROMPTS[8]):
            assert tokens_of(pipeline.submit(request(prompt, max_tokens=MOST))) == want(prompt, MOST)


@pytest.mark.parametrize("stages", [1, 2])
def test_an_engine_that_breaks_its_promises_leaves_nobody_waiting(hooked: Callable[..., Pipeline], stages: int) -> None:
    before = set(threading.enumerate())

    def after(stage: int, values: Mapping[str, Array]) -> None:
        if "logits" in values:
            values["logits"] = values["logits"][:, :0]  # type: ignore[index]

    with hooked(stages, after=after, slots=2) as pipeline:
        futures = [pipeline.submit(request(prompt)) for prompt in PROMPTS]
        for future in (*futures, pipeline.submit(request(PROMPTS[0]))):
            with pytest.raises(EngineError, match=r"^the generator failed: IndexError: "):
                future.result(SECONDS)
        assert pipeline.run({"input_ids": np.array([PROMPTS[3]])})["logits"].shape == (1, 5, VOCABULARY)
    assert set(threading.enumerate()) <= before


def test_a_broken_tokenizer_leaves_no_threads(bundles: Callable[[int], Path], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    folder = shutil.copytree(bundles(2), tmp_path / "bundle")
    name = "tokenizer/tokenizer.json"
    (folder / name).write_text("no JSON")
    manifest = Bundle.open(bundles(2)).manifest
    files = [file_entry(folder, name) if entry.path == name else entry for entry in manifest.files]
    write_manifest(folder, manifest.model_copy(update={"files": tuple(files)}))
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        Pipeline.open(folder)
    assert set(threading.enumerate()) <= before


# Numbers.


def test_stats_add_up(bundles: Callable[[int], Path]) -> None:
    with Pipeline.open(bundles(2), slots=3, prefill_chunk=16) as pipeline:
        empty = pipeline.stats().generation
        assert empty is not None
        assert (empty.slots, empty.done, empty.ttft_s.count, empty.bubble_ratio) == (3, 0, 0, 0.0)
        futures = [pipeline.submit(request(prompt)) for prompt in PROMPTS]
        completions = [future.result(SECONDS) for future in futures]
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        runs = [stage.runs for stage in pipeline.stats().stages]
    assert (stats.done, stats.failed, stats.cancelled, stats.waiting) == (len(PROMPTS), 0, 0, 0)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.cached_tokens == sum(completion.cached_tokens for completion in completions)
    assert stats.generated_tokens == sum(completion.completion_tokens for completion in completions)
    assert runs == [stats.prefill_steps + stats.decode_steps + stats.mixed_steps] * 2
    assert stats.queue_s.count == stats.ttft_s.count == len(PROMPTS)
    assert stats.tpot_s.count == stats.generated_tokens - len(PROMPTS)
    assert 0 < stats.host_s < stats.active_s + 1
    assert 0 <= stats.bubble_ratio < 1
    for completion in completions:
        assert 0 <= completion.queue_s <= completion.ttft_s <= completion.total_s
        assert len(completion.token_times_s) == completion.completion_tokens
        assert list(completion.token_times_s) == sorted(completion.token_times_s)
        assert completion.token_times_s[0] == completion.ttft_s


def test_idle_stages_show_as_bubbles_also_while_work_goes_on(hooked: Callable[..., Pipeline]) -> None:
    def slow(stage: int, inputs: Mapping[str, Array]) -> None:
        time.sleep(0.01 if stage == 0 else 0)

    with hooked(2, slow, slots=2) as pipeline:  # one group or the other is always in the slow stage
        generation, _ = [pipeline.generate(PROMPTS[0], max_tokens=100, min_tokens=100) for _ in range(2)]
        for count, _ in enumerate(generation):
            if count == 30:
                stats = pipeline.stats().generation
                assert stats is not None
                assert stats.active_s > 0.2
                assert 0.3 < stats.bubble_ratio < 0.6
                break


# Coroutines.


def test_coroutines_get_the_same_tokens(bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]) -> None:
    async def streamed(pipeline: Pipeline, prompt: Sequence[int]) -> tuple[int, ...]:
        generation = await pipeline.astart(request(prompt))
        return tuple([token async for piece in generation for token in piece.token_ids])

    async def scenario() -> None:
        with Pipeline.open(bundles(2), slots=3, queue=4) as pipeline:
            found = await asyncio.gather(*(streamed(pipeline, prompt) for prompt in PROMPTS))
            assert found == [want(prompt, 10) for prompt in PROMPTS]

    asyncio.run(scenario())


def test_chat_renders_the_template_and_waits_without_blocking_the_loop(
    bundles: Callable[[int], Path], want: Callable[..., tuple[int, ...]]
) -> None:
    prompt = (9, 20, 21, 7)
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w20 w21"}]

    async def scenario() -> None:
        with Pipeline.open(bundles(2)) as pipeline:
            assert pipeline.chat_prompt(messages) == prompt
            replies = await asyncio.gather(*(pipeline.chat(messages, max_tokens=6) for _ in range(3)))
            assert [reply.choices[0].token_ids for reply in replies] == [want(prompt, 6)] * 3
            assert replies[0].text == " " + words(want(prompt, 6))

    asyncio.run(scenario())


def test_cancelling_the_task_frees_the_slot_and_the_place_in_the_queue(
    hooked: Callable[..., Pipeline], gate: Gate, want: Callable[..., tuple[int, ...]]
) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        async def whole(prompt: Sequence[int]) -> Completion:
            return await (await pipeline.astart(request(prompt)))

        running, queued = (asyncio.create_task(whole(PROMPTS[7])) for _ in range(2))
        waiting = asyncio.create_task(whole(PROMPTS[7]))  # for a place in the queue
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        for task in (running, queued, waiting):
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(
            running, queued, waiting, return_exceptions=True))  # fmt: skip
        gate.opened.set()
        later = await asyncio.wait_for(asyncio.gather(*map(whole, PROMPTS[:4])), SECONDS)
        assert [completion.choices[0].token_ids for completion in later] == [want(p, 10) for p in PROMPTS[:4]]

    with hooked(2, gate, slots=1, queue=2) as pipeline:
        asyncio.run(scenario(pipeline))
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert (stats.done, stats.cancelled) == (4, 2)


def test_leaving_an_async_loop_frees_the_slot(bundles: Callable[[int], Path]) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        async for _ in await pipeline.astart(request(PROMPTS[0], max_tokens=120, min_tokens=120)):
            break

    with Pipeline.open(bundles(1), slots=1, queue=1) as pipeline:
        for _ in range(5):
            asyncio.run(scenario(pipeline))
        stats = eventually(pipeline, lambda stats: stats.running == 0)
        assert stats.done + stats.cancelled == 5
        assert stats.cancelled >= 1
