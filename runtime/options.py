"""How a pipeline is opened: one frozen choice, checked once, for the library, the commands and the dashboard."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, get_args

from stageline.models.errors import RequestError
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.engines import ON_GPUS, WITH_BLOCKS, CacheDtype, CacheSize, WeightDtype

RebalanceMode = Literal["off", "advise", "auto"]
DRAFTS = ("off", "lookup")
"""What `draft` can be, beside a bundle's folder."""
MOST_CHUNK = 512  # tokens: of a prompt per step, where the option leaves it to the devices
MIN_TOKENS = 64  # of all caches together
DEFAULT_CAPACITY = 2048  # tokens a cache slot holds, if the model can place as many
_COUNTS = ("threads", "queue", "micro_batch", "slots", "capacity", "cache_memory", "prefix_cache", "prefill_chunk")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "quantise": (*get_args(WeightDtype), None),
    "cache_dtype": (*get_args(CacheDtype), None),
    "rebalance": get_args(RebalanceMode),
}


class OpenKeywords(TypedDict, total=False):
    """The fields of `PipelineOptions` as keywords of `Pipeline.open`."""

    engine: str
    devices: Sequence[str] | None
    threads: int | None
    queue: int
    micro_batch: int | None
    quantise: WeightDtype | None
    slots: int
    capacity: int | None
    cache_dtype: CacheDtype | None
    cache_memory: int | None
    prefix_cache: int | None
    prefill_chunk: int | None
    rebalance: RebalanceMode
    draft: str
    tpot_target: float | None
    key_file: str | Path | None
    isolate: bool


