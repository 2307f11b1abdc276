"""The recorder: what a pipeline tells it, and what it keeps of a long run."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array
from stageline.runtime.pipeline import Pipeline, PipelineStage
from stageline.runtime.stages.recorder import WINDOW, Kind, Recorder


class Double:
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    max_rows: int | None = None
    packs: bool = False
    block_tokens: int | None = None

    def __init__(self, gives: str) -> None:
        self.gives = gives

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        return {self.gives: 2 * inputs["x" if self.gives == "h" else "h"]}

    def close(self) -> None: ...


def doubled_twice() -> Pipeline:
    x, y = (TensorSpec(name=name, dtype="float32", shape=("batch", 3)) for name in "xy")
    stages = [
        PipelineStage(("x",), ("h",), lambda device: Double("h")),
        PipelineStage(("h",), ("y",), lambda device: Double("y")),
    ]
    return Pipeline.of_stages(Signature((x,), (y,)), stages, micro_batch=4)


def test_every_micro_batch_is_recorded_at_every_stage_with_its_request_and_its_shape() -> None:
    recorder = Recorder()
    with doubled_twice() as pipeline:
        pipeline.run({"x": np.ones((4, 3), np.float32)})  # before anybody records
        pipeline.record(recorder)
        for rows in (7, 2):
            pipeline.run({"x": np.ones((rows, 3), np.float32)})
        pipeline.record(None)
        pipeline.run({"x": np.ones((4, 3), np.float32)})
        runs, busy_s = pipeline.stats().stages[0].runs, pipeline.stats().stages[0].busy_s
    spans = recorder.spans()
    for stage in (0, 1):
        here = [span for span in spans if span.stage == stage]
        assert [(span.micro_batch, span.rows, span.requests) for span in here] == [
            (1, 3, (1,)),
            (2, 4, (1,)),
            (3, 2, (2,)),
        ]
        assert all(before.ended_s <= after.began_s for before, after in itertools.pairwise(here))
    assert runs == 5
    assert sum(span.ended_s - span.began_s for span in spans if span.stage == 0) < busy_s
    requests = recorder.requests()
    assert [request.number for request in requests] == [1, 2]
    for span in spans:
        (request,) = [one for one in requests if one.number in span.requests]
        assert request.began_s <= span.began_s <= span.ended_s <= request.ended_s


@dataclass(frozen=True)
class Numbered:
    number: int

    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        return "batch", 1, 1, (self.number,)


def test_a_long_run_keeps_whole_windows_from_its_beginning_to_its_end() -> None:
    recorder, most, count = Recorder(max_spans=1000), 1000, 100_000
    for number in range(count):
        for stage in range(2):
            recorder.ran(stage, float(number), number + 0.5, Numbered(number))
        recorder.ended(number, float(number), number + 1.0)
    spans = recorder.spans()
    assert most / 4 < len(spans) <= most
    assert len(recorder.requests()) <= most
    windows = {span.micro_batch // WINDOW for span in spans}
    kept = {number for window in windows for number in range(window * WINDOW, (window + 1) * WINDOW)}
    assert {(span.micro_batch, span.stage) for span in spans} == {(n, s) for n in kept if n < count for s in range(2)}
    gaps = {after - before for before, after in itertools.pairwise(sorted(windows))}
    assert len(gaps) == 1
    assert max(kept) > count / 2
