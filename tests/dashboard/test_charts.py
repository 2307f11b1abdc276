"""The charts' specs against Vega-Lite's own schema, which Altair carries, on the rows of the functions in figures/."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from stageline.dashboard.charts import engines, live, plan, timeline
from stageline.dashboard.figures import live as live_figures
from stageline.dashboard.figures import plan as plan_figures
from stageline.dashboard.figures import runs as run_figures
from stageline.dashboard.figures import timeline as timeline_figures
from stageline.dashboard.figures.distribution import spread
from stageline.runtime.bench.records import Timeline
from stageline.runtime.bench.store import Store
from stageline.runtime.report import charts as runs
from stageline.runtime.report import rows
from stageline.runtime.report.spec import Spec, dressed
from stageline.runtime.stages.recorder import Span
from stageline.runtime.workload import Workload


@pytest.fixture(scope="module")
def charts(filled_store: Path, bundles: Path) -> dict[str, Callable[[], Spec]]:
    """Every chart, on rows from the functions that make them for the pages."""
    store = Store(filled_store)
    run = store.run(store.find("latest"))
    measurement = run_figures.fullest(run)
    assert measurement is not None
    before = store.run(store.find("latest~1"))
    curve = rows.curve_rows(run, "latency_p50", before)
    requests = spread(["A"], [store.requests(run.id, 0)])
    spans = [Span(stage, "decode", 0, 2e-3 * stage, 2e-3 * stage + 1e-3, 1, 1, (3,)) for stage in (0, 1, 0)]
    spans.append(Span(0, "decode", 1, 5e-3, 6e-3, 1, 1, (3,)))
    spans.append(Span(1, "decode", 0, 7e-3, 8e-3, 1, 1, (3,)))
    table = timeline_figures.Table.of(Timeline(tuple(spans)))
    drawn, bubbles = timeline_figures.span_rows(table, 0.0, 1.0)[0], timeline_figures.bubble_rows(table, 0.0, 1.0)
    bundle = plan_figures.open_unverified(bundles / "llama")
    planner = plan_figures.planner_for(bundle, "H100", 2, Workload(slots=2, capacity=32), None)
    answer = planner.cut([1, 2])
    cuts, roof = plan_figures.moved(planner, [1, 2], 0), plan_figures.roofline(planner, answer)
    family_rows = [{"engine": "a", "family": "attention", "seconds": 0.2, "share": 1.0}]
    panels = [
        live_figures.Panel("A", "tokens/s", {"a": [(1.0, 2.0)], "b": [(2.0, 3.0)]}),
        live_figures.Panel("B", "%", {"a": [(1.0, 2.0)]}, 100.0),
    ]
    return {
        "curve": lambda: runs.curve(curve, "tokens/s", "latency p50", None),
        "curve with an SLO": lambda: runs.curve(curve, "tokens/s", "latency p50", 0.5),
        "curve of seconds": lambda: runs.curve(curve, "tokens/s", "latency p50", 5.0),
        "pareto": lambda: runs.pareto(rows.pareto_rows(run)),
        "baselines": lambda: runs.baselines(rows.baseline_rows(run, str(measurement.load)), "tokens_per_s"),
        "stages of a run": lambda: runs.stages(rows.stage_rows(measurement)),
        "ladder": lambda: runs.ladder(rows.ladder_rows("A", measurement, "latency_s"), "latency", ["A"]),
        "histogram": lambda: runs.histogram(requests.histogram, ["A"]),
        "over time": lambda: runs.over_time(requests.over_time, ["A"]),
        "gantt": lambda: timeline.gantt(drawn, bubbles, ["stage 0", "stage 1"], (0.0, 8.0)),
        "utilisation": lambda: timeline.utilisation(timeline_figures.utilisation_rows(table), (0.0, 1.0)),
        "blocks": lambda: plan.blocks(plan_figures.block_rows(planner, answer), "Time"),
        "blocks by parameters": lambda: plan.blocks(plan_figures.block_rows(planner, answer), "Parameters"),
        "blocks by memory": lambda: plan.blocks(plan_figures.block_rows(planner, answer), "Memory"),
        "cut": lambda: plan.cut_curve(cuts, 1, None),
        "cut with the best": lambda: plan.cut_curve(cuts, 1, 2),
        "stages of a plan": lambda: plan.stages(plan_figures.stage_rows(answer)),
        "roofline": lambda: plan.roofline(plan_figures.roof_points(roof), roof.stages),
        "families of layers": lambda: engines.families(family_rows, {"a": "#0072B2"}),
        "live": lambda: live.panels(list(live_figures.panel_rows(panels, 60.0, 2.0)), panels),
    }


def encodings(spec: Spec) -> Iterator[tuple[Spec, list[dict[str, Any]]]]:
    """Each encoding with the rows that it draws: after a pivot, with the names of its lines as fields."""
    for view in spec.get("vconcat", [spec]):
        for layer in view.get("layer", [view]):
            drawn = layer.get("data", spec.get("data"))["values"]
            for pivot in (one["pivot"] for one in layer.get("transform", []) if "pivot" in one):
                drawn = [row | {row[pivot]: 0.0 for row in drawn} for row in drawn]
            yield layer["encoding"], drawn


def test_every_chart_is_valid_vega_lite_and_draws_fields_that_its_rows_have(
    charts: dict[str, Callable[[], Spec]],
) -> None:
    for name, chart in charts.items():
        spec = dressed(chart(), "dark", "A sentence.")
        kind = alt.VConcatChart if "vconcat" in spec else alt.LayerChart if "layer" in spec else alt.Chart
        kind.from_dict(spec)  # validates
        for encoding, drawn in encodings(spec):
            channels = [one for value in encoding.values() for one in (value if isinstance(value, list) else [value])]
            fields = {channel["field"] for channel in channels if isinstance(channel, dict) and "field" in channel}
            assert drawn, f"{name} draws nothing"
            assert fields, name
            assert fields <= set(drawn[0]), name
