"""A synthetic checkpoint for any config that transformers knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from stageline.exporter import skeleton, tasks
from stageline.models.synthetic import write_random, write_sparse


def synthesize(config: Mapping[str, Any], folder: Path, *, seed: int | None, dtype: str) -> None:
    """Write a checkpoint for `config` with weights drawn from `seed`; None: with shapes only, which read as zeros.

    Its config.json names the class it was made for, so that its task is found again. StagelineError if transformers
    does not know the config or the folder cannot be made.
    """
    parsed = skeleton.config_of(config)
    model = skeleton.build(parsed, tasks.task_of(parsed, None), getattr(torch, dtype), "eager")
    values = {**config, "architectures": [type(model).__name__], "dtype": dtype}
    shapes = skeleton.parameter_shapes(model)
    if seed is None:
        write_sparse(folder, values, shapes)
    else:
        write_random(folder, values, shapes, seed)
