"""Parts of gpu_proof.py: values and tokens on a GPU against references that were made on CPUs (gpu_materials.py).

An error is the largest difference as a fraction of the largest value.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gpu_results import ENGINE, GPU, Results, need_engine, need_materials
from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import LOGITS_AT, NEW_LENGTHS, PAST_LENGTHS
from stageline.runtime.devices import open_devices
from stageline.runtime.devices.base import on_host
from stageline.runtime.engines import Array, CacheSize, StageFile, engine_factory
from stageline.runtime.generation.stream import Generation
from stageline.runtime.pipeline import Pipeline

BOUND = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Of an error, by the type of the bundle. The caches of float32 bundles are float16 on GPUs."""
SLOTS, CAPACITY, CHUNK = 4, 300, 7
Script = list[dict[str, Array]]
"""Steps of an engine: the inputs of each, `first_slot`, and, for copies of slots, `copy` (of, to, tokens)."""


def script(vocabulary: int, seed: int) -> Script:
    """Steps with what can go wrong: ragged rows, a chunk after a chunk, a row without new tokens, single tokens,
    another slot, a copied slot, a row that crosses the border of a block of 256 tokens."""
    rng = np.random.default_rng(seed)

    def step(first_slot: int, past: list[int], new: list[int]) -> dict[str, Array]:
        width = max(new)
        ids = rng.integers(3, vocabulary, (len(new), width))
        at = np.minimum(np.arange(width), np.maximum(np.array(new)[:, None] - 1, 0))
        ids[np.arange(width) >= np.array(new)[:, None]] = 0
        lengths = {PAST_LENGTHS: np.array(past), NEW_LENGTHS: np.array(new), LOGITS_AT: at}
        return {"first_slot": np.array(first_slot), "input_ids": ids, **lengths}

    return [
        step(0, [0, 0, 0], [9, 5, 1]),
        step(0, [9, 5, 1], [4, 7, 0]),
        step(0, [13, 12, 1], [1, 1, 1]),
        step(3, [0], [16]),
        {"copy": np.array([1, 2, 13])},
        step(1, [13, 13], [1, 3]),
        step(3, [16], [236]),
        step(3, [252], [20]),
        step(2, [16, 272], [1, 1]),
    ]


def played(bundle: Bundle, engine: str, device: str, steps: Script) -> list[Array]:
    """The logits of each step of a bundle of one stage, zero where a row has no new tokens."""
    (stage,) = bundle.manifest.stages
    (opened,) = open_devices([device], None)
    file = StageFile(0, bundle.path / stage.file, bundle.path, stage.caches)
    running, found = engine_factory(engine)(file, opened, CacheSize(SLOTS, CAPACITY)), []
    try:
        for step in steps:
            if "copy" in step:
                running.copy_slot(*step["copy"].tolist())
                continue
            inputs = {name: value for name, value in step.items() if name != "first_slot"}
            given = running.step(inputs, running.output_names, int(step["first_slot"]))
            logits = on_host(given, running.output_names)[running.output_names[-1]]
            real = np.arange(logits.shape[1]) < step[NEW_LENGTHS][:, None]
            found.append(np.where(real[..., None], logits, 0))
    finally:
        running.close()
        opened.close()
    return found


def error(got: Array, want: Array) -> float:
    """The largest difference as a fraction of the largest value; infinite where a value is no number."""
    found = float(np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max())
    return found if np.isfinite(found) else float("inf")


def real_values(inputs: Mapping[str, Array], values: Array) -> Array:
    """The values without those of padding."""
    mask = inputs.get("attention_mask")
    return values if mask is None or values.ndim != 3 else np.where(mask[..., None] == 1, values, 0)


