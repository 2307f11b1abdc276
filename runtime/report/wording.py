"""Figures of runs as people read them: labels, values with units, doubt, ratios in one direction."""

import math
from collections.abc import Sequence

from stageline.runtime import words
from stageline.runtime.bench.compare import FigureChange, missing
from stageline.runtime.bench.confidence import Ratio
from stageline.runtime.bench.records import Figure, Measurement

KEY_FIGURES = (
    "requests_per_s",
    "tokens_per_s",
    "goodput_per_s",
    "latency_p50_s",
    "latency_p90_s",
    "latency_p99_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "slo_share",
    "failed_share",
    "bubble_ratio",
    "hop_overhead_s",
    "queue_depth",
    "host_memory_bytes",
    "device_memory_bytes",
    "power_w",
    "energy_per_token_j",
)
"""The figures that tables show, in this order."""
VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "same": "The same",
    "undecided": "Undecided: the intervals are too wide, or the samples too small",
}
"""Verdicts as the beginning of a sentence."""
_LABELS = {
    "requests_per_s": "requests/s",
    "samples_per_s": "texts/s",
    "tokens_per_s": "tokens/s",
    "tokens_in_per_s": "tokens read/s",
    "tokens_out_per_s": "tokens drawn/s",
    "goodput_per_s": "within the SLO/s",
    "slo_share": "within the SLO",
    "failed_share": "not answered",
    "bubble_ratio": "bubble ratio",
    "hop_overhead_s": "hop overhead",
    "queue_depth": "queue",
    "host_memory_bytes": "host memory",
    "device_memory_bytes": "GPU memory",
    "power_w": "power",
    "energy_j": "energy",
    "energy_per_token_j": "energy per token",
}


def label(figure: str) -> str:
    """requests_per_s -> requests/s; latency_p99_s -> latency p99; ttft_p50_s -> TTFT p50."""
    text = _LABELS.get(figure) or figure.removesuffix("_s").replace("_", " ")
    for name in ("ttft", "tpot", "itl", "slo"):
        text = text.replace(name, name.upper())
    return text


def value(figure: Figure, unit: bool = True) -> str:
    """The mean of a figure with its unit, or without the unit where a label has it (times and bytes keep theirs)."""
    mean = figure.mean
    if not math.isfinite(mean):
        return "-"
    if figure.unit == "s":
        return words.seconds(mean)
    if figure.unit == "bytes":
        return words.size(mean)
    if figure.unit == "":
        return words.share(mean)
    return f"{words.figure(mean)} {figure.unit}" if unit else words.figure(mean)


def doubt(spread: float | None) -> str:
    """Half an interval as a share of its middle: ±4 %; "" where there is none."""
    if spread is None or not math.isfinite(spread):
        return ""
    percent = 100 * spread
    return "± over 100 %" if percent > 100 else f"±{percent:.0f} %" if percent >= 1 else f"±{percent:.1f} %"


def with_doubt(figure: Figure, unit: bool = True) -> str:
    """159 requests/s ±4 %; of one repeat, or of zero, without the interval, which is not known."""
    return f"{value(figure, unit)} {doubt(figure.spread)}".rstrip()


def percent(share: float) -> str:
    """0.804 -> 80 %."""
    return f"{100 * share:.0f} %"


def key_figures(measured: Sequence[Measurement]) -> list[str]:
    """The figures of a table of these, in order: those that any has, and latencies that are not known because requests
    had no answer, of which the table says so."""

    def has(one: Measurement, name: str) -> bool:
        return name in one.figures or (name.startswith("latency_") and missing(one, name) is not None)

    return [name for name in KEY_FIGURES if any(has(one, name) for one in measured)]


def said(measurement: Measurement, name: str, unit: bool = True) -> str:
    """A figure of a measurement with its doubt; a dash where it is absent, or its sample does not carry it."""
    figure = measurement.figures.get(name)
    return "-" if figure is None or missing(measurement, name) else with_doubt(figure, unit)


def times(ratio: Ratio) -> str:
    """1.22 times (95 %: 1.15 to 1.30)."""
    return f"{words.figure(ratio.value)} times ({between(ratio)})"


def between(ratio: Ratio) -> str:
    """The interval of a ratio: 95 %: 1.15 to 1.30."""
    if ratio.low is None or ratio.high is None:
        return "one repeat: no interval"
    return f"95 %: {_bound(ratio.low)} to {_bound(ratio.high)}"


def _bound(bound: float) -> str:
    if bound >= 1000:
        return "over 1,000"
    return words.figure(bound) if bound >= 1e-3 else "under 0.001"


def change(found: FigureChange) -> str:
    """How many times the figure is, without the interval: 0.80 times."""
    return "-" if found.ratio is None or found.lacking else f"{words.figure(found.ratio.value)} times"


def sides(found: FigureChange) -> tuple[str, str]:
    """Both figures with their doubt; dashes if a sample does not carry its figure."""
    return ("-", "-") if found.lacking else (with_doubt(found.before), with_doubt(found.after))


def certainty(found: FigureChange) -> str:
    """The interval of a change, or why there is no verdict."""
    if found.doubt is not None:
        return found.doubt
    return "a value is zero" if found.ratio is None else between(found.ratio)
