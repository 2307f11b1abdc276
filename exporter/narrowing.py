"""Changing the dtype of weights so that no value is lost without a word: overflow is refused, by name and count."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError, ExportError
from stageline.models.quantisation import is_narrow
from stageline.models.tensors import TensorEntry
from stageline.runtime import words
from stageline.runtime.bundle.graph import ir_dtype

_CHUNK_BYTES = 16 * 1024**2
_NAMED = 3  # tensors in a message
_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}


@dataclass
class _Seen:
    """What was seen of one tensor: values that were finite and no longer are, values that never were, and the largest
    magnitude among the finite ones."""

    overflown: int = 0
    not_finite: int = 0
    largest: float = 0.0


@dataclass
class Narrowing:
    """Converts the tensors of the checkpoint at `path` to `dtype` (float32, float16 or bfloat16), chunk by chunk, and
    keeps count. `check` at the end refuses what was lost."""

    path: Path
    dtype: str
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def chunks(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The tensor's data in the dtype, a few megabytes at a time."""
        for values in _stored(entry):
            yield self.converted(entry.name, values)

    def look_at(self, entry: TensorEntry) -> None:
        """Count what the tensor would lose, for tensors that another reader casts."""
        for values in _stored(entry):
            self.converted(entry.name, values)

    def converted(self, name: str, values: np.ndarray[Any, Any]) -> memoryview:
        """The bytes of (a part of) the tensor `name` in the dtype."""
        target = ir_dtype(self.dtype).numpy()
        values = np.ascontiguousarray(values)
        if values.dtype == target or values.dtype.kind in "biu":  # integers stay what they are
            return values.view(np.uint8).reshape(-1).data
        wide = values if values.dtype == np.float64 else values.astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            result = wide.astype(target)
        seen = self._seen.setdefault(name, _Seen())
        finite = np.isfinite(wide)
        magnitude = np.abs(wide, where=finite, out=np.zeros_like(wide))
        seen.largest = max(seen.largest, float(magnitude.max(initial=0)))
        seen.not_finite += int(np.count_nonzero(~finite))
        seen.overflown += int(np.count_nonzero(finite & ~np.isfinite(result)))
        return result.view(np.uint8).reshape(-1).data

    def check(self) -> list[str]:
        """What a user should know of the values that were converted.

        A value that becomes zero, or loses digits, below the dtype's normal range changes by no more than rounding
        changes the smallest number in that range. So only tensors that lie below it as a whole lose accuracy.

        Raises:
            ExportError: finite values became infinite, or a whole tensor became zero.
        """
        highest, lowest, smallest = _range(ir_dtype(self.dtype).numpy())
        over = {name: seen for name, seen in self._seen.items() if seen.overflown}
        if over:
            said = ", ".join(f"{seen.overflown} of {name} (to {seen.largest:,.6g})" for name, seen in _worst(over))
            count = words.counted(sum(seen.overflown for seen in over.values()), "value")
            raise ExportError(
                f"{self.dtype} ends at {highest:,.6g}, so {count} of {self.path} would become infinite: {said}"
                f"{_more(over)}; {self._way_out()}"
            )
        gone = {name: seen for name, seen in self._seen.items() if 0 < seen.largest <= smallest / 2}
        if gone:
            said = ", ".join(f"{name} (up to {seen.largest:.3g})" for name, seen in _worst(gone))
            raise ExportError(
                f"{self.dtype} begins at {smallest:.3g}, so all values of {said}{_more(gone)} in {self.path} would "
                f"become zero; {self._way_out()}"
            )
        notes = []
        tiny = {name: seen for name, seen in self._seen.items() if 0 < seen.largest < lowest}
        if tiny:
            names = ", ".join(name for name, _ in _worst(tiny))
            notes.append(
                f"values below {lowest:.3g} lose digits in {self.dtype}, and {names}{_more(tiny)} hold no others"
            )
        return [*notes, *self.not_finite()]

    def not_finite(self) -> list[str]:
        """A sentence on the values that were not finite before they were converted, if there were any."""
        strange = {name: seen for name, seen in self._seen.items() if seen.not_finite}
        if not strange:
            return []
        said = ", ".join(f"{seen.not_finite} in {name}" for name, seen in _worst(strange))
        return [f"the checkpoint itself holds values that are infinite or no number: {said}{_more(strange)}"]

    def _way_out(self) -> str:
        wider = _WIDER.get(self.dtype)
        return f"export with --dtype {wider}" if wider else "no --dtype holds them; the checkpoint has to be scaled"


def not_finite(checkpoint: Checkpoint) -> list[str]:
    """A sentence on the values of a safetensors checkpoint that are not finite, if there are any. Reads all of them."""
    seen = Narrowing(checkpoint.path, "float32")
    for entry in checkpoint.stored.values():
        if checkpoint.kind == "safetensors" and "float" in entry.dtype and not is_narrow(entry.dtype):
            for values in _stored(entry):
                seen.converted(entry.name, values.astype(np.float64))
    return seen.not_finite()


def _range(dtype: Any) -> tuple[float, float, float]:
    """A dtype's largest, smallest normal and smallest positive values."""
    import ml_dtypes  # NumPy itself knows no bfloat16

    limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(limits.max), float(limits.smallest_normal), float(limits.smallest_subnormal)


def _worst(seen: dict[str, _Seen]) -> list[tuple[str, _Seen]]:
    return sorted(seen.items(), key=lambda item: -item[1].largest)[:_NAMED]


def _more(seen: dict[str, _Seen]) -> str:
    return f" and of {len(seen) - _NAMED} tensors more" if len(seen) > _NAMED else ""


def _stored(entry: TensorEntry) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor's values as they are stored, flat, a few megabytes at a time."""
    for data in stored_bytes(entry):
        yield np.frombuffer(data, ir_dtype(entry.dtype).numpy())


def stored_bytes(entry: TensorEntry) -> Iterator[bytes]:
    """The tensor's bytes, a few megabytes at a time."""
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        left = entry.size_bytes
        while left:
            data = file.read(min(left, _CHUNK_BYTES))
            if not data:
                raise CheckpointError(f"{entry.file} ends inside tensor {entry.name}; download it again")
            left -= len(data)
            yield data
