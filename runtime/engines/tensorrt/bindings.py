"""Bindings of an engine: execution contexts with all their buffers, each for one key of shapes and cache rows.

A binding's buffers are its own: inputs, outputs, and the addresses of the cache rows that the step uses. While anyone
holds an output, the binding is leased and not reused. So there is one for each micro-batch in flight, made while the
pipeline warms up.

    new ──> leased ──the last output goes──> free ──the same key──> leased: nothing to do, its graph is replayed
                                                  ──another key──> leased: bound again, its graph dropped

A captured graph holds the state of its context, so there is a context for each key that comes again. What comes once
(the odd end of a prompt) takes the place of what came once.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Array
from stageline.runtime.devices.cuda.arrays import size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.graphs import Replay
from stageline.runtime.devices.cuda.launch import packed
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.tensorrt.loading import Loaded

_KEPT = 16  # bindings of different keys; more if leased at the same time


@dataclass(frozen=True)
class Key:
    """What a binding is bound for: the profile's number, the shape of each input, which of them come from the host, the
    addresses of those that are read where another stage left them, and of each cache, and the rows of the caches."""

    profile: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    host: tuple[str, ...]
    here: tuple[tuple[str, int], ...]
    caches: tuple[tuple[str, int], ...]
    rows: int


@dataclass(eq=False)
class Binding:
    """An execution context and what it is bound to. `key` is None while it is incomplete. Inputs from the host lie in
    `packed`, at their `offsets`, so that one upload brings them all. Those that are not read where they are have each a
    buffer of their own, in `inputs`."""

    context: Any
    replay: Replay
    packed: Buffer
    key: Key | None = None
    offsets: Mapping[str, int] = field(default_factory=dict)
    inputs: dict[str, Buffer] = field(default_factory=dict)
    outputs: dict[str, Buffer] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Lease:
    """Held by the outputs of a run; once the last of them is gone, the binding is free. `rows`: how many the outputs
    have, those that were added included."""

    __slots__ = ("__weakref__", "rows")

    def __init__(self, rows: int) -> None:
        self.rows = rows


class Bindings:
    """The bindings of one engine, used by the stage's worker. Owns contexts, buffers and graphs until `close()`."""

    def __init__(
        self,
        device: CudaDevice,
        loaded: Loaded,
        dtypes: Mapping[str, np.dtype[Any]],
        outputs: tuple[str, ...],
        cache_shapes: Mapping[str, tuple[int, int, int]],
        presents: Mapping[str, str],
        weights: Mapping[str, Buffer],
    ) -> None:
        """`cache_shapes`: of a row of each cache. `presents`: cache -> the output at the same address. `weights`:
        further inputs, whose buffers stay the same. CudaError if there is no memory."""
        self._device, self._loaded, self._dtypes, self._outputs = device, loaded, dtypes, outputs
        self._cache_shapes, self._presents, self._weights = cache_shapes, presents, weights
        self._scratch = device.gpu.memory.take(loaded.scratch_bytes)
        self._all: list[Binding] = []
        self._free: list[Binding] = []  # those of them that are not leased, the last used at the end

    def take(self, key: Key, host: Mapping[str, Array]) -> Binding:
        """A free binding for `key`, whose inputs from the host have the sizes of `host`. EngineError if TensorRT
        refuses it, CudaError if there is no memory."""
        for number, binding in enumerate(self._free):
            if binding.key == key:
                return self._free.pop(number)
        if len(self._free) >= _KEPT:
            # The least recently used of those without a graph; if all have one, of all.
            number = next((n for n, one in enumerate(self._free) if not one.replay.captured), 0)
            binding = self._free.pop(number)
        else:
            binding = Binding(
                self._loaded.context(self._scratch.address),
                Replay(self._device.gpu.driver, self._device.stream),
                self._device.gpu.memory.take(1),
            )
            self._all.append(binding)
        try:
            self._bind(binding, key, host)
        except (EngineError, CudaError):
            self._free.insert(0, binding)
            raise
        return binding

    def lease(self, binding: Binding, rows: int) -> Lease:
        """The binding is free again when the returned object is gone."""
        lease = Lease(rows)
        weakref.finalize(lease, self._free.append, binding).atexit = False
        return lease

    def close(self) -> None:
        """Drop graphs and contexts, leased ones too, after all work is done. Outputs that are held keep their own
        buffers. CudaError or EngineError if the GPU is lost; everything is let go all the same."""
        bindings, self._all = self._all, []
        self._free.clear()
        try:
            for binding in bindings:
                binding.replay.close()
        finally:
            for binding in bindings:
                binding.context, binding.inputs, binding.outputs = None, {}, {}

    def _bind(self, binding: Binding, key: Key, host: Mapping[str, Array]) -> None:
        context, stream = binding.context, self._device.stream
        self._loaded.forget_errors()
        binding.key = None
        place = key.profile
        if context.active_optimization_profile != place and not context.set_optimization_profile_async(place, stream):
            raise self._loaded.refused(f"refused its profile {place}")
        binding.offsets, packed_bytes = packed(host)
        if binding.packed.size_bytes < packed_bytes:
            binding.packed = self._device.gpu.memory.take(packed_bytes)
        placed = {name: binding.packed.address + offset for name, offset in binding.offsets.items()} | dict(key.here)
        for name, shape in key.shapes:
            self._set_shape(context, name, shape)
            if name in placed:
                binding.inputs.pop(name, None)
                self._set_address(context, name, placed[name])
                continue
            size = size_bytes(shape, self._dtypes[name])
            if name not in binding.inputs or binding.inputs[name].size_bytes < size:
                binding.inputs[name] = self._device.zeroed(size)  # rows that a run does not fill are finite, and valid
            self._set_address(context, name, binding.inputs[name].address)
        for name, address in key.caches:
            self._set_shape(context, name, (key.rows, *self._cache_shapes[name]))
            self._set_address(context, name, address)
            self._set_address(context, self._presents[name], address)
        for name, buffer in self._weights.items():
            self._set_address(context, name, buffer.address)
        missing = context.infer_shapes()
        if missing:
            raise self._loaded.refused(f"does not know the shapes that follow from {', '.join(missing)}")
        for name in self._outputs:
            binding.shapes[name] = tuple(context.get_tensor_shape(name))
            size = size_bytes(binding.shapes[name], self._dtypes[name])
            if name not in binding.outputs or binding.outputs[name].size_bytes < size:
                binding.outputs[name] = self._device.gpu.memory.take(size)
            self._set_address(context, name, binding.outputs[name].address)
        binding.key = key

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            raise self._loaded.refused(f"refused {name} of shape {list(shape)}")

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._loaded.refused(f"refused an address for {name}")
