"""A sentence for each chart, for readers who cannot see it: what it shows and its main finding."""

from stageline.runtime import words
from stageline.runtime.report import wording
from stageline.runtime.report.spec import Rows


def of_curve(rows: Rows, unit: str, time: str) -> str:
    """Of `charts.curve`."""
    ours = [row for row in rows if row["contender"] == "stageline" and row["run"] == "this run"] or list(rows)
    if not ours:
        return f"No load has a {time}."
    first, last = min(ours, key=lambda row: row["throughput"]), max(ours, key=lambda row: row["throughput"])
    return (
        f"{time} over throughput of {_listed(rows)}. {first['contender']} has {_point(first, unit)} and "
        f"{_point(last, unit)}."
    )


def _point(row: dict[str, object], unit: str) -> str:
    throughput, seconds = float(str(row["throughput"])), float(str(row["time_s"]))
    return f"{words.figure(throughput)} {unit} in {words.seconds(seconds)} at {row['load']}"


def of_bars(rows: Rows, figure: str) -> str:
    """Of `charts.baselines`."""
    shown = ", ".join(f"{row['contender']} {row['shown']}" for row in rows)
    return f"{wording.label(figure)} at {rows[0]['load']}: {shown}." if rows else "Nothing was measured."


def of_pareto(rows: Rows) -> str:
    """Of `charts.pareto`."""
    shown = "; ".join(
        f"{row['contender']} at {row['load']}: {words.figure(row['user'])} a user, {words.figure(row['device'])} in all"
        for row in rows
    )
    return f"Tokens per second. {shown}."


def of_stages(rows: Rows) -> str:
    """Of `charts.stages`."""
    shown = [f"{row['stage']} {row['what']} {row['percent']:.0f} %" for row in rows]
    return f"How each stage spent its time: {', '.join(shown)}."


def of_lines(rows: Rows, what: str) -> str:
    """Of charts with a line per run."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    return f"{what} of {', '.join(runs)}. The table above has the figures."


def _listed(rows: Rows) -> str:
    return ", ".join(dict.fromkeys(str(row["contender"]) for row in rows))
