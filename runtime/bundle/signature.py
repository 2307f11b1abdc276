"""A model's inputs and outputs, and the check of a request against them before it is queued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from stageline.models.errors import BundleError, RequestError
from stageline.runtime.bundle.manifest import (
    BATCH,
    INPUT_IDS,
    LENGTH,
    LOGITS_AT,
    NEW_LENGTHS,
    PAST_LENGTHS,
    PICKS,
    ROW_LENGTHS,
    Manifest,
    TensorSpec,
)
from stageline.runtime.devices.base import Array

_DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}  # of inputs that may be left out
_HALVES = ("float16", "bfloat16")
MOST_VALUES = 2**31 - 1
"""Of an input: kernels count with 32 bits."""


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs. `vocabulary` bounds the values of `input_ids`, `max_positions` the length of a row.

    Half-precision inputs and outputs are float32 here (NumPy has no bfloat16). `derived` are inputs of the graph that
    users do not pass: `check_inputs` computes them from the others.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    vocabulary: int | None = None
    max_positions: int | None = None
    derived: tuple[TensorSpec, ...] = ()

    def __post_init__(self) -> None:
        for spec in self.outputs:
            if spec.shape.count(BATCH) != 1:
                raise BundleError(
                    f"output {spec.name!r} has shape {_shape(spec.shape)}, without exactly one dimension {BATCH!r}: "
                    "its micro-batches cannot be joined. Export the model without this output"
                )

    @classmethod
    def of(cls, manifest: Manifest) -> "Signature":
        """The signature of a bundle's model. With caches: it takes whole rows, and returns the logits of all tokens."""
        inputs, outputs = manifest.inputs, manifest.outputs
        derived: tuple[TensorSpec, ...] = ()
        if manifest.cached:
            ids = next(spec for spec in inputs if spec.name == INPUT_IDS)
            derived = tuple(_for_all_tokens(spec) for spec in inputs if spec is not ids)
            inputs = (ids, ids.model_copy(update={"name": "attention_mask"}))
            outputs = tuple(_for_all_tokens(spec) for spec in outputs)
        return cls(inputs, outputs, manifest.vocabulary, manifest.max_positions, derived)

    @property
    def graph_inputs(self) -> tuple[TensorSpec, ...]:
        """What the stages read: `inputs`, then `derived`."""
        return self.inputs + self.derived

    def check_outputs(self, outputs: Sequence[str] | None) -> tuple[str, ...]:
        """The requested outputs in the model's order; all for None. RequestError for an unknown name."""
        known = tuple(spec.name for spec in self.outputs)
        if outputs is None:
            return known
        if not outputs:
            raise RequestError(f"no output is requested; outputs: {', '.join(known)}")
        for name in outputs:
            if name not in known:
                raise RequestError(f"unknown output {name!r}; outputs: {', '.join(known)}")
        return tuple(name for name in known if name in outputs)

    def check_inputs(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, int]]:
        """All inputs of the model in its own dtypes, and the size of each free dimension.

        A missing `attention_mask` is filled with ones, missing `token_type_ids` with zeros. Arrays that already fit are
        not copied. RequestError names the input, what is wrong with it, and what to do, in one line.
        """
        known = [spec.name for spec in self.inputs]
        for name in inputs:
            if name not in known:
                raise RequestError(f"unknown input {name!r}; inputs: {', '.join(known)}")
        sizes: dict[str, int] = {}
        given: dict[str, Array] = {}
        for spec in self.inputs:
            if spec.name in inputs:
                given[spec.name] = _cast(spec, _array(spec, inputs[spec.name]))
                _measure(spec, given[spec.name].shape, sizes)
        for dimension, size in sizes.items():
            if size == 0:
                raise RequestError(f"dimension {dimension!r} is 0: there is nothing to run; do not send empty requests")
        if self.max_positions is not None and sizes.get(LENGTH, 0) > self.max_positions:
            raise RequestError(
                f"rows are {sizes[LENGTH]} tokens long, the model can place {self.max_positions}; truncate them"
            )
        if INPUT_IDS in given and self.vocabulary is not None:
            _check_ids(given[INPUT_IDS], self.vocabulary)
        filled = {spec.name: given[spec.name] if spec.name in given else _filled(spec, sizes) for spec in self.inputs}
        if self.derived:
            rows = _whole_rows(filled["attention_mask"])
            filled.update({spec.name: rows[spec.name] for spec in self.derived})
        return filled, sizes


