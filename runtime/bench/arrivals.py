"""When requests arrive in an open loop: constant, Poisson, gamma, a ramp, bursts at a rate, or a trace from a file."""

import itertools
import json
import math
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stageline.models.errors import RequestError
from stageline.runtime.workload import poisson

PATTERNS = "poisson, constant, gamma:B, bursts:N, ramp"
"""The patterns that `pattern` knows, as messages and help name them."""


def pattern(text: str) -> str:
    """Check the name of a pattern and return it in its one form (`gamma:0.50` as `gamma:0.5`).

    `poisson`: independent arrivals. `constant`: evenly spaced. `gamma:B`: gaps from a gamma distribution of shape B,
    vLLM's burstiness; their coefficient of variation is 1 / sqrt(B), so 1 is Poisson and less is burstier. `bursts:N`:
    N at once, evenly spaced. `ramp`: Poisson with a rate that rises linearly from 0. RequestError for anything else.
    """
    match = re.fullmatch(r"(poisson|constant|ramp)|(gamma):(\d+(?:\.\d+)?)|(bursts):(\d+)", text.strip())
    if match is None or (match[3] and float(match[3]) <= 0) or (match[5] and int(match[5]) < 1):
        raise RequestError(f"{text!r} is not a pattern of arrivals; give one of {PATTERNS}")
    if match[1]:
        return match[1]
    return f"gamma:{float(match[3]):g}" if match[2] else f"bursts:{int(match[5])}"


def arrive(shape: str, rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in seconds, ascending, of `pattern` `shape` at `rate_per_s`.

    Their number is fixed, so that a repeat is not lighter by chance: `rate_per_s * seconds` rounded up, and half of it
    for a ramp, whose rate is reached at its end. Another rate with the same seed stretches the same pattern.
    """
    kind, _, value = shape.partition(":")
    count = max(1, math.ceil(rate_per_s * seconds / (2 if kind == "ramp" else 1)))
    if kind == "constant":
        return [number / rate_per_s for number in range(count)]
    if kind == "bursts":
        size = int(value)
        return [number // size * size / rate_per_s for number in range(count)]
    if kind == "gamma":
        draw, burstiness = random.Random(seed), float(value)
        gaps = (draw.gammavariate(burstiness, 1 / burstiness) / rate_per_s for _ in range(count))
        return list(itertools.accumulate(gaps))
    if kind == "ramp":
        # The n-th arrival of a unit Poisson process, put where the integral of the rate, rate t^2 / (2 seconds), is it.
        return [math.sqrt(2 * seconds * unit / rate_per_s) for unit in poisson(1.0, count, seed)]
    return poisson(rate_per_s, count, seed)


@dataclass(frozen=True)
class Trace:
    """Recorded arrivals: `times_s` ascending from 0, and the tokens read and drawn by each, if the file says so."""

    times_s: tuple[float, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ()


def read_trace(file: Path, time_scale: float) -> Trace:
    """Read arrivals from `file`, their times multiplied by `time_scale`; RequestError names a wrong line and field.

    One arrival a line, in any order: a time in seconds, or {"timestamp": ..., "input_length": ..., "output_length":
    ...}, as Mooncake's traces have it (in milliseconds: a `time_scale` of 0.001).
    """
    if not 0 < time_scale < math.inf:
        raise RequestError(f"time scale {time_scale:g} is not above 0; give a factor such as 0.001")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(
            f"arrivals {file} cannot be read ({reason}); give a file of seconds, one per line"
        ) from error
    found = [_arrival(line, f"arrivals {file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise RequestError(f"arrivals {file} holds no times; give a file of seconds, one per line")
    if len({lengths is None for _, lengths in found}) > 1:
        raise RequestError(f"arrivals {file} has lengths in some lines only; give them in all or in none")
    found.sort(key=lambda one: one[0])
    first = found[0][0]
    return Trace(
        tuple((at - first) * time_scale for at, _ in found),
        tuple(lengths for _, lengths in found if lengths is not None),
    )


def _arrival(line: str, where: str) -> tuple[float, tuple[int, int] | None]:
    with suppress(ValueError):
        return _seconds(float(line), where), None
    try:
        data = json.loads(line)
        assert isinstance(data, dict)
    except (ValueError, RecursionError, AssertionError) as error:
        raise RequestError(f"{where}: {line[:40]!r} is neither a time in seconds nor a JSON object") from error
    for name in ("timestamp", "input_length", "output_length"):
        if name not in data:
            raise RequestError(f"{where} has no {name}; give timestamp, input_length and output_length")
    lengths = [data[name] for name in ("input_length", "output_length")]
    for name, length in zip(("input_length", "output_length"), lengths, strict=True):
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length < 2**31:
            raise RequestError(f"{where}: {name} is {length!r}; give a whole number from 1")
    return _seconds(data["timestamp"], where), (lengths[0], lengths[1])


def _seconds(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise RequestError(f"{where}: the time is {str(value)[:40]!r}; give a number of seconds")
    return float(value)
