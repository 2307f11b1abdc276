"""The tokens of a step: drawn by the last stage's device where it can, else here from the logits."""

from collections.abc import Sequence

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import on_host
from stageline.runtime.engines import Array
from stageline.runtime.engines.lowering.draw_graph import DONE, SETTINGS
from stageline.runtime.generation.flight import Flight
from stageline.runtime.generation.running import RunningChoice
from stageline.runtime.generation.sampling import Row, draw

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


def _rows_of(logits: Array, places: Sequence[int]) -> Array:
    """Of rows that want one token: not a copy if all do."""
    return logits[:, 0] if len(places) == len(logits) else logits[places, 0]
