"""An engine by proxy: what the pipeline asks of a stage goes to the stage's host, and values come back on their way."""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from stageline.models.errors import EngineError
from stageline.runtime.cluster.messages import Copy, Kind, Open, Opened, Run, Step
from stageline.runtime.devices.base import Device, on_host
from stageline.runtime.devices.remote.arrays import RemoteArray
from stageline.runtime.devices.remote.device import RemoteDevice
from stageline.runtime.engines.base import Array, PackedRows, Value
from stageline.runtime.validation import first_error


class RemoteEngine:
    """A stage on a host. Keeps the promises of `Engine`; errors come with the values of a step."""

    def __init__(self, asked: Open, device: Device) -> None:
        """Ask the host of `device` to open a stage. EngineError if it does not, or does not answer."""
        assert isinstance(device, RemoteDevice)
        self._device = device
        answer = device.ask(Kind.OPEN, asked.model_dump()).result()
        try:
            opened = Opened.model_validate(answer.message)
        except ValidationError as error:
            raise EngineError(f"{device.name} answered what is not valid ({first_error(error)})") from error
        self.input_names, self.output_names = opened.input_names, opened.output_names
        self.max_rows, self.packs, self.block_tokens = opened.max_rows, opened.packs, opened.block_tokens

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Value]:
        """See `Engine.run`."""
        arrays = on_host(inputs, self.input_names)
        asked = Run(inputs=tuple(arrays), outputs=tuple(outputs))
        return self._asked(Kind.RUN, asked, list(arrays.values()))

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Value]:
        """See `Engine.step`."""
        arrays = on_host(inputs, self.input_names)
        first = rows if isinstance(rows, int) else None
        asked = Step(inputs=tuple(arrays), outputs=tuple(outputs), first=first)
        sent = list(arrays.values())
        if isinstance(rows, PackedRows):
            sent += [rows.slots, rows.past, rows.counts, *([] if rows.blocks is None else [rows.blocks])]
        return self._asked(Kind.STEP, asked, sent)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See `Engine.copy_slot`. The host does it before the next step, whose values have its error."""
        self._device.tell(Kind.COPY, Copy(source=source, target=target, tokens=tokens).model_dump())

    def give_caches(self) -> Mapping[str, Value]:
        """See `Engine.give_caches`; hosts keep theirs."""
        raise EngineError(f"the caches on {self._device.name} stay there; open the pipeline again to cut it elsewhere")

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`; hosts take none."""
        raise EngineError(f"{self._device.name} takes no caches; open the pipeline again to cut it elsewhere")

    def close(self) -> None:
        """See `Engine.close`: the device's connection holds the stage."""

    def _asked(self, kind: Kind, asked: Run, arrays: Sequence[Array]) -> dict[str, Value]:
        answer = self._device.ask(kind, asked.model_dump(), arrays)
        return {name: RemoteArray(answer, place) for place, name in enumerate(asked.outputs)}
