"""Baselines that need torch: the checkpoint in transformers, eager or compiled.

Waiting requests to generate are grouped into static batches, because `generate` has no scheduler.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from stageline.exporter import skeleton
from stageline.exporter.sentence_head import loaded_head
from stageline.exporter.verify.against_torch import load_reference
from stageline.models.checkpoint import Checkpoint
from stageline.runtime.bench.baselines import one_by_one
from stageline.runtime.bench.contenders import CallContender, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bundle.manifest import EMBEDDING, Manifest
from stageline.runtime.engines import Array
from transformers.generation.streamers import BaseStreamer

Kind = Literal["torch", "torch-compile"]


def torch_contender(kind: Kind, checkpoint: Path, manifest: Manifest, threads: int | None, slots: int) -> CallContender:
    """transformers' model of a checkpoint in float32 with its own fastest attention, on the CPU.

    ExportError if the bundle was made from another model; CheckpointError if it cannot be read.
    """
    opened = Checkpoint.open(checkpoint)
    model = load_reference(opened, manifest, attention="sdpa")
    if threads is not None:
        torch.set_num_threads(threads)
    if manifest.cached:
        if kind == "torch-compile":
            model.forward = torch.compile(model.forward, dynamic=True)
        return CallContender(kind, _Generating(model), slots)
    head = loaded_head(opened) if manifest.task == "sentence-similarity" else None
    names = tuple(spec.name for spec in manifest.outputs)
    wanted = (EMBEDDING,) if EMBEDDING in names else names
    size = manifest.image.size if manifest.image else None
    task: Any = skeleton.Task(model, skeleton.inputs_of(model, torch.float32, size), wanted, head).eval()
    inputs = task.input_names
    run = torch.compile(task, dynamic=True) if kind == "torch-compile" else task

    def compute(arrays: dict[str, Array]) -> None:
        with torch.inference_mode():
            run(*(torch.from_numpy(arrays[name]) for name in inputs))

    return CallContender(kind, one_by_one(compute), 1)


class _Generating:
    """Greedy continuation of a static batch, prompts padded on the left, exactly as many tokens as are asked for."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, items: Sequence[Item]) -> list[RequestOutcome]:
        prompts = [item.rows[0] for item in items]
        most, new = max(map(len, prompts)), max(item.output_tokens or 0 for item in items)
        ids = torch.zeros((len(prompts), most), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, most - len(prompt) :] = torch.tensor(prompt)
            mask[row, most - len(prompt) :] = 1
        times = _Times()
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
                streamer=times,
            )  # fmt: skip
        at = times.at[1:]  # the first is the prompt's
        gaps = tuple(after - before for before, after in pairwise(at))
        return [RequestOutcome(perf_counter(), item.output_tokens or 0, at[0], gaps) for item in items]


class _Times(BaseStreamer):  # type: ignore[misc]
    """When each step of generate had its tokens."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt, or one token for each row."""
        self.at.append(perf_counter())

    def end(self) -> None:
        """Does nothing: no token is held back."""
