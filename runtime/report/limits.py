"""What each contender of a run carries, in words: the knee of its closed loops and the largest rate within the SLO."""

from stageline.runtime.bench.capacity import Capacity, capacities
from stageline.runtime.bench.records import Run


def limits(run: Run) -> tuple[str, ...]:
    """A line for each contender; none for one of which nothing was measured that says it."""
    said = [
        (one.contender, _parts(one, run.settings.slo.share)) for one in capacities(run.measurements, run.settings.slo)
    ]
    return tuple(f"{contender}: {'; '.join(parts)}" for contender, parts in said if parts)


def _parts(one: Capacity, share: float) -> list[str]:
    parts = []
    if one.knee is not None and one.peak_per_s is not None:
        more = ", the largest load measured" if one.climbing else ""
        parts.append(f"knee {one.knee}{more}; at most {one.peak_per_s:.3g} requests/s in a closed loop")
    over = "" if one.over_per_s is None else f"; {one.over_per_s:g}/s does not"
    if one.best is not None:
        sure = "" if one.sure else " (not sure: more or longer repeats would tell)"
        parts.append(f"{one.best} holds the SLO for {100 * share:g} % of requests{sure}{over}")
    elif one.over_per_s is not None:
        parts.append(f"no rate that was measured holds the SLO for {100 * share:g} % of requests{over}")
    return parts
