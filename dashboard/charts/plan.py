"""Charts of the Plan page: blocks, the effect of a cut, stages, the roofline."""

from stageline.dashboard.charts.base import AUTOSIZE, FROM_ZERO, GREY, LOG, TOP, Rows, Spec, category, quantity, values
from stageline.runtime.report.spec import WORK

MEASURES = {
    "Time": ("ms", "time per micro-batch (ms)"),
    "Parameters": ("parameters_m", "parameters (millions)"),
    "Memory": ("memory_mb", "weights and cache (MB)"),
}
"""The choices of the chart of blocks: column, axis title."""


def blocks(rows: Rows, measure: str) -> Spec:
    """One bar per block, prologue and epilogue, coloured by stage."""
    column, title = MEASURES[measure]
    names = [row["name"] for row in rows]
    every = max(1, -(-len(names) // 24))
    shown = [name for n, name in enumerate(names) if n % every == 0 or n == len(names) - 1]
    return {
        "data": values(rows),
        "height": 200,
        "autosize": AUTOSIZE,
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "x": category("name", sort=names, title=None, axis={"values": shown, "labelAngle": -45}),
            "y": quantity(column, title=title),
            "color": category("stage", title=None, legend=TOP),
            "tooltip": [
                category("name", title="part"),
                category("stage", title="stage"),
                quantity("ms", title="time (ms)", format=".3f"),
                quantity("gflop", title="operations (GFLOP)", format=",.3f"),
                quantity("parameters_m", title="parameters (millions)", format=",.3f"),
                quantity("weights_mb", title="weights (MB)", format=",.1f"),
                quantity("cache_mb", title="cache (MB)", format=",.1f"),
            ],
        },
    }


def cut_curve(rows: Rows, at: int, best: int | None) -> Spec:
    """Predicted tokens/s for each place of one cut; a rule at the current place, a ring at the best one."""
    x = quantity("cut", title="first block of the later stage", axis={"tickMinStep": 1, "format": "d", "grid": False})
    point = {
        "x": x,
        "y": quantity("tokens_per_s", title="predicted tokens/s", scale=FROM_ZERO),
        "tooltip": [
            quantity("cut", title="cut before block"),
            quantity("tokens_per_s", title="tokens/s", format=",.1f"),
            quantity("bubble", title="bubble ratio", format=".1%"),
        ],
    }
    here = [{"filter": f"datum.cut == {at}"}]
    layers: list[Spec] = [
        {"mark": {"type": "line", "point": {"size": 36}}, "encoding": point},
        {"transform": here, "mark": {"type": "rule", "color": GREY, "strokeDash": [4, 3]}, "encoding": {"x": x}},
        {"transform": here, "mark": {"type": "point", "size": 170, "filled": True}, "encoding": point},
    ]
    if best is not None:
        ring = {"type": "point", "size": 320, "strokeWidth": 2.5}
        layers.append({"transform": [{"filter": f"datum.cut == {best}"}], "mark": ring, "encoding": point})
    return {"data": values(rows), "height": 180, "autosize": AUTOSIZE, "layer": layers}


def stages(rows: Rows) -> Spec:
    """How each stage spends the time between two micro-batches: compute, copy, wait."""
    words = [("compute_ms", "computing"), ("copy_ms", "copying in"), ("wait_ms", "waiting")]
    long = [
        {"stage": row["stage"], "blocks": row["blocks"], "what": word, "order": order, "ms": row[column]}
        for row in rows
        for order, (column, word) in enumerate(words)
    ]
    return {
        "data": values(long),
        "height": 40 * len(rows),
        "autosize": AUTOSIZE,
        "mark": {"type": "bar", "cornerRadius": 2},
        "encoding": {
            "y": category("stage", title=None, sort=[row["stage"] for row in rows]),
            "x": quantity("ms", title="time per micro-batch (ms)", stack="zero"),
            "color": category(
                "what", title=None, legend=TOP, scale={"domain": list(WORK), "range": list(WORK.values())}
            ),
            "order": quantity("order"),
            "tooltip": [
                category("stage"),
                category("blocks"),
                category("what", title="what"),
                quantity("ms", title="time (ms)", format=".3f"),
            ],
        },
    }


def roofline(roof: Rows, stage_points: Rows) -> Spec:
    """Attained operations per second over intensity, both logarithmic, under the roof of the device."""
    place = {
        "x": quantity("intensity", title="intensity (operations/byte), log scale", scale=LOG),
        "y": quantity("gflop_per_s", title="rate (GFLOP/s), log scale", scale=LOG),
    }
    line = {"data": values(roof), "mark": {"type": "line", "color": GREY, "strokeWidth": 2}, "encoding": place}
    points = {
        "data": values(stage_points),
        "mark": {"type": "point", "size": 180, "filled": True, "opacity": 0.95},
        "encoding": {
            **place,
            "color": category("stage", title=None, legend=TOP),
            "shape": category("stage", title=None),
            "tooltip": [
                category("stage"),
                quantity("intensity", title="operations/byte", format=",.1f"),
                quantity("gflop_per_s", title="GFLOP/s", format=",.1f"),
                quantity("share", title="of the roof", format=".0%"),
                category("bound", title="bound by"),
            ],
        },
    }
    return {"height": 200, "autosize": AUTOSIZE, "layer": [line, points]}