def _for_all_tokens(spec: TensorSpec) -> TensorSpec:
    return spec.model_copy(update={"shape": tuple(LENGTH if size == PICKS else size for size in spec.shape)})


def _whole_rows(mask: Array) -> dict[str, Array]:
    """The derived inputs for whole rows: nothing is in the cache, and all logits are requested."""
    rows, length = mask.shape
    new: Array = (mask != 0).sum(axis=1)
    if ((mask != 0) != (np.arange(length) < new[:, None])).any() or not new.all():
        raise RequestError(
            "attention_mask masks a token before others, or a whole row; pad rows on the right, keep one token in each"
        )
    return {
        PAST_LENGTHS: np.zeros(rows, np.int64),
        NEW_LENGTHS: new.astype(np.int64),
        ROW_LENGTHS: new.astype(np.int64),
        LOGITS_AT: np.tile(np.arange(length), (rows, 1)),
    }


def _array(spec: TensorSpec, value: object) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of different lengths
        raise RequestError(f"input {spec.name!r} is not an array: its rows differ in length; pad them to one") from None
    if array.size > MOST_VALUES:
        raise RequestError(
            f"input {spec.name!r} has {array.size} values, at most {MOST_VALUES} are taken; send fewer rows"
        )
    return array


def _cast(spec: TensorSpec, array: Array) -> Array:
    """The array in the dtype of the spec, if that changes no value."""
    wanted = np.dtype("float32" if spec.dtype in _HALVES else spec.dtype)
    if array.dtype == wanted:
        return array
    if np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted)
    if wanted.kind in "iu" and array.dtype.kind in "iu":
        limits = np.iinfo(wanted)
        if array.size == 0 or (limits.min <= array.min() and array.max() <= limits.max):
            return array.astype(wanted)
        raise RequestError(f"input {spec.name!r} has values outside {wanted} ({array.min()} to {array.max()})")
    raise RequestError(
        f"input {spec.name!r} has dtype {array.dtype}, the model wants {wanted}; convert it with .astype('{wanted}')"
    )


def _measure(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Add the size of each free dimension to `sizes`. RequestError if the shape contradicts the spec or `sizes`."""
    message = f"input {spec.name!r} has shape {_shape(shape)}, the model wants {_shape(spec.shape)}"
    if len(shape) != len(spec.shape):
        hint = "; give a single row as array[None]" if len(shape) + 1 == len(spec.shape) else ""
        raise RequestError(f"{message}: {len(shape)} dimensions instead of {len(spec.shape)}{hint}")
    for size, wanted in zip(shape, spec.shape, strict=True):
        expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
        if size != expected:
            source = f"{wanted!r} is {expected} elsewhere" if isinstance(wanted, str) else f"{expected} is fixed"
            raise RequestError(f"{message}: {size} does not fit, {source}; pad or cut the rows to one size")


def _check_ids(ids: Array, vocabulary: int) -> None:
    if ids.min() >= 0 and ids.max() < vocabulary:
        return
    row, position = np.argwhere((ids < 0) | (ids >= vocabulary))[0]
    raise RequestError(
        f"input_ids row {row}, position {position} is {ids[row, position]}, outside the vocabulary "
        f"(0 to {vocabulary - 1}); tokenize with the tokenizer of this bundle"
    )


def _filled(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """The default of a missing input. RequestError if it has none."""
    try:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return np.full(shape, _DEFAULTS[spec.name], spec.dtype)
    except KeyError:
        raise RequestError(
            f"input {spec.name!r} is missing; the model wants {spec.dtype} {_shape(spec.shape)}"
        ) from None


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
