"""The charts' specs against Vega-Lite's own schema, which Altair carries; and that their fields are in their rows."""

from collections.abc import Callable, Iterator
from typing import Any

import altair as alt
import pytest
from stageline.dashboard.charts import live, plan, runs, timeline
from stageline.dashboard.charts.base import Spec


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


POINTS = rows(
    contender=["stageline", "onnxruntime"], load=["Server", "Server"], throughput=[3.0, 2.0], latency_ms=[5.0, 6.0],
    order=[1, 2], sweep=["Rate", None],
)  # fmt: skip
BARS = rows(
    contender=["stageline", "torch"], load=["Server", "Server"], throughput=[3.0, 2.0], low=[2.0, 1.0], high=[4.0, 3.0],
    told=["this", "other"],
)  # fmt: skip
TIMES = rows(
    stage=["stage 0"], device=["cpu:0"], blocks=[3], what=["computing"], order=[0], percent=[40.0], seconds=[2.0]
)
LADDER = rows(run=["A", "B"], percentile=[50.0, 50.0], nines=[0.3, 0.3], ms=[4.0, 5.0])
BINS = rows(run=["A"], low_ms=[1.0], high_ms=[2.0], percent=[100.0])
SLICES = rows(run=["A"], at_s=[0.5], percentile=["p50"], ms=[4.0])
SPANS = rows(
    stage=["stage 0"], kind=["decode"], begin_ms=[0.0], end_ms=[1.0], ms=[1.0], shape=["1 × 1 tokens"], micro_batch=[7],
    requests=["3"],
)  # fmt: skip
BUBBLES = rows(stage=["stage 0"], kind=["bubble"], begin_ms=[1.0], end_ms=[2.0], ms=[1.0])
BUSY = rows(stage=["stage 0"], at_s=[0.5], percent=[90.0])
BLOCKS = rows(
    name=["block 0"], stage=["stage 0"], ms=[1.0], gflop=[2.0], parameters_m=[3.0], weights_mb=[4.0], cache_mb=[5.0],
    memory_mb=[9.0],
)  # fmt: skip
CUTS = rows(cut=[1, 2], tokens_per_s=[10.0, 12.0], bubble=[0.1, 0.2])
STAGES = rows(stage=["stage 0"], blocks=["0 to 3"], compute_ms=[1.0], copy_ms=[0.1], wait_ms=[0.2])
ROOF = rows(intensity=[1.0, 10.0], gflop_per_s=[5.0, 50.0])
REACHED = rows(stage=["stage 0"], intensity=[2.0], gflop_per_s=[8.0], share=[0.8], bound=["memory bandwidth"])
LINES = rows(ago_s=[-2.0, 0.0], value=[1.0, 2.0], line=["a", "b"])
CHARTS: dict[str, Callable[[], Spec]] = {
    "curve": lambda: runs.curve(POINTS, "tokens/s", "p99", None, ["stageline", "onnxruntime"]),
    "curve with an SLO": lambda: runs.curve(POINTS, "tokens/s", "p99", 500.0, ["stageline", "onnxruntime"]),
    "baselines": lambda: runs.baselines(BARS, "tokens/s"),
    "stages of a run": lambda: runs.stages(TIMES),
    "ladder": lambda: runs.ladder(LADDER, "latency (ms)", ["A", "B"]),
    "histogram": lambda: runs.histogram(BINS, ["A"]),
    "over time": lambda: runs.over_time(SLICES, ["A"]),
    "gantt": lambda: timeline.gantt(SPANS, BUBBLES, ["stage 0"], (0.0, 2.0)),
    "utilisation": lambda: timeline.utilisation(BUSY, (0.0, 1.0)),
    **{f"blocks by {name}": lambda name=name: plan.blocks(BLOCKS, name) for name in plan.MEASURES},
    "cut": lambda: plan.cut_curve(CUTS, 1, None),
    "cut with the best": lambda: plan.cut_curve(CUTS, 1, 2),
    "stages of a plan": lambda: plan.stages(STAGES),
    "roofline": lambda: plan.roofline(ROOF, REACHED),
    "live": lambda: live.lines(LINES, "tokens/s", ["a", "b"]),
    "live with a top": lambda: live.lines(LINES, "busy (%)", ["a"], 100.0),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_valid_vega_lite(name: str) -> None:
    spec = CHARTS[name]()
    (alt.LayerChart if "layer" in spec else alt.Chart).from_dict(spec)  # validates


def encodings(spec: Spec) -> Iterator[tuple[Spec, list[dict[str, Any]]]]:
    """Each encoding with the rows that it draws."""
    for layer in spec.get("layer", [spec]):
        yield layer["encoding"], layer.get("data", spec.get("data"))["values"]


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_draws_fields_that_its_rows_have(name: str) -> None:
    for encoding, drawn in encodings(CHARTS[name]()):
        channels = [one for value in encoding.values() for one in (value if isinstance(value, list) else [value])]
        fields = {channel["field"] for channel in channels if "field" in channel}
        assert fields
        assert fields <= set(drawn[0])
