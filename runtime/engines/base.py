"""What runs one stage: the contract that the pipeline knows and every engine keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from stageline.runtime.bundle.manifest import CacheSpec
from stageline.runtime.devices.base import Array, Device, Value

CacheDtype = Literal["float32", "float16"]
WeightDtype = Literal["int4", "int8", "float32"]
__all__ = [
    "Array",
    "CacheDtype",
    "CacheSize",
    "Device",
    "Engine",
    "EngineFactory",
    "PackedRows",
    "Sampler",
    "StageFile",
    "Value",
    "WeightDtype",
]


class Engine(Protocol):
    """One stage, compiled and open. It belongs to the thread that opened it: that thread runs it and closes it.

    Promises: an input is read, never written, and not kept after `run` returns; an output is a new array that the
    caller owns. On a CPU arrays go in and come out; an engine on a GPU takes arrays and values of any device, and
    returns values on its own, before they are computed. A half-precision value (float16, bfloat16) is float32 in host
    memory. Engines check nothing: the pipeline has checked names, dtypes and shapes before.
    """

    @property
    def input_names(self) -> tuple[str, ...]:
        """All names that `run` needs."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names that `run` can compute."""
        ...

    @property
    def max_rows(self) -> int | None:
        """The most rows of a batch, for an engine that was built for no more; None: any."""
        ...

    @property
    def packs(self) -> bool:
        """Whether `step` takes packed tokens. The pipeline packs the steps of stages that all do."""
        ...

    @property
    def block_tokens(self) -> int | None:
        """Tokens of a block, if its caches are blocks that any row may have; None: each slot has a row to itself. An
        engine with blocks packs."""
        ...

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> Mapping[str, Value]:
        """The named outputs of the stage for these inputs. Names in `inputs` that the stage does not read are ignored.

        A stage with caches runs as if every row had an empty cache of its own, which is discarded afterwards.
        Raises EngineError, naming the stage, if the backend fails.
        """
        ...

    def step(
        self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: "int | PackedRows"
    ) -> Mapping[str, Value]:
        """Like `run`, with the rows of the batch in cache slots `rows` and on, which grow by their new tokens. Or on
        the new tokens of packed rows alone, for an engine that packs.

        The inputs of a range of slots hold `past_lengths` and `new_lengths` [rows]; the past and the padded length of
        every row together fit the capacity. Of packed rows each token is a row of length 1 in the inputs and results:
        `past_lengths` [tokens] is its place in its row, `new_lengths` [tokens] is 1, and `logits_at` [picks, 1] says
        which of all tokens have their logits computed, [picks, 1, vocabulary].

        Only for an engine opened with a `CacheSize`.
        """
        ...

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of cache slot `source` into slot `target`."""
        ...

    def give_caches(self) -> Mapping[str, Value]:
        """Hand over the caches by name, with their contents. The engine cannot `step` until it takes some back."""
        ...

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """Continue with those of `caches` that the stage has, in place of its own: they come from engines of the same
        kind that were opened with the same `CacheSize`. Caches already on the engine's device are not copied.

        EngineError if one of the stage's is missing.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. May be called again."""
        ...


@dataclass(frozen=True)
class PackedRows:
    """The rows of packed tokens, int64 [rows] each: the cache slot of each, the tokens that it holds, and how many new
    ones there are, at least one. No slot comes twice. Where all engines' caches are blocks, `blocks` int32 are those of
    the rows, one row after the other, as many as its tokens fill with the new ones; else None."""

    slots: Array
    past: Array
    counts: Array
    blocks: Array | None = None


@dataclass(frozen=True)
class StageFile:
    """A stage on disk. `file` is its ONNX graph; the graph's external data locations are relative to `folder`."""

    number: int
    file: Path
    folder: Path
    caches: tuple[CacheSpec, ...] = ()


@dataclass(frozen=True)
class CacheSize:
    """The size of each cache of a stage: `slots` rows of at most `capacity` tokens, in `dtype` (None: the engine's
    preference), and at most `tokens` in all where caches are blocks (None: as many as fit). Packed steps, if there are
    any, have at most `chunk` new tokens of a row. There is room for `kept` tokens more, of rows that have ended."""

    slots: int
    capacity: int
    dtype: CacheDtype | None = None
    tokens: int | None = None
    chunk: int = 0
    kept: int = 0

    @property
    def rows(self) -> int:
        """Rows in all where caches are not blocks: those of the slots, and of what is kept."""
        return self.slots + self.kept // self.capacity

    def blocks(self, size: int) -> int:
        """How many blocks of `size` tokens that is, where caches are blocks; a row of the capacity fits."""
        a_row = -(-self.capacity // size)
        most = self.slots * a_row
        used = most if self.tokens is None else max(a_row, min(most, self.tokens // size))
        return used + self.kept // size


class Sampler(Protocol):
    """Draws tokens where the last stage has its logits. It belongs to the thread of that stage's engine."""

    def draw(self, logits: Value, settings: Array) -> tuple[Value, Value]:
        """The next token of each row, and whether the device could draw it, before they are computed.

        Args:
            logits: float32 [rows, 1, vocabulary].
            settings: float32 [rows, 6], the columns of `lowering.draw_graph.SETTINGS`.

        Returns:
            int64 [rows, 1], the tokens, and int64 [rows, 2], the tokens with their status (`lowering.draw_graph`).
        """
        ...

    def close(self) -> None:
        """Free what it holds. May be called again."""
        ...


class EngineFactory(Protocol):
    """Opens a stage on the given device, on the thread that will run it. With a `CacheSize` its caches are allocated
    once, here; without, it cannot `step`. `quantise`: the type that the weights of matrix products are quantised to,
    None: not at all. Those that the checkpoint has quantised stay as they are; "float32" unpacks them."""

    def __call__(
        self,
        stage: StageFile,
        device: Device,
        cache: CacheSize | None = None,
        quantise: WeightDtype | None = None,
    ) -> Engine: ...
