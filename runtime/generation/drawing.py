"""What a step's logits say: the next tokens, drawn by the last stage's device where it can, else here, and how likely
the tokens of prompts are.
"""

from collections.abc import Sequence

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import on_host
from stageline.runtime.engines import Array
from stageline.runtime.engines.lowering.draw_graph import DONE, SETTINGS
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.flight import Flight
from stageline.runtime.generation.running import RunningChoice
from stageline.runtime.generation.sampling import Row, draw, not_finite
from stageline.runtime.generation.steps import scored

Results = Sequence[int | EngineError]


def settings_of(rows: Sequence[tuple[int, Row]], batch: int, ahead: bool) -> Array | None:
    """float32 [batch, 6]: the settings with which a device draws all tokens of a step, those of each of `rows` at its
    place; `ahead`: while the tokens before are being drawn. None if the host must draw."""
    settings = np.zeros((batch, len(SETTINGS)), np.float32)
    settings[:] = 1, 0, 1, 0, 0, 1  # greedy, where nobody asks
    for place, row in rows:
        found = row.device_settings(int(ahead))
        if found is None:
            return None
        settings[place] = found
    return settings if rows else None


def tokens_of(
    flight: Flight, places: Sequence[int], choices: Sequence[RunningChoice], ahead: Sequence[Flight]
) -> tuple[Results, Array | None]:
    """The token of each choice, whose logits are at a place of a step that has left the last stage; and their logits
    [choices, vocabulary], if they were brought here. `ahead`: the steps that compute with the device's tokens already.

    EngineError if the logits cannot be brought here from the device.
    """
    if not choices:  # a chunk of a prompt, perhaps: then there are no logits
        return [], None
    if flight.drawn is None:
        assert flight.logits is not None
        logits = _rows_of(flight.logits, places)
        return draw(logits, [choice.row for choice in choices]), logits
    results: list[int | EngineError | None] = []
    for (token, status), choice in zip(flight.drawn[places].tolist(), choices, strict=True):
        if status == DONE:
            choice.row.record_drawn(token)
        results.append(token if status == DONE else None)
    left = [number for number, result in enumerate(results) if result is None]
    if left:
        assert flight.undrawn is not None
        logits = on_host({"logits": flight.undrawn}, ["logits"])["logits"]
        found = draw(_rows_of(logits, [places[n] for n in left]), [choices[n].row for n in left])
        for number, result in zip(left, found, strict=True):
            results[number] = result
    for step in ahead:
        step.void |= {choices[number].continuation for number in left}
    return [result for result in results if result is not None], None


def scores_of(flight: Flight) -> list[tuple[Continuation, int, Array | EngineError]]:
    """Of each continuation of whose prompt a step has logits the first token that they are for, and the logits
    [tokens, vocabulary] of it and those after it; EngineError in place of numbers that are none."""
    found: list[tuple[Continuation, int, Array | EngineError]] = []
    for continuation, first, places in scored(flight.step):
        assert flight.logits is not None
        logits = flight.logits.reshape(-1, flight.logits.shape[-1])[places]
        peaks = logits.max(axis=1)
        bad = np.flatnonzero(~np.isfinite(peaks))
        error = not_finite(f"prompt token {first + bad[0]}", float(peaks[bad[0]])) if len(bad) else None
        found.append((continuation, first, logits if error is None else error))
    return found


def _rows_of(logits: Array, places: Sequence[int]) -> Array:
    """[places, vocabulary] of logits [rows, picks, vocabulary]: not a copy if all are wanted."""
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if len(places) == len(flat) else flat[places]
