"""Host time of a decode step apart from the engines: scheduling, hops, sampling, detokenising, streaming.

The stages' engines do nothing here and give the same logits each time; all else is what serves. What a step takes is
then the overhead. A step is one token of every row of a group; with N stages there are N groups.

    python benchmarks/generation_host.py bundles/smollm2 --json benchmarks/results/generation_host.json
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle import Bundle
from stageline.runtime.engines import Array, Device, Value
from stageline.runtime.generation.decoder import Decoder
from stageline.runtime.generation.generator import Generator
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.lanes import Lanes, PipelineStage
from stageline.runtime.opening import Cut
from stageline.runtime.serving import generation_hops

TOKENS = 400


class Instant:
    """A stage that takes no time."""

    def __init__(self, reads: str, gives: str, logits: Array) -> None:
        self.input_names, self.output_names = (reads,), (gives,)
        self._logits = logits

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], first_slot: int) -> dict[str, Array]:
        """Its output for as many rows."""
        return {outputs[0]: self._logits[: inputs["past_lengths"].shape[0]]}

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """There is no cache."""

    def give_caches(self) -> dict[str, Value]:
        """There is none."""
        return {}

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """There is none."""

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Array]:
        """Not used here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


def measure(encoder: TextEncoder, vocabulary: int, streams: int, stages: int, sampling: Sampling) -> float:
    """Microseconds a step."""
    logits = np.random.default_rng(0).standard_normal((streams, 1, vocabulary), dtype=np.float32)
    names = ["input_ids", *(f"hidden.{n}" for n in range(1, stages)), "logits"]
    opened = [
        PipelineStage((names[n], "past_lengths"), (names[n + 1],), partial(_open, names[n], names[n + 1], logits))
        for n in range(stages)
    ]
    lanes = Lanes(opened, None)
    hops = generation_hops(Cut(tuple(opened)))
    generator = Generator(lanes, hops, Decoder(vocabulary, (), encoder), streams, 1024, 128)
    try:
        began = perf_counter()
        request = GenerationRequest((1,), sampling)
        running = [generator.submit(request, [n + 3], lambda: None) for n in range(streams)]
        for generation in running:
            generation.result()
        seconds = perf_counter() - began
        steps = generator.stats(lanes.stats(1)).decode_steps
    finally:
        generator.close()
        lanes.close()
    return 1e6 * seconds / steps


def _open(reads: str, gives: str, logits: Array, device: Device) -> Instant:
    return Instant(reads, gives, logits)


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="for its tokenizer and vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    text = bundle.manifest.text
    assert text is not None
    encoder = TextEncoder.open(bundle.path / text.tokenizer, text.max_length, text.pad_id)
    vocabulary = bundle.manifest.vocabulary
    assert vocabulary is not None
    kinds = {
        "greedy": Sampling(max_tokens=TOKENS),
        "temperature 0.8, top-k 50": Sampling(max_tokens=TOKENS, temperature=0.8, top_k=50, seed=1),
    }
    rows = []
    print(f"{'':28}{'streams':>8}{'stages':>8}{'us a step':>11}{'us a token':>12}")
    for kind, sampling in kinds.items():
        for streams, stages in ((1, 1), (8, 1), (8, 2), (32, 2)):
            found = [measure(encoder, vocabulary, streams, stages, sampling) for _ in range(arguments.rounds)]
            step_us = statistics.median(found)
            token_us = step_us / (streams / min(stages, streams))
            rows.append({"sampling": kind, "streams": streams, "stages": stages, "step_us": step_us, "all": found})
            print(f"{kind:28}{streams:8}{stages:8}{step_us:11.0f}{token_us:12.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
