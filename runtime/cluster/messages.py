"""What a pipeline and a stage's host say to each other: the kinds of frames, and the JSON of each.

The host answers each `OPEN`, `RUN` and `STEP`, in the order in which they came, with `OPENED`, `DONE` or `FAILED`; it
answers a `COPY` that failed with the next of them.
"""

from enum import IntEnum
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import Field
from stageline.runtime.validation import Data

Count = Annotated[int, Field(ge=0, lt=2**31)]
Names = tuple[str, ...]


class Kind(IntEnum):
    """Of a frame; `wire.BEAT` is 0."""

    WELCOME = 1
    OPEN = 2
    OPENED = 3
    RUN = 4
    STEP = 5
    COPY = 6
    DONE = 7
    FAILED = 8


class Welcome(Data):
    """The host's device, once who connected has proved that it knows the key."""

    device: str
    step_tokens: Count


class StageOptions(Data):
    """The pipeline's options on which a stage depends; who opens it checks them."""

    engine: str
    quantise: str | None
    slots: Count
    capacity: int | None
    cache_dtype: str | None
    cache_memory: int | None
    prefill_chunk: int | None

    @classmethod
    def of(cls, options: Any) -> "StageOptions":
        """Those of `PipelineOptions`."""
        return cls(**{name: getattr(options, name) for name in cls.model_fields})


class Open(Data):
    """Which stage to open: the one numbered `stage` of a bundle cut into `layers` blocks each."""

    stageline: str
    bundle: str
    """SHA-256 of its manifest, which has the digests of its files."""
    layers: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], Field(min_length=1, max_length=1000)]
    stage: Count
    options: StageOptions


class Opened(Data):
    """What the stage's engine says of itself; see `Engine`."""

    input_names: Names
    output_names: Names
    max_rows: int | None
    packs: bool
    block_tokens: int | None


class Run(Data):
    """`Engine.run`: the arrays are the inputs called `inputs`."""

    inputs: Names
    outputs: Names


class Step(Run):
    """`Engine.step`. `first` is the range's first slot; None: the tokens are packed, and the arrays of `PackedRows`
    follow the inputs."""

    first: Count | None


class Copy(Data):
    """`Engine.copy_slot`."""

    source: Count
    target: Count
    tokens: Count


class Done(Data):
    """The arrays are the outputs that were asked for. `busy_s`: seconds that the stage has computed so far."""

    busy_s: float


class Failed(Data):
    """What was asked for was not done: why."""

    error: str


def stageline_version() -> str:
    """Of this installation: hosts refuse pipelines of another one, whose numbers may differ."""
    return version("stageline")
