"""Numbers as people read them, with their units, and times of day: for the commands and the dashboard."""

import math
from datetime import UTC, datetime

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def line(text: str) -> str:
    """A text that may be anyone's, for a terminal: in one line, and what would steer the terminal written out."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in " ".join(text.split()))


def count(value: float) -> str:
    """1234567 -> 1.23 M; three figures."""
    return _scaled(value).strip()


def size(value_bytes: float) -> str:
    """1234567 -> 1.23 MB; decimal, as everywhere in Stageline."""
    return f"{_scaled(value_bytes)}B" if abs(value_bytes) >= 1000 else f"{value_bytes:.0f} B"


def rate(value: float, unit: str) -> str:
    """1234.5, "tokens" -> 1,234 tokens/s."""
    return f"{figure(value)} {unit}/s"


def seconds(value_s: float) -> str:
    """0.0123 -> 12.3 ms; minutes from 100 s on."""
    if not math.isfinite(value_s):
        return "-"
    if value_s >= 100:
        return f"{value_s / 60:.1f} min"
    if value_s >= 1:
        return f"{figure(value_s)} s"
    return f"{figure(value_s * 1e3)} ms" if value_s >= 1e-3 or value_s == 0 else f"{figure(value_s * 1e6)} µs"


def share(value: float) -> str:
    """0.1234 -> 12.3 %."""
    return f"{100 * value:.1f} %"


def change(value: float) -> str:
    """0.1234 -> +12.3 %."""
    return f"{100 * value:+.1f} %"


def figure(value: float) -> str:
    """Three figures, without an exponent: 1234.5 -> 1,234; 12.345 -> 12.3."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def ago(then_s: float, now_s: float) -> str:
    """How long ago a time (seconds since the epoch) was."""
    passed = max(0.0, now_s - then_s)
    for unit_s, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= unit_s:
            number = int(passed // unit_s)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def clock(then_s: float) -> str:
    """A time (seconds since the epoch) as 2026-11-25 02:34 UTC."""
    return datetime.fromtimestamp(then_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def counted(number: int, noun: str) -> str:
    """1, "stage" -> 1 stage; 2 -> 2 stages."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _scaled(value: float) -> str:
    for unit, prefix in _PREFIXES:
        if abs(value) >= unit:
            return f"{figure(value / unit)} {prefix}"
    return f"{figure(value)} "
