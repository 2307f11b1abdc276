"""What generation costs apart from the engines: scheduling, hops, sampling, detokenising, streaming."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter

import numpy as np
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import INPUT_IDS, LOGITS_AT, GenerationDefaults
from stageline.runtime.engines import Array, CacheSize, Device, PackedRows, Value
from stageline.runtime.executor import generation_hops
from stageline.runtime.generation.generator import Generator
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.generation.text_model import TextModel, open_encoder
from stageline.runtime.stages.lanes import Lanes, PipelineStage
from stageline.runtime.stages.opening import StageSet

_ROUNDS, _ROWS, _TOKENS, _CAPACITY = 3, 8, 200, 1024


class Instant:
    """An engine that takes no time, so that only the host is measured."""

    def __init__(self, reads: str, gives: str, logits: Array) -> None:
        self.input_names, self.output_names, self.max_rows = (reads,), (gives,), None
        self.packs, self.block_tokens = True, None
        self._logits = logits

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        """Constant logits, one row for each that is wanted."""
        return {outputs[0]: self._logits[: inputs[LOGITS_AT].shape[0]]}

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """There is no cache."""

    def give_caches(self) -> dict[str, Value]:
        """There is none."""
        return {}

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """There is none."""

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Array]:
        """It has no batches."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


def bundle_decoder(bundle: Bundle) -> TextModel:
    """The bundle's tokenizer and vocabulary, without tokens that end a text."""
    return TextModel(bundle.manifest.vocabulary or 2, GenerationDefaults(), open_encoder(bundle))


def step_s(text_model: TextModel, rows: int, stages: int, sampling: Sampling) -> float:
    """Seconds per step when `rows` continuations run through stages that take no time."""
    logits = np.random.default_rng(0).standard_normal((rows, 1, text_model.vocabulary), dtype=np.float32)
    names = [INPUT_IDS, *(f"hidden.{n}" for n in range(1, stages)), "logits"]
    opened = [
        PipelineStage((names[n], LOGITS_AT), (names[n + 1],), partial(_open, names[n], names[n + 1], logits))
        for n in range(stages)
    ]
    lanes = Lanes(opened, None)
    hops = generation_hops(StageSet(tuple(opened)))
    generator = Generator(lanes, hops, text_model, CacheSize(rows, _CAPACITY), 128, queue=rows)
    try:
        began = perf_counter()
        requests = [GenerationRequest((row % text_model.vocabulary,), sampling) for row in range(rows)]
        running = [generator.submit(request, wait=True, timeout=None) for request in requests]
        for generation in running:
            generation.result()
        seconds = perf_counter() - began
        stats = generator.stats(lanes.stats(1))
        steps = stats.decode_steps + stats.mixed_steps
    finally:
        generator.close().result()
        lanes.close()
    return seconds / steps


def driver_times_s(bundle: Bundle) -> tuple[float, float]:
    """Seconds that the driver takes for a step, and for each row of it, with greedy sampling."""
    text_model, sampling = bundle_decoder(bundle), Sampling(max_tokens=_TOKENS)
    one_s, all_s = (
        statistics.median(step_s(text_model, rows, 1, sampling) for _ in range(_ROUNDS)) for rows in (1, _ROWS)
    )
    row_s = max(0.0, all_s - one_s) / (_ROWS - 1)
    return max(0.0, one_s - row_s), row_s


def _open(reads: str, gives: str, logits: Array, device: Device) -> Instant:
    return Instant(reads, gives, logits)
