"""Charts that stay readable: plots that keep their height, axes that say what they are, colours with one meaning."""

import re

import pytest
from stageline.runtime.report import charts
from stageline.runtime.report.pictures import picture
from stageline.runtime.report.spec import (
    CONTENDERS,
    GREY,
    INK,
    OTHERS,
    RUNS,
    WORK,
    Spec,
    colour_of,
    dressed,
    spreading,
    time_unit,
)

GROUNDS = ("#ffffff", "#12161c")


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def plot_height(spec: Spec) -> float:
    """Of the drawn plot, without its legend, axes and titles, in pixels."""
    drawn = picture({**spec, "width": 500}, "svg").decode()
    found = re.search(r'class="background"[^>]*d="M0(?:\.5)?,0(?:\.5)?h[\d.]+v([\d.]+)h', drawn)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("runs", [1, 6])
def test_a_plot_keeps_its_height_whatever_its_legend(runs: int) -> None:
    pytest.importorskip("vl_convert")
    names = [f"{letter}: a bundle with a long name" for letter in "ABCDEF"[:runs]]
    rows = [{"run": name, "at_s": at, "percentile": "p50", "seconds": 0.1 + at} for name in names for at in (0.0, 1.0)]
    chart = charts.over_time(rows, names)
    assert plot_height(dressed(chart)) == chart["height"] == 220


def test_one_value_makes_an_axis_from_zero_and_not_one_odd_tick() -> None:
    axis = spreading("time", "latency (ms)", [438.944176733])
    assert axis["scale"] == {"zero": True}
    assert "log" not in axis["title"]


def test_a_logarithmic_axis_says_so_and_has_round_ticks_around_its_values() -> None:
    axis = spreading("time", "latency (ms)", [93.0, 410.0, 2600.0])
    assert axis["title"] == "latency (ms), log scale"
    assert axis["axis"]["values"] == [50, 100, 200, 500, 1000, 2000, 5000]
    assert axis["scale"]["domain"] == [50, 5000]


def test_a_chart_has_one_unit_of_time_seconds_from_a_thousand_milliseconds_on() -> None:
    assert time_unit([0.002, 0.999]) == (1e3, "ms")
    assert time_unit([0.002, 1.0]) == (1.0, "s")


def test_a_colour_means_one_thing_and_is_seen_on_both_grounds() -> None:
    sets = [set(CONTENDERS.values()), set(OTHERS), set(WORK.values())]
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    assert WORK["waiting"] == GREY
    for colour in (*CONTENDERS.values(), *OTHERS, *WORK.values(), *RUNS):
        assert all(contrast(colour, ground) >= 3 for ground in GROUNDS), colour
    assert all(contrast(INK[theme], ground) >= 7 for theme, ground in zip(("light", "dark"), GROUNDS, strict=True))
    colours = colour_of(["http://a", "stageline", "http://b"])
    assert colours["stageline"] == CONTENDERS["stageline"]
    assert len(set(colours.values())) == 3