@dataclass(frozen=True)
class PipelineOptions:
    """The options of a pipeline. RequestError for a value out of its range."""

    engine: str = "onnxruntime"
    devices: Sequence[str] | None = None
    """Devices of the stages, in turn ("cpu", "cuda:0", "tcp://node1:7070", ...). None: the engine's own, the CPU or the
    first GPU. Stages on "cpu" beside GPUs run in onnxruntime; docs/how-to/machines.md has those on other machines."""
    threads: int | None = None
    """CPU cores that the stages share. None: all that this process may use."""
    queue: int = 64
    """Max unfinished requests, batches and generation each. With fewer than two per stage, stages idle."""
    micro_batch: int | None = None
    """Max rows of a micro-batch. None: chosen from the batch and the number of stages."""
    quantise: WeightDtype | None = None
    """Quantise the weights of matrix products on opening ("int8", "int4"): faster and smaller, and less exact. Those
    that the checkpoint has quantised stay as they are, unless it is "float32": then they are unpacked."""
    slots: int = 8
    """Continuations that run at a time; this and the next three options are for models that generate."""
    capacity: int | None = None
    """Tokens of a prompt and its continuation together. None: as many as the model can place, at most 2048."""
    cache_dtype: CacheDtype | None = None
    """What the caches hold. None: what the engine prefers."""
    cache_memory: int | None = None
    """Max bytes of the caches of all stages. With openvino, rows have parts of it as they grow, and wait for each other
    where it is full; with the other engines each slot reserves its capacity. None: all slots can be full."""
    prefix_cache: int | None = None
    """Max bytes beside these of what rows held that have ended, for prompts that begin like them, so that conversations
    that come back are not computed again. With openvino the caches are larger by so much; with onnxruntime, by whole
    rows of the capacity. None: only as long as nothing else wants the place."""
    prefill_chunk: int | None = None
    """Max tokens of a prompt per step, so that a long prompt does not hold up the others. None: as many as keep the
    devices busy, 128 on CPUs and 512 on GPUs."""
    rebalance: RebalanceMode = "off"
    """Measure the running stages, and report a better cut in `stats()` and the log ("advise") or switch to it
    ("auto"); docs/how-to/recut.md."""
    draft: str = "off"
    """Where drafts of the next tokens come from, which steps compute along where that gives more tokens a second: the
    text so far ("lookup"), or a small model of the same vocabulary, the folder of its bundle. The tokens are the same;
    for stages on CPUs. docs/how-to/drafts.md"""
    tpot_target: float | None = None
    """Seconds that a sequence may wait for its next token while prompts of others are read: a step reads as many of
    their tokens as its measured time allows, and 16 at least. For stages on CPUs. None: `prefill_chunk` tokens."""
    key_file: str | Path | None = None
    """A file with the key of the stage hosts, for devices such as "tcp://node1:7070"."""
    isolate: bool = False
    """Run each stage in a process of its own: one that crashes is started again, and no request is lost."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")
        if self.tpot_target is not None and not 0 < self.tpot_target < math.inf:
            raise RequestError(f"tpot_target is {self.tpot_target}; give seconds above 0")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise RequestError(f"{name} is {value!r}; it must be one of {', '.join(filter(None, choices))}")
        if self.draft not in DRAFTS and not Path(self.draft).is_dir():
            raise RequestError(f"draft is {self.draft!r}; it must be {', '.join(DRAFTS)} or the folder of a bundle")
        object.__setattr__(self, "devices", tuple(self.devices) if self.devices else None)

    def cache_size(self, manifest: Manifest) -> CacheSize | None:
        """The caches of a bundle's stages; None for a model without. RequestError if the model places fewer tokens, or
        they do not fit their memory."""
        max_positions = manifest.max_positions
        if self.capacity is not None and max_positions is not None and self.capacity > max_positions:
            raise RequestError(f"capacity is {self.capacity}, the model can place {max_positions} tokens; lower it")
        if not manifest.cached:
            return None
        capacity = self.capacity or min(max_positions or DEFAULT_CAPACITY, DEFAULT_CAPACITY)
        chunk = min(capacity, self.prefill_chunk or MOST_CHUNK)
        size = CacheSize(self.slots, capacity, self.cache_dtype, chunk=chunk, kept=self._kept(manifest, capacity))
        if self.cache_memory is None:
            return size
        token_bytes = self._token_bytes(manifest)
        tokens = self.cache_memory // token_bytes
        if self.engine not in WITH_BLOCKS:
            if self.slots * capacity > tokens:
                raise RequestError(
                    f"cache_memory is {self.cache_memory:,} bytes; {self.slots} slots of {capacity} tokens take "
                    f"{self.slots * capacity * token_bytes:,}: lower slots or capacity"
                )
            return size
        if tokens < (self.capacity or MIN_TOKENS):
            raise RequestError(
                f"cache_memory is {self.cache_memory:,} bytes, which hold {tokens} tokens; a row of "
                f"{self.capacity or MIN_TOKENS} takes {(self.capacity or MIN_TOKENS) * token_bytes:,}"
            )
        return replace(size, capacity=min(capacity, tokens), tokens=tokens)

    def _kept(self, manifest: Manifest, capacity: int) -> int:
        """Tokens of the prefix cache."""
        if self.prefix_cache is None:
            return 0
        if self.engine in ON_GPUS:
            raise RequestError(f"prefix_cache is for engines on CPUs; leave it out for {self.engine}")
        token_bytes = self._token_bytes(manifest)
        tokens, least = self.prefix_cache // token_bytes, 1 if self.engine in WITH_BLOCKS else capacity
        if tokens < least:
            raise RequestError(
                f"prefix_cache is {self.prefix_cache:,} bytes; the least that {self.engine} keeps, {least} tokens, "
                f"takes {least * token_bytes:,}: give more"
            )
        return tokens

    def _token_bytes(self, manifest: Manifest) -> int:
        """Bytes of a token in all caches."""
        values = sum(spec.heads * (spec.key_size + spec.value_size) for s in manifest.stages for spec in s.caches)
        dtype = self.cache_dtype or ("float16" if self.engine in ON_GPUS else "float32")
        return values * {"float16": 2, "float32": 4}[dtype]
