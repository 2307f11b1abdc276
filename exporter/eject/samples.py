"""Samples of every stage: inputs drawn at random, and the outputs that ONNX Runtime gives for them on CPU cores.

A stage's inputs are the outputs of the stages before it for the same sample. The outputs are those of the engine that
serves the bundle on CPUs, which lowers caches in another way than an ejected model: the two are independent.

A model without caches has two samples of rows of several lengths. One with caches has a sample of whole rows without a
past, and one that continues rows of several lengths. Neither has padding: what is computed there is not defined.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from stageline.exporter.verify.random_inputs import drawn_inputs, random_inputs
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import (
    INPUT_IDS,
    LOGITS_AT,
    NEW_LENGTHS,
    PAST_LENGTHS,
    ROW_LENGTHS,
    CacheSpec,
    Stage,
)
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores
from stageline.runtime.engines import Array, CacheSize, Engine, StageFile, engine_factory
from stageline.runtime.engines.lowering.cache_names import past_names, present_names

_ROWS, _PROMPT, _CHUNK = 3, 16, 4
_Arrays = dict[str, Array]


@dataclass(frozen=True)
class Sample:
    """A stage's inputs and outputs by their names in the ejected model, caches included."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class Sampler:
    """Draws a model's inputs from a seed, and carries each sample's values from stage to stage. Caches hold `capacity`
    tokens, at least 2."""

    def __init__(self, bundle: Bundle, capacity: int, seed: int) -> None:
        self._bundle, self._capacity = bundle, capacity
        manifest, rng = bundle.manifest, np.random.default_rng(seed)
        check = Signature.of(manifest).check_inputs
        if not manifest.cached:
            self._values = [dict(check(random_inputs(manifest, seed + place))[0]) for place in range(2)]
            return
        self._chunk = min(_CHUNK, capacity // 2)
        prompt = min(_PROMPT, capacity - self._chunk)
        lengths = np.array([prompt, *rng.integers(1, prompt + 1, _ROWS - 1)])
        whole, before = (
            dict(check(drawn_inputs(manifest, rng, each))[0]) for each in (np.full(_ROWS, prompt), lengths)
        )
        drawn = drawn_inputs(manifest, rng, np.full(_ROWS, self._chunk))
        after = {
            INPUT_IDS: drawn[INPUT_IDS],
            PAST_LENGTHS: lengths,
            NEW_LENGTHS: np.full(_ROWS, self._chunk),
            ROW_LENGTHS: lengths + self._chunk,
            LOGITS_AT: np.tile(np.arange(self._chunk), (_ROWS, 1)),
        }
        self._values = [whole, before, after]

    def samples(self, number: int) -> list[Sample]:
        """Those of stage `number`. Ask for the stages in order."""
        stage = self._bundle.manifest.stages[number]
        file = StageFile(number, self._bundle.path / stage.file, self._bundle.path, stage.caches)
        size = CacheSize(_ROWS, self._capacity, "float32") if stage.caches else None
        engine = engine_factory("onnxruntime")(file, CpuDevice(allowed_cores()), size, self._bundle.manifest.exact)
        try:
            found = _with_caches(engine, stage, self._values) if stage.caches else _plain(engine, stage, self._values)
        finally:
            engine.close()
        for values, sample in zip(self._values, found, strict=True):
            values.update({spec.name: sample.outputs[spec.name] for spec in stage.outputs})
        return [found[0], found[-1]]


def _plain(engine: Engine, stage: Stage, values: list[_Arrays]) -> list[Sample]:
    names = [spec.name for spec in stage.outputs]
    return [Sample(_given(stage, each), on_host(engine.run(each, names), names)) for each in values]


def _with_caches(engine: Engine, stage: Stage, values: list[_Arrays]) -> list[Sample]:
    """The samples of whole rows, of rows that are continued, and of their continuation."""
    names = [spec.name for spec in stage.outputs]
    empty = {name: np.zeros_like(array) for name, array in engine.give_caches().items()}
    past, found = empty, []
    for place, each in enumerate(values):
        held = empty if place < 2 else past
        engine.take_caches({name: array.copy() for name, array in held.items()})
        outputs = on_host(engine.step(each, names, 0), names)
        after = each[PAST_LENGTHS] + each[NEW_LENGTHS]
        caches = engine.give_caches()
        past = {name: _up_to(after, array) for name, array in on_host(caches, list(caches)).items()}
        found.append(
            Sample(
                {**_given(stage, each), **_named(stage.caches, past_names, held)},
                {**outputs, **_named(stage.caches, present_names, past)},
            )
        )
    return found


def _given(stage: Stage, values: Mapping[str, Array]) -> _Arrays:
    return {spec.name: values[spec.name] for spec in stage.inputs}


def _up_to(lengths: Array, cache: Array) -> Array:
    """A cache [rows, heads, capacity, size] with zeros behind each row's tokens: engines differ in what they leave
    there."""
    real = np.arange(cache.shape[2]) < lengths[:, None]
    return np.where(real[:, None, :, None], cache, 0)


def _named(
    caches: tuple[CacheSpec, ...], names: Callable[[str], tuple[str, str]], held: Mapping[str, Array]
) -> _Arrays:
    """Caches by `names`, without the padding that ONNX Runtime's have in each head."""
    return {
        name: held[past][..., :size]
        for spec in caches
        for name, past, size in zip(
            names(spec.name), past_names(spec.name), (spec.key_size, spec.value_size), strict=True
        )
    }
