"""Parts of gpu_proof.py: how fast models of real shapes decode and encode, with weights drawn on the machine."""

import statistics
from pathlib import Path
from time import perf_counter

import numpy as np
from gpu_drawing import draw
from gpu_results import ENGINE, GPU, Memory, MissingError, Results, need_engine, need_materials
from stageline.models.errors import StagelineError
from stageline.runtime.bench.energy import Meters
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.pipeline import Pipeline

DECODED = ("llama1b", "smollm2")
ENCODED = ("bertlarge", "minilm")
STAGES, ROWS = (1, 2, 4), (1, 8, 64)
SLOTS, CAPACITY, PROMPT, NEW = 64, 512, 32, 128
BATCHES = ((32, 128), (1, 128), (8, 512))
_AT_A_TIME, _SECONDS = 8, 1.5


def decode(materials: Path, results: Results) -> None:
    """Tokens per second of 1, 8 and 64 rows, with 1, 2 and 4 stages on one GPU."""
    need_engine()
    folders = _shapes(materials, DECODED)
    for folder in folders:
        try:
            decode_shape(folder, ENGINE, STAGES, results)
        except StagelineError as error:
            results.add(shape=folder.name, error=str(error), ok=False)


def decode_shape(folder: Path, engine: str, cuts: tuple[int, ...], results: Results) -> None:
    """Measure one shape."""
    began = perf_counter()
    draw(folder)
    drawn_s, meters = perf_counter() - began, Meters()
    memory, bundle, began = Memory(meters), Bundle.open(folder), perf_counter()
    with Pipeline.open(folder, engine=engine, devices=[GPU], slots=SLOTS, capacity=CAPACITY) as pipeline:
        results.add(shape=folder.name, drawn_s=drawn_s, open_s=perf_counter() - began)
        for stages in cuts:
            if stages > 1:
                pipeline.recut(stages)
            for rows in ROWS:
                decode_rows(pipeline, bundle, engine, stages, rows, meters, results)
        memory.add(results, f"{folder.name}, open")
    memory.add(results, f"{folder.name}, closed")
    meters.close()


def decode_rows(
    pipeline: Pipeline, bundle: Bundle, engine: str, stages: int, rows: int, meters: Meters, results: Results
) -> None:
    """Generate `rows` texts at a time, twice, and add figures of the second.

    A step's time is the median between tokens over the second half, when all rows decode. Its bytes are the weights and
    what the caches hold of its rows at the middle of that half. The device's time is that of all stages, by events, the
    few steps that read prompts included; the gap is the rest of a step: hops between stages, the host, and sampling.
    """
    rng = np.random.default_rng(rows)
    vocabulary = bundle.manifest.vocabulary or 3
    for turn in range(2):
        prompts = [rng.integers(3, vocabulary, PROMPT).tolist() for _ in range(rows)]
        before, joules, began = pipeline.stats(), meters.energy_j(), perf_counter()
        running = [pipeline.generate(prompt, max_tokens=NEW) for prompt in prompts]
        done = [one.result(120) for one in running]
        seconds, after = perf_counter() - began, pipeline.stats()
        if turn == 0:
            continue
        gaps = [np.diff(one.token_times_s[NEW // 2 :]) for one in done]
        step_s = float(np.median(np.concatenate(gaps)))
        steps = max(1, after.stages[0].runs - before.stages[0].runs)
        busy_s = sum(a.busy_s - b.busy_s for a, b in zip(after.stages, before.stages, strict=True))
        read = bundle.weight_bytes + rows * (PROMPT + NEW * 3 / 4) * _token_bytes(bundle)
        energy = (meters.energy_j() - joules) / (rows * NEW) if meters.measures_energy else None
        assert after.generation is not None
        assert before.generation is not None
        active_s = after.generation.active_s - before.generation.active_s
        results.add(
            shape=bundle.path.name, engine=engine, stages=stages, rows=rows, tokens_per_s=rows / step_s,
            step_ms=step_s * 1e3, ttft_ms=statistics.median(one.ttft_s for one in done) * 1e3,
            gb_per_s=read / step_s / 1e9, device_ms_per_step=busy_s / steps * 1e3,
            gap_ms_per_step=(step_s - busy_s / steps) * 1e3,
            idle_share=1 - busy_s / active_s, j_per_token=energy, whole_tokens_per_s=rows * NEW / seconds,
        )  # fmt: skip


def encode(materials: Path, results: Results) -> None:
    """Tokens per second of encoders, with batches always waiting, at 1, 2 and 4 stages."""
    need_engine()
    for folder in _shapes(materials, ENCODED):
        try:
            encode_shape(folder, ENGINE, results)
        except StagelineError as error:
            results.add(shape=folder.name, error=str(error), ok=False)


def encode_shape(folder: Path, engine: str, results: Results) -> None:
    """Measure one shape. FLOPs are two for each parameter of a block and token, so without attention's."""
    draw(folder)
    bundle = Bundle.open(folder)
    tables = sum(e.shape[0] * e.shape[1] for n, e in bundle.tensors.items() if "embeddings" in n and len(e.shape) == 2)
    flops, meters = 2 * (bundle.parameters - tables), Meters()
    with Pipeline.open(folder, engine=engine, devices=[GPU]) as pipeline:
        for stages in STAGES:
            if stages > 1:
                pipeline.recut(stages)
            for rows, length in BATCHES if stages == 1 else BATCHES[:1]:
                ids = np.random.default_rng(0).integers(3, bundle.manifest.vocabulary or 9, (rows, length))
                for _ in range(2 * _AT_A_TIME):
                    pipeline.run({"input_ids": ids})
                joules, began, count = meters.energy_j(), perf_counter(), 0
                while perf_counter() - began < _SECONDS:
                    for future in [pipeline.submit({"input_ids": ids}) for _ in range(_AT_A_TIME)]:
                        future.result(60)
                    count += _AT_A_TIME
                tokens_per_s = count * rows * length / (perf_counter() - began)
                energy = (meters.energy_j() - joules) / (count * rows * length) if meters.measures_energy else None
                latencies = []
                for _ in range(10):
                    began = perf_counter()
                    pipeline.run({"input_ids": ids})
                    latencies.append(perf_counter() - began)
                results.add(
                    shape=folder.name, engine=engine, stages=stages, rows=rows, length=length,
                    tokens_per_s=tokens_per_s, tflop_per_s=tokens_per_s * flops / 1e12,
                    latency_ms=statistics.median(latencies) * 1e3, j_per_token=energy,
                )  # fmt: skip
    meters.close()


def _token_bytes(bundle: Bundle) -> int:
    """What the caches hold of a token, two bytes a number."""
    caches = (spec for stage in bundle.manifest.stages for spec in stage.caches)
    return sum(2 * spec.heads * (spec.key_size + spec.value_size) for spec in caches)


def _shapes(materials: Path, names: tuple[str, ...]) -> list[Path]:
    """The folders of these shapes, in this order."""
    there = {folder.name: folder for folder in need_materials(materials / "shapes")}
    found = [there[name] for name in names if name in there]
    if not found:
        raise MissingError(
            f"{materials / 'shapes'} has none of {', '.join(names)}; run: python benchmarks/gpu_materials.py"
        )
    return found
