"""What a hop between two stages costs, with stages that do nothing (an identity graph in ONNX Runtime).

The cost of a hop is (time of a request through S stages - S direct calls of the engine, one after the other) / S, so it
includes submission and result. Latency has one request in flight, throughput many. With more stages than cores,
throughput cannot rise, because the cores share the work. Most of a hop's latency is the system waking a thread: the
first line shows that cost on this machine, through the same kind of queue.

    python benchmarks/hop.py --json hop.json
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

import numpy as np
import onnx.parser
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, start_worker
from stageline.runtime.engines import Array, StageFile, Value, engine_factory
from stageline.runtime.pipeline import Pipeline, PipelineStage

WIDTH = 384
ROUNDS = 7  # the median of these is reported


def identity_stages(folder: Path, count: int) -> tuple[Signature, list[PipelineStage]]:
    """A chain v0 -> v1 -> ... of graphs that pass on their input."""
    stages = []
    for number in range(count):
        text = f"""<ir_version: 10, opset_import: ["" : 20]>
            stage (float[batch, {WIDTH}] v{number}) => (float[batch, {WIDTH}] v{number + 1})
            {{ v{number + 1} = Identity(v{number}) }}"""
        file = folder / f"{number}.onnx"
        file.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        opener = partial(engine_factory("onnxruntime"), StageFile(number, file, folder))
        stages.append(PipelineStage((f"v{number}",), (f"v{number + 1}",), opener))
    shape = ("batch", WIDTH)
    first = TensorSpec(name="v0", dtype="float32", shape=shape)
    last = TensorSpec(name=f"v{count}", dtype="float32", shape=shape)
    return Signature((first,), (last,)), stages


def per_call_us(call: Callable[[], object], calls: int) -> float:
    """Microseconds per call: the median over rounds of the mean over `calls`."""
    rounds = []
    for _ in range(ROUNDS):
        begin = perf_counter()
        for _ in range(calls):
            call()
        rounds.append((perf_counter() - begin) / calls * 1e6)
    return statistics.median(rounds)


def wake_up_us(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Microseconds for a thread on `first` to wake one on `second`, through a queue: half of a round trip."""
    there: SimpleQueue[bool] = SimpleQueue()
    back: SimpleQueue[bool] = SimpleQueue()
    found: list[float] = []

    def answer() -> None:
        while there.get():
            back.put(True)

    def ask() -> None:
        def round_trip() -> None:
            there.put(True)
            back.get()

        found.append(per_call_us(round_trip, 1000) / 2)
        there.put(False)

    for thread in [start_worker("answer", second, answer), start_worker("ask", first, ask)]:
        thread.join()
    return found[0]


def measure(count: int) -> dict[str, float]:
    """All figures for a chain of `count` stages, in microseconds."""
    value: Array = np.zeros((1, WIDTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        signature, stages = identity_stages(Path(folder), count)
        engines = [stage.open(CpuDevice(allowed_cores()[:1])) for stage in stages]

        def direct() -> None:
            values: Mapping[str, Value] = {"v0": value}
            for engine in engines:
                values = engine.run(values, engine.output_names)

        direct_us = per_call_us(direct, 1000)
        with Pipeline.of_stages(signature, stages, queue=64) as pipeline:
            latency_us = per_call_us(lambda: pipeline.run({"v0": value}), 500)

            def burst() -> None:
                for future in [pipeline.submit({"v0": value}) for _ in range(500)]:
                    future.result()

            throughput_us = per_call_us(burst, 1) / 500
    return {
        "stages": count,
        "direct_us": direct_us,
        "latency_us": latency_us,
        "latency_hop_us": (latency_us - direct_us) / count,
        "throughput_us": throughput_us,
        "throughput_hop_us": (throughput_us - direct_us) / count,
    }


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    cores = allowed_cores()
    wake_up = {"same_core": wake_up_us(cores[:1], cores[:1]), "other_core": wake_up_us(cores[:1], cores[-1:])}
    rows = [measure(count) for count in arguments.stages]
    here, there = wake_up.values()
    print(f"{len(cores)} cores; waking a thread takes {here:.1f} us on the same core, {there:.1f} us on another")
    print("microseconds per request, and per hop:")
    print("stages  direct  latency  per hop  throughput  per hop")
    for row in rows:
        print(
            f"{row['stages']:6.0f}  {row['direct_us']:6.1f}  {row['latency_us']:7.1f}  {row['latency_hop_us']:7.1f}  "
            f"{row['throughput_us']:10.1f}  {row['throughput_hop_us']:7.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"cores": len(cores), "wake_up_us": wake_up, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
