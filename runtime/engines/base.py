"""What runs one stage: the contract that the pipeline knows and every engine keeps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]


class Engine(Protocol):
    """One stage, compiled and open. It belongs to the thread that opened it: that thread runs it and closes it.

    Promises: an input is read, never written, and not kept after `run` returns; an output is a new array that the
    caller owns. A half-precision value (float16, bfloat16) crosses the border as float32. Engines check nothing: the
    pipeline has checked names, dtypes and shapes before.
    """

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names that `run` wants, all of them."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names that `run` can compute."""
        ...

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The named outputs of the stage for these inputs. Names in `inputs` that the stage does not read are ignored.

        Raises EngineError, naming the stage, if the backend fails.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. May be called again."""
        ...


@dataclass(frozen=True)
class StageFile:
    """A stage on disk. `file` is its ONNX graph; `folder` is where the graph's external data locations start."""

    number: int
    file: Path
    folder: Path


EngineFactory = Callable[[StageFile, tuple[int, ...]], Engine]
"""Opens a stage on the given processors (numbers as in os.sched_getaffinity), on the thread that will run it."""
