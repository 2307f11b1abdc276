"""A report's statements, computed again from the stored requests by NumPy and SciPy, with none of the product's
statistics: what they disagree about."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats
from stageline.runtime.bench.records import ANSWERED, CANCELLED, OURS, Load, Requests, Run, Slo
from stageline.runtime.bench.store import Store
from stageline.runtime.report.document import Chart, document
from stageline.runtime.report.formats import markdown

NEEDED = {"p50": 1, "p90": 10, "p99": 100}
_UNITS = {"": 1.0, "%": 0.01, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_CELL = re.compile(r"([\d.,]+)(?: (%|µs|ms|s|min))?(?: ±([\d.]+) %| (± over 100) %)?")
Floats = npt.NDArray[np.float64]


@dataclass
class Raw:
    """The requests of one contender under one load."""

    load: Load
    requests: Requests
    slo: Slo
    _known: dict[str, list[float]] = field(default_factory=dict)

    @cached_property
    def repeats(self) -> list[Requests]:
        """Those of each repeat."""
        of = self.requests
        return [
            Requests(*(getattr(of, name)[of.repeat == n] for name in Requests.__annotations__))
            for n in np.unique(of.repeat)
        ]

    def values(self, label: str) -> list[float]:
        """A figure of a report's table, by its label, in each repeat; NaN where it is not known."""
        if label not in self._known:
            self._known[label] = [self._value(one, label) for one in self.repeats]
        return self._known[label]

    def _value(self, of: Requests, label: str) -> float:
        answered, end = of.status == ANSWERED, float((of.intended_s + of.latency_s).max())
        within = answered.copy()
        for bound, times in (
            (self.slo.latency_s, of.latency_s),
            (self.slo.ttft_s, of.first_token_s),
            (self.slo.tpot_s, _tpot_s(of)),
        ):
            within &= np.isnan(times) | (
                times <= (math.inf if bound is None else bound)
            )  # no such time: nothing is late
        tokens = of.tokens_out if of.tokens_out.any() else of.tokens_in
        simple = {
            "requests/s": answered.sum() / end,
            "tokens/s": tokens[answered].sum() / end,
            "within the SLO/s": within.sum() / end,
            "within the SLO": within.mean(),
            "not answered": (~answered).mean(),
        }
        if label in simple:
            return float(simple[label])
        what, percentile = label.split(" p")
        if what == "TPOT":
            times = _tpot_s(of)[answered & (of.tokens_out > 1)]
        else:  # what was never answered took longer than all that was
            times = (of.first_token_s if what == "TTFT" else of.latency_s).astype(float)
            times[of.status == CANCELLED] = math.inf
            times = times[(answered & ~np.isnan(times)) | (of.status == CANCELLED)]
        with np.errstate(invalid="ignore"):
            found = float(np.percentile(times, float(percentile))) if len(times) else math.nan
        return found if math.isfinite(found) else math.nan

    def carries(self, label: str) -> bool:
        """Whether so many requests a repeat were answered that one lies beyond the percentile."""
        answered = int((self.requests.status == ANSWERED).sum()) // len(self.repeats)
        return answered >= NEEDED.get(label.rpartition(" ")[2], 1) and not any(map(math.isnan, self.values(label)))

    def holds(self, share: float) -> tuple[bool, bool]:
        """Whether so large a share of the requests kept the SLO, and whether that is sure."""
        values = self.values("within the SLO")
        low, high = interval(values)
        enough = share ** len(self.requests) <= 0.05
        mean = float(np.mean(values))
        return mean >= share, high < share or (low > share and enough)


def _tpot_s(of: Requests) -> Floats:
    """Seconds for each token after the first; NaN where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (of.latency_s - of.first_token_s) / (of.tokens_out - 1.0)
    return np.where(of.tokens_out > 1, found, np.nan)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean - quantile(len(values) - 1) * error, mean + quantile(len(values) - 1) * error


@cache
def quantile(freedom: int) -> float:
    """Of Student's t: what 97.5 % lie below."""
    return float(stats.t.ppf(0.975, freedom))