def of(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def encoder_parity(materials: Path, results: Results) -> None:
    """Whole batches, ragged, through pipelines of 1 and of 2 stages."""
    need_engine()
    for folder in need_materials(materials / "encoders"):
        _each(folder, results, lambda bundle: _batches(bundle, ENGINE, results))


def decoder_parity(materials: Path, results: Results) -> None:
    """Whole batches, and steps with caches."""
    need_engine()
    for folder in need_materials(materials / "decoders"):
        _each(folder, results, lambda bundle: check_steps(bundle, ENGINE, results))
        _each(folder, results, lambda bundle: _batches(bundle, ENGINE, results))


def generation(materials: Path, results: Results) -> None:
    """Greedy tokens of many prompts at a time, in pipelines of 1 and of 2 stages."""
    need_engine()
    for folder in need_materials(materials / "decoders"):
        _each(folder, results, lambda bundle: check_tokens(bundle, ENGINE, results))


def check_steps(bundle: Bundle, engine: str, results: Results) -> None:
    """Add the errors of steps with caches."""
    with np.load(bundle.path / "reference.npz") as reference:
        want = [reference[f"step.{n}"] for n in range(len(of("step.", reference)))]
    assert bundle.manifest.vocabulary is not None
    got = played(bundle, engine, GPU, script(bundle.manifest.vocabulary, seed=0))
    bound, errors = BOUND[bundle.manifest.dtype], [error(g, w) for g, w in zip(got, want, strict=True)]
    results.add(case=bundle.path.name, engine=engine, dtype=bundle.manifest.dtype, steps=len(errors),
                error=max(errors), worst_step=int(np.argmax(errors)), bound=bound, ok=max(errors) <= bound)  # fmt: skip


def _batches(bundle: Bundle, engine: str, results: Results) -> None:
    with np.load(bundle.path / "reference.npz") as reference:
        inputs, want = of("in.", reference), reference["out"]
    bound = BOUND[bundle.manifest.dtype]
    with Pipeline.open(bundle.path, engine=engine, devices=[GPU]) as pipeline:
        for stages in (1, 2):
            if stages > 1:
                pipeline.recut(stages)
            for repeat in range(3):  # plain, captured, replayed
                got = pipeline.run(inputs)[bundle.manifest.outputs[-1].name]
                found = error(real_values(inputs, got), want)
                if repeat == 2 or found > bound:
                    break
            results.add(case=bundle.path.name, engine=engine, dtype=bundle.manifest.dtype, stages=stages,
                        runs=repeat + 1, error=found, bound=bound, ok=found <= bound)  # fmt: skip


def check_tokens(bundle: Bundle, engine: str, results: Results) -> None:
    """Add how many of the CPU's tokens come. A token whose logit on the CPU is below the likeliest by no more than two
    errors at their bound is right too, and the rest of that text is not compared."""
    told = json.loads((bundle.path / "tokens.json").read_text())
    tie = 2 * BOUND[bundle.manifest.dtype] * told["largest_logit"]
    keywords: dict[str, Any] = {"slots": SLOTS, "capacity": CAPACITY, "prefill_chunk": CHUNK}
    with Pipeline.open(bundle.path, engine=engine, devices=[GPU], **keywords) as pipeline:
        for stages in (1, 2):
            if stages > 1:
                pipeline.recut(stages)
            running: list[Generation] = [
                pipeline.generate(text["prompt"], max_tokens=len(text["tokens"])) for text in told["texts"]
            ]
            equal = ties = wrong = compared = 0
            for text, one in zip(told["texts"], running, strict=True):
                got = list(one.result(60).choices[0].token_ids)
                pairs = enumerate(zip(got, text["tokens"], strict=False))
                differs = next((n for n, (mine, theirs) in pairs if mine != theirs), None)
                compared += len(got) if differs is None else differs
                equal += differs is None and len(got) == len(text["tokens"])
                if differs is not None:
                    ties += got[differs] in [token for token, below in text["near"][differs] if below <= tie]
            wrong = len(running) - equal - ties
            results.add(case=bundle.path.name, engine=engine, dtype=bundle.manifest.dtype, stages=stages,
                        texts=len(running), equal=equal, ties=ties, wrong=wrong, tokens_equal=compared,
                        tie_below=tie, ok=wrong == 0)  # fmt: skip


def _each(folder: Path, results: Results, check: Callable[[Bundle], None]) -> None:
    """A bundle that is refused is a row, and the others are looked at."""
    try:
        check(Bundle.open(folder))
    except StagelineError as refused:
        results.add(case=folder.name, error=str(refused), ok=False)
