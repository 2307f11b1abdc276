"""What following a structure costs: a mask per row and step, and the tokens per second with and without.

A mask is computed in a thread beside the stages; what the sampler adds is the wait for what is left of it, and laying
it over the logits. Throughput: 8 texts at a time, rounds with and without in turn, their medians.

    python benchmarks/mask_cost.py bundles/smollm2 --json benchmarks/results/mask_cost.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from stageline.runtime.generation.grammars import Grammars, Matcher
from stageline.runtime.generation.structure import Structure
from stageline.runtime.pipeline import Pipeline

ROWS, STEPS = 8, 200
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
PEOPLE = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0},
            "mail": {"type": "string", "format": "email"},
            "role": {"enum": ["reader", "writer", "owner"]},
        },
        "required": ["name", "age", "mail", "role"],
        "additionalProperties": False,
    },
}
STRUCTURES = {
    "numbers": Structure.json_schema(NUMBERS),
    "people": Structure.json_schema(PEOPLE),
    "any object": Structure.json_object(),
    "expression": Structure.regex(r"([a-z]+ [0-9]{2,4}, )*"),
}


def timed(into: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives; its seconds go into a list."""
    began = time.perf_counter()
    result = call(*arguments)
    into.append(time.perf_counter() - began)
    return result


def costs(grammars: Grammars, structure: Structure, vocabulary: int) -> dict[str, float]:
    """Microseconds of a row and step, medians over a random text of the structure: of the mask itself, of going on by a
    token, and of laying a mask that is ready over the logits."""
    chance, scores = np.random.default_rng(0), np.zeros(vocabulary, np.float32)
    masks: list[float] = []
    tokens: list[float] = []
    laid: list[float] = []
    row = None
    for _ in range(STEPS):
        if row is None:
            kept = grammars.matcher(structure)
            row = Matcher(kept._matcher.deep_copy(), kept._pool, kept._size, vocabulary, kept._ends)
        row._mask = Future()
        row._mask.set_result(timed(masks, row._allowed))
        allowed = timed(laid, row.masked, scores)
        token = int(chance.choice(np.flatnonzero(np.isfinite(allowed))))
        timed(tokens, row._matcher.consume_token, token)
        if token in kept._ends or row._matcher.is_stopped():
            row = None
    return {
        "mask_us": 1e6 * statistics.median(masks),
        "mask_p99_us": 1e6 * float(np.percentile(masks, 99)),
        "token_us": 1e6 * statistics.median(tokens),
        "laid_us": 1e6 * statistics.median(laid),
    }


def tokens_per_s(pipeline: Pipeline, tokens: int, **sampling: Any) -> float:
    """Of a batch of texts that begin together."""
    began = time.perf_counter()
    running = [
        pipeline.start(pipeline.request(f"List {row}: ", max_tokens=tokens, temperature=0.8, seed=row, **sampling))
        for row in range(ROWS)
    ]
    made = sum(len(generation.result().choices[0].token_ids) for generation in running)
    return made / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"rows": ROWS, "tokens": options.tokens, "rounds": options.rounds}
    with Pipeline.open(options.bundle, slots=ROWS, draft="off") as pipeline:
        assert pipeline.encoder is not None
        width = pipeline.signature.vocabulary or pipeline.encoder.size
        grammars = Grammars(pipeline.encoder, width, [0])
        report |= {"stages": len(pipeline.layers), "vocabulary": width, "costs": {}}
        print(f"{'structure':<12}{'mask, us':>10}{'p99':>10}{'token, us':>11}{'laid, us':>10}")
        for name, structure in STRUCTURES.items():
            found = report["costs"][name] = costs(grammars, structure, width)
            print(f"{name:<12}" + "".join(f"{value:>10.1f}" for value in found.values()))
        ways: dict[str, dict[str, Any]] = {
            "without": {"ignore_eos": True},
            "numbers": {"structure": STRUCTURES["numbers"]},
            "people": {"structure": STRUCTURES["people"]},
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, sampling in ways.items():
                speed = tokens_per_s(pipeline, options.tokens, **sampling)
                if number:  # the first one warms up
                    speeds[name].append(speed)
        report["tokens_per_s"] = {name: statistics.median(found) for name, found in speeds.items()}
        base = report["tokens_per_s"]["without"]
        for name, each in speeds.items():
            median = statistics.median(each)
            print(f"{name:<12}{median:>8.1f} tokens/s ({min(each):.1f} to {max(each):.1f}), {median / base:.1%}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