def welch(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Ours over theirs: the ratio of the geometric means, and its 95 % interval."""
    logs = np.log(ours), np.log(theirs)
    bounds = stats.ttest_ind(*logs, equal_var=False).confidence_interval()
    return [float(one) for one in np.exp([logs[0].mean() - logs[1].mean(), bounds.low, bounds.high])]


@dataclass
class Check:
    """Compares the report of `run`, which is in `store`, with its requests; `checked` counts statements."""

    run: Run
    store: Store
    checked: int = 0
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        slo = self.run.settings.slo
        self.share = slo.share
        self.raw = {
            (one.contender, str(one.load)): Raw(
                one.load, self.store.requests(self.run.id, number), self.run.settings.slo
            )
            for number, one in enumerate(self.run.measurements)
        }
        self.blocks = document([self.run])
        self.text = markdown(self.blocks, "report").replace("\\", "")
        self.speed = "tokens/s" if self.run.settings.output_tokens else "requests/s"
        for check in (self._tables, self._ratios, self._knees, self._rates, self._first_line, self._curves):
            check()

    def _note(self, what: str, said: object, wanted: object, same: bool) -> None:
        self.checked += 1
        if not same:
            self.wrong.append(f"{what}: the report says {said}, the requests {wanted}")

    def _near(self, what: str, said: str | float, wanted: float) -> None:
        """Three figures agree, or the tenth of a percent of a share."""
        value = float(said.replace(",", "")) if isinstance(said, str) else said
        self._note(what, value, wanted, math.isclose(value, wanted, rel_tol=6e-3, abs_tol=1e-12))

    def _loads(self) -> dict[str, Load]:
        return {name: raw.load for (_, name), raw in self.raw.items()}

    def _tables(self) -> None:
        for load in self._loads():
            section = re.search(rf"^### {re.escape(load)}\n(.*?)(?=^##|\Z)", self.text, re.M | re.S)
            lines = re.findall(r"^\| (.*) \|$", section[1], re.M) if section else []
            (_, *contenders), _, *rows = [line.split(" | ") for line in lines] or [[""], []]
            self._note(f"contenders at {load}", contenders, "", set(contenders) == set(self._measured(load)))
            for label, *cells in rows:
                for contender, cell in zip(contenders, cells, strict=True):
                    self._cell(f"{contender}, {load}, {label}", self.raw[contender, load], label, cell)

    def _measured(self, load: str) -> list[str]:
        return [contender for contender, name in self.raw if name == load]

    def _cell(self, what: str, raw: Raw, label: str, cell: str) -> None:
        if label == "requests measured":
            self._note(what, cell, len(raw.requests), cell == f"{len(raw.requests):,}")
            return
        if label not in ("requests/s", "tokens/s", "within the SLO/s", "within the SLO", "not answered") and not (
            label.startswith(("latency p", "TTFT p", "TPOT p"))
        ):
            return  # of the machine, not of its requests
        if not raw.carries(label):
            self._note(what, cell, "nothing", cell == "-")
            return
        found = _CELL.fullmatch(cell)
        if found is None:
            self._note(what, cell, "a figure", False)
            return
        values = raw.values(label)
        mean = float(np.mean(values))
        unit = _UNITS[found[2] or ""]
        rounding = 0.0006 if found[2] == "%" else 6e-3 * mean
        self._note(what, cell, mean, abs(float(found[1].replace(",", "")) * unit - mean) <= rounding)
        if mean and found[3]:
            spread = 100 * (interval(values)[1] - mean) / mean
            self._note(
                f"{what}: ±", found[3], spread, abs(float(found[3]) - spread) <= (0.51 if spread > 0.99 else 0.051)
            )

    def _ratios(self) -> None:
        said = re.findall(
            r"Stageline (is|has) ([\d.,]+) times (?:the latency of )?(\S+), ([^(]+?) "
            r"\(95 %: (under 0.001|\S+) to (over 1,000|\S+)\)\.",
            self.text,
        )
        for verb, value, contender, load, low, high in set(said):
            label = "latency p50" if self._loads()[load].rate_per_s else self.speed
            self._note(f"{contender}, {load}", verb, "", verb == ("has" if label == "latency p50" else "is"))
            wanted = welch(*(self.raw[name, load].values(label) for name in (contender, OURS)))
            for shown, right in zip((value, low, high), wanted, strict=True):
                if shown in ("under 0.001", "over 1,000"):
                    beyond = right < 1e-3 if shown == "under 0.001" else right > 1000
                    self._note(f"ratio to {contender}, {load}", shown, right, beyond)
                else:
                    self._near(f"ratio to {contender}, {load}", shown, right)
        pairs = {
            (contender, load) for contender, load in self.raw if contender != OURS and self._comparable(contender, load)
        }
        self._note("pairs compared", sorted({(c, load) for _, _, c, load, _, _ in said} ^ pairs), "", pairs == {
            (contender, load) for _, _, contender, load, _, _ in said
        })  # fmt: skip

    def _comparable(self, contender: str, load: str) -> bool:
        if (OURS, load) not in self.raw:
            return False
        label = "latency p50" if self._loads()[load].rate_per_s else self.speed
        return not any(math.isnan(value) for name in (contender, OURS) for value in self.raw[name, load].values(label))

    def _closed(self, contender: str) -> list[Raw]:
        found = [raw for (name, _), raw in self.raw.items() if name == contender and raw.load.concurrency]
        return sorted(found, key=lambda raw: raw.load.concurrency or 0)

    def _knees(self) -> None:
        said = dict(re.findall(r"The knee of (\S+) is at (\d+) at a time", self.text))
        for contender in dict.fromkeys(name for name, _ in self.raw):
            powers = {}
            for raw in self._closed(contender):
                mean_s = np.mean([one.latency_s[one.status == ANSWERED].mean() for one in raw.repeats])
                powers[raw.load.concurrency or 0] = float(np.mean(raw.values("requests/s")) / mean_s)
            places = sorted(powers)
            at = places.index(max(powers, key=lambda one: powers[one]))
            near = places[max(0, at - 1) : at + 2]
            known = len(places) > 1 and all(more <= 2 * less for less, more in pairwise(near))
            wanted = str(places[at]) if known else None
            self._note(f"knee of {contender}", said.get(contender), wanted, said.get(contender) == wanted)

    def _rates(self) -> None:
        best = dict(
            re.findall(r"The largest rate at which (\S+) keeps the SLO(?:, not surely)?: Rate ([\d.]+)/s", self.text)
        )
        over = dict(re.findall(r"The largest rate at which (\S+) keeps .*?; ([\d.,]+)/s does not\.", self.text))
        for contender in dict.fromkeys(name for name, _ in self.raw):
            held = {
                raw.load.rate_per_s: raw.holds(self.share)
                for (name, _), raw in self.raw.items()
                if name == contender and raw.load.rate_per_s
            }
            sure = {rate for rate, (_, surely) in held.items() if surely}
            failing = {rate for rate, (holds, _) in held.items() if not holds}
            keeping = [
                rate
                for rate in held
                if rate not in failing
                and not any(less in sure for less in failing if less < rate)
                and (rate in sure or not any(less < rate for less in failing))
            ]
            wanted = max(keeping, default=None)
            self._note(
                f"rate of {contender}",
                best.get(contender),
                wanted,
                best.get(contender) == (f"{wanted:g}" if wanted else None),
            )
            if contender in over:
                self._near(
                    f"rate that {contender} fails", over[contender], min(r for r in failing if r > (wanted or 0))
                )

    def _first_line(self) -> None:
        found = re.search(
            rf"^([\d.,]+) {self.speed}(?: ±.*? %)?( within the SLO)?, (.+?)(?:; no load keeps the SLO)?\. "
            r"(?:Stageline (?:is|has) [\d.,]+ times (?:the latency of )?(\S+),)?",
            self.text,
            re.M,
        )
        ours = {load: raw for (name, load), raw in self.raw.items() if name == OURS}
        keeping = [load for load, raw in ours.items() if np.mean(raw.values("within the SLO")) >= self.share]
        speeds = {load: float(np.mean(raw.values(self.speed))) for load, raw in ours.items()}
        best = max(keeping or ours, key=lambda load: speeds[load])
        self._note("the first line", found and found[0], best, found is not None)
        if found is None:
            return
        self._note("the first line's load", found[3], best, found[3] == best and bool(found[2]) == bool(keeping))
        self._near("the first line's throughput", found[1], speeds[best])
        label, sign = ("latency p50", 1) if self._loads()[best].rate_per_s else (self.speed, -1)
        peers = [one for one in self._measured(best) if one != OURS and self._comparable(one, best)]
        peer = min(peers, key=lambda one: sign * float(np.mean(self.raw[one, best].values(label))), default=None)
        self._note("the best baseline", found[4], peer, found[4] == peer)

    def _curves(self) -> None:
        drawn = {one.name: one.spec for one in self.blocks if isinstance(one, Chart)}
        for name, label in (("latency", "latency p50"), ("ttft", "TTFT p50"), ("tpot", "TPOT p50")):
            for row in drawn.get(f"run1-{name}", {"data": {"values": []}})["data"]["values"]:
                raw = self.raw[row["contender"], row["load"]]
                where = f"{name} curve, {row['contender']}, {row['load']}"
                self._near(where, row["throughput"], float(np.mean(raw.values(self.speed))))
                self._near(where, row["time_s"], float(np.mean(raw.values(label))))
