"""Sentences per second of an encoder: our pipeline in one stage or a stage per core, on ONNX Runtime and OpenVINO,
beside both libraries used plainly.

All runners use the same graph in the same process, interleaved (A B C D, A B C D, ...), because machines drift; medians
over the rounds are compared. Plain sessions have their library's defaults, OpenVINO both of its performance hints, and
all compute in float32. Several requests are in flight if the runner can use them; the time to fill and drain counts.

    python benchmarks/pipeline.py bundles/minilm --json pipeline.json
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime as ort
import openvino as ov
from stageline.runtime.bundle.recut import recut_copy
from stageline.runtime.devices.cpu import allowed_cores, start_worker
from stageline.runtime.engines import Array
from stageline.runtime.pipeline import Pipeline

BATCHES = ((1, 32, 32), (8, 128, 128), (32, 64, 64), (32, 8, 64))  # rows, tokens of the shortest and the longest
OUTPUT = "sentence_embedding"
IN_FLIGHT = 8
Feed = dict[str, Array]
Runner = Callable[[Sequence[Feed]], list[Array]]
"""Runs requests, as many at a time as it can, and returns their outputs in order."""


def session(graph: Path, threads: int) -> ort.InferenceSession:
    """A plain session over a whole model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def one_session(graph: Path, threads: int) -> Runner:
    """One session, one request after the other."""
    opened = session(graph, threads)

    def run(feeds: Sequence[Feed]) -> list[Array]:
        return [opened.run([OUTPUT], feed)[0] for feed in feeds]

    return run


def side_by_side(graph: Path, cores: Sequence[int]) -> Runner:
    """A one-thread session pinned to each core, each taking the next request when it is free."""
    opened = [session(graph, 1) for _ in cores]

    def run(feeds: Sequence[Feed]) -> list[Array]:
        results: list[Array] = [np.empty(0)] * len(feeds)
        left: Iterator[int] = iter(range(len(feeds)))  # next() on it is atomic

        def work(mine: ort.InferenceSession) -> None:
            for number in left:
                results[number] = mine.run([OUTPUT], feeds[number])[0]

        threads = [
            start_worker("session", (core,), lambda mine=mine: work(mine))  # type: ignore[misc]
            for core, mine in zip(cores, opened, strict=True)
        ]
        for thread in threads:
            thread.join()
        return results

    return run


def openvino(graph: Path, hint: str) -> Runner:
    """OpenVINO's compiled model with one of its performance hints, and as many requests in flight as it asks for."""
    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(graph), "CPU", settings)
    port = compiled.output(OUTPUT)

    def run(feeds: Sequence[Feed]) -> list[Array]:
        results: list[Array] = [np.empty(0)] * len(feeds)

        def keep(request: ov.InferRequest, number: int) -> None:
            results[number] = request.get_tensor(port).data.copy()

        queue = ov.AsyncInferQueue(compiled)
        queue.set_callback(keep)
        for number, feed in enumerate(feeds):
            queue.start_async(feed, number)
        queue.wait_all()
        return results

    return run


def ours(pipeline: Pipeline) -> Runner:
    """Our pipeline; its queue bounds the requests in flight, and `submit` waits for a place."""

    def run(feeds: Sequence[Feed]) -> list[Array]:
        futures = [pipeline.submit(feed, [OUTPUT]) for feed in feeds]
        return [future.result()[OUTPUT] for future in futures]

    return run


def feed(rows: int, shortest: int, longest: int, vocabulary: int) -> Feed:
    """A request of rows of random lengths, padded to the longest."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, vocabulary, (rows, longest))
    lengths = rng.integers(shortest, longest, rows, endpoint=True)
    lengths[0] = longest
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def measure(
    runners: dict[str, Runner], request: Feed, rows: int, rounds: int, round_s: float
) -> dict[str, list[float]]:
    """Sentences per second of each runner, one figure per round."""
    answers = [run([request])[0] for run in runners.values()]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-4)
    began = perf_counter()
    next(iter(runners.values()))([request] * 2)
    count = max(4, round(2 * round_s / (perf_counter() - began)) * 2)  # even, so that two sessions end together
    found: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            began = perf_counter()
            run([request] * count)
            found[name].append(count * rows / (perf_counter() - began))
    return found


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/minilm"), help="an exported minilm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-s", type=float, default=1.5, help="seconds that one runner works per round, about")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    cores = allowed_cores()[:2]
    if len(cores) < 2:
        raise SystemExit("this process may use only one core; two stages side by side need two")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        graphs = {stages: recut_copy(arguments.bundle, folder / f"{stages}-stage", stages) for stages in (1, 2)}
        whole = graphs[1].path / graphs[1].manifest.stages[0].file
        vocabulary = graphs[1].manifest.vocabulary or 2000
        runners = {
            "onnxruntime, 1 session, 1 thread": one_session(whole, 1),
            "onnxruntime, 1 session, 2 threads": one_session(whole, 2),
            "onnxruntime, 2 sessions, 1 thread": side_by_side(whole, cores),
            "openvino, latency hint": openvino(whole, "LATENCY"),
            "openvino, throughput hint": openvino(whole, "THROUGHPUT"),
        }
        others = list(runners)
        for engine in ("onnxruntime", "openvino"):
            for stages, bundle in graphs.items():
                pipeline = Pipeline.open(bundle.path, engine=engine, threads=2, queue=IN_FLIGHT)
                shape = f"{stages} x {2 // stages} thread{'s' * (stages == 1)}"
                runners[f"stageline {engine}, {shape}"] = ours(stack.enter_context(pipeline))
        print(f"sentences/s, median of {arguments.rounds} interleaved rounds (min to max) and times the best other;")
        print(f"onnxruntime {ort.__version__}, openvino {ov.__version__.split('-')[0]}")
        results = []
        for rows, shortest, longest in BATCHES:
            request = feed(rows, shortest, longest, vocabulary)
            found = measure(runners, request, rows, arguments.rounds, arguments.round_s)
            medians = {name: statistics.median(values) for name, values in found.items()}
            best = max(medians[name] for name in others)
            print(f"\n{rows} rows of {longest if shortest == longest else f'{shortest} to {longest}'} tokens")
            for name, values in found.items():
                ratio = "" if name in others else f"{medians[name] / best:10.2f}"
                print(f"{name:36}{medians[name]:8.1f} ({min(values):6.1f} to {max(values):6.1f}){ratio}", flush=True)
            results.append({"rows": rows, "tokens": [shortest, longest], "sentences_per_s": found, "medians": medians})
        cuts = [[stage.first_block, stage.last_block] for stage in graphs[2].manifest.stages]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        setting = {"cores": os.cpu_count(), "onnxruntime": ort.__version__, "stages": cuts, "in_flight": IN_FLIGHT}
        arguments.json.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
