"""What generation costs apart from the engines: scheduling, hops, sampling, detokenising, streaming."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time, sleep

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


@dataclass(frozen=True)
class HostTimes:
    """Times of a step, in seconds: from one step to the next, of all the process's cores, and that a stage is idle from
    the end of a step to the beginning of the next (the median)."""

    step_s: float
    cpu_s: float
    idle_s: float


class Instant:
    """An engine that computes nothing, so that only the host is measured. It takes `busy_s`, without the host."""

    def __init__(self, reads: str, gives: str, logits: Array, busy_s: float) -> None:
        self.idle_s: list[float] = []
        """Of each step but the first: how long it was idle before."""
        self._busy_s, self._ended_at = busy_s, 0.0
        self.input_names, self.output_names, self.max_rows = (reads,), (gives,), None
        self.packs, self.block_tokens = True, None
        self._logits = logits

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        """Constant logits, one row for each that is wanted."""
        if self._ended_at:
            self.idle_s.append(perf_counter() - self._ended_at)
        values = {outputs[0]: self._logits[: inputs[LOGITS_AT].shape[0]]}
        if self._busy_s:
            sleep(self._busy_s)
        self._ended_at = perf_counter()
        return values

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


def host_times(text_model: TextModel, rows: int, stages: int, sampling: Sampling, busy_s: float = 0.0) -> HostTimes:
    """Of `rows` continuations that run through stages, each of which takes `busy_s` for a step."""
    logits = np.random.default_rng(0).standard_normal((rows, 1, text_model.vocabulary), dtype=np.float32)
    names = [INPUT_IDS, *(f"hidden.{n}" for n in range(1, stages)), "logits"]
    engines = [Instant(names[n], names[n + 1], logits, busy_s) for n in range(stages)]
    opened = [
        PipelineStage((engine.input_names[0], LOGITS_AT), engine.output_names, partial(_open, engine))
        for engine in engines
    ]
    lanes = Lanes(opened, None)
    hops = generation_hops(StageSet(tuple(opened)))
    generator = Generator(lanes, hops, text_model, CacheSize(rows, _CAPACITY), 128, queue=rows)
    try:
        began, cpu_began = perf_counter(), process_time()
        requests = [GenerationRequest((row % text_model.vocabulary,), sampling) for row in range(rows)]
        running = [generator.submit(request, wait=True, timeout=None) for request in requests]
        for generation in running:
            generation.result()
        seconds, cpu_s = perf_counter() - began, process_time() - cpu_began
        stats = generator.stats(lanes.stats(1))
        steps = stats.decode_steps + stats.mixed_steps
    finally:
        generator.close().result()
        lanes.close()
    return HostTimes(seconds / steps, cpu_s / steps, statistics.median(engines[0].idle_s))


def driver_times_s(bundle: Bundle) -> tuple[float, float]:
    """Seconds that the driver takes for a step, and for each row of it, with greedy sampling."""
    text_model, sampling = bundle_decoder(bundle), Sampling(max_tokens=_TOKENS)
    one_s, all_s = (
        statistics.median(host_times(text_model, rows, 1, sampling).step_s for _ in range(_ROUNDS))
        for rows in (1, _ROWS)
    )
    row_s = max(0.0, all_s - one_s) / (_ROWS - 1)
    return max(0.0, one_s - row_s), row_s


def _open(engine: Instant, device: Device) -> Instant:
    return engine
