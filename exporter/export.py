"""Exporting: from a checkpoint to a bundle. Trace, cut, place the weights, stitch the stages, write the manifest."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from stageline.exporter import attention as cached
from stageline.exporter import gguf, skeleton
from stageline.exporter.blocks import Call, kinds, stampable, watch
from stageline.exporter.cut import NotProvenError, Parts, cut
from stageline.exporter.fuse import fuse_norms
from stageline.exporter.token_mixing import NotApartError, check_apart
from stageline.exporter.trace import (
    ATTENTION,
    OPSET,
    NotFusedError,
    first_line,
    representatives,
    trace,
    watched_attention,
)
from stageline.exporter.weights import Weights, find, majority_dtype, place
from stageline.models.checkpoint import Checkpoint, read_json_object
from stageline.models.errors import ExportError
from stageline.models.new_folder import new_folder
from stageline.models.safetensors_file import read_header
from stageline.models.sentence import SentencePooling, pooling
from stageline.models.tensors import TensorEntry
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of
from stageline.runtime.bundle.manifest import VERSION, CacheSpec, FileEntry, Manifest, Part, TensorSpec, TextSettings
from stageline.runtime.bundle.recut import check_stages, plan_stages, write_stages

Dtype = Literal["float32", "float16", "bfloat16"]
_NAMES_A_LIMIT = 1_000_000  # tokenizers without a limit state a huge one


@dataclass(frozen=True)
class TracedModel:
    """What one trace of a model yields, before any weight is placed."""

    model: Any
    inputs: tuple[skeleton.Input, ...]
    outputs: tuple[str, ...]
    cut: Parts
    how: str
    weights: Weights


@dataclass(frozen=True)
class _Wanted:
    """What is traced, and for what."""

    checkpoint: Checkpoint
    config: Any
    task: str
    dtype: Dtype
    head: SentencePooling | None
    stages: int | Sequence[int]
    progress: Callable[[str], None]


def export(
    path: str | Path,
    bundle: str | Path,
    *,
    stages: int | Sequence[int] = 1,
    dtype: Dtype | None = None,
    task: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Export the checkpoint at `path` to a new bundle folder.

    `stages` is how many, or how many blocks each; `dtype` is the checkpoint's own unless given; `task` is the one the
    checkpoint was saved for unless given. `progress` is told each step as it begins. The bundle appears complete or not
    at all. StagelineError where it cannot be done.
    """
    progress("reading the checkpoint")
    checkpoint = Checkpoint.open(Path(path))
    head = pooling(checkpoint) if checkpoint.kind == "safetensors" else None
    values = gguf.config(checkpoint) if checkpoint.kind == "gguf" else checkpoint.config
    config = skeleton.config_of(values)
    task = task or skeleton.task_of(config, head)
    head = head if task == "sentence-similarity" else None
    if task == "sentence-similarity" and head is None:
        raise ExportError(
            f"{path} says nothing of how to pool a sentence (no modules.json); use --task feature-extraction"
        )
    chosen: Dtype = dtype or majority_dtype(checkpoint)  # type: ignore[assignment]
    with new_folder(Path(bundle)) as folder:
        progress("tracing")
        traced = _trace_parts(_Wanted(checkpoint, config, task, chosen, head, stages, progress))
        _write_parts(folder, traced.cut)
        progress("placing weights")
        files = place(traced.weights, traced.model, config, chosen, folder)
        progress("stitching stages")
        manifest = _manifest(checkpoint, config, task, chosen, traced, folder, files, head)
        tensors = _tensors(folder, manifest)
        parts = [ir.load(folder / part.file) for part in manifest.parts]
        written, entries = write_stages(folder, manifest, tensors, parts, plan_stages(manifest, parts, stages))
        manifest = manifest.model_copy(update={"stages": tuple(written), "files": (*manifest.files, *entries)})
        write_manifest(folder, manifest)
    target = Path(bundle)
    return Bundle(target, manifest, _tensors(target, manifest))


def _trace_parts(wanted: _Wanted) -> TracedModel:
    """Trace and cut: with a KV cache if it generates text, with fused attention if the model allows it, stamping blocks
    if that is proven."""
    why = ""
    if wanted.task == "text-generation":
        try:
            return _trace_cached(wanted)
        except (cached.NotCachedError, ExportError) as error:  # what is wrong without a cache as well is told below
            why = f"; no KV cache, since {error}"
            wanted.progress(f"tracing without a KV cache ({error})")
    try:
        traced = _trace(wanted, ATTENTION)
    except (NotFusedError, KeyError, skeleton.AttentionError):
        # softcaps, sinks, or a table of attention classes of its own: the primitive operators are always right
        traced = _trace(wanted, "eager")
    return replace(traced, how=traced.how + why)


def _trace_cached(wanted: _Wanted) -> TracedModel:
    try:
        return _trace(wanted, cached.ATTENTION)
    except NotApartError:
        raise
    except (cached.NotCachedError, KeyError, skeleton.AttentionError):
        with cached.torch_attention():
            try:
                return _trace(wanted, "sdpa")
            except (KeyError, skeleton.AttentionError) as error:
                raise cached.NotCachedError("it computes attention itself") from error


def _trace(wanted: _Wanted, attention: str) -> TracedModel:
    torch_dtype = getattr(torch, wanted.dtype)
    model = skeleton.build(wanted.config, wanted.task, torch_dtype, attention)
    weights = find(wanted.checkpoint, model)
    mode = skeleton.fake_mode()
    skeleton.fake_weights(model, mode, weights.names)
    wrapped: skeleton.Task | cached.CachedTask
    if attention in (cached.ATTENTION, "sdpa"):
        wrapped = cached.CachedTask(model).eval()
        inputs = wrapped.inputs
    else:
        inputs = skeleton.inputs_of(model, torch_dtype)
        wrapped = skeleton.Task(model, inputs, skeleton.outputs_of(wanted.task), wanted.head).eval()
    outputs = wrapped.output_names

    def samples() -> tuple[torch.Tensor, ...]:
        with mode:
            return tuple(torch.ones(spec.sample_shape(), dtype=spec.dtype) for spec in inputs)

    try:
        with mode, torch.no_grad(), watched_attention() as callers:
            if isinstance(wrapped, cached.CachedTask):
                cached.check_masks(wrapped, samples())
            stack = watch(wrapped, samples())
        if attention == ATTENTION and not callers:
            # The model computes attention itself, so it wants the mask that goes with that: a bias, no truth table.
            raise NotFusedError("attention of its own")
    except (NotFusedError, cached.NotCachedError, ExportError, KeyError):
        raise
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be run on {', '.join(i.name for i in inputs)} alone: {first_line(error)}"
        ) from error
    check_stages(len(stack), wanted.stages)  # before what takes time
    kind = kinds(stack)
    reason = stampable(stack)
    real = representatives(kind) if reason is None else frozenset(range(len(stack)))
    if reason is None and len(real) < len(stack):
        try:
            result = _cut(wrapped, inputs, samples(), stack, kind, real, weights)
            how = f"stamped: {len(stack)} blocks from {len(set(kind))} kinds, proven on {len(real)} traced blocks"
            return TracedModel(model, inputs, outputs, _renamed(result, weights), how, weights)
        except NotProvenError as error:
            reason = str(error)
    if reason is not None:
        wanted.progress(f"tracing all {len(stack)} blocks ({reason})")
    result = _cut(wrapped, inputs, samples(), stack, kind, frozenset(range(len(stack))), weights)
    how = f"full: all {len(stack)} blocks traced" + (f", since {reason}" if reason else "")
    return TracedModel(model, inputs, outputs, _renamed(result, weights), how, weights)


def _cut(
    wrapped: skeleton.Task | cached.CachedTask,
    inputs: tuple[skeleton.Input, ...],
    samples: tuple[torch.Tensor, ...],
    stack: list[Call],
    kind: list[int],
    real: frozenset[int],
    weights: Weights,
) -> Parts:
    traced = trace(wrapped, inputs, samples, stack, kind, real)
    if isinstance(wrapped, cached.CachedTask):
        check_apart(traced.model.graph)
    names = frozenset("model." + name for name in weights.names)
    result = cut(traced, stack, kind, names)
    result.longest = traced.longest
    for part in result.parts:
        fuse_norms(part)
    return result


def _renamed(result: Parts, weights: Weights) -> Parts:
    """The cut with its uses bound to the names of the weight files' tensors and of the model's modules."""
    source = {"model." + name: tensor for name, tensor in weights.names.items()}
    result.uses = [
        use.model_copy(
            update={
                "weights": {local: source[name] for local, name in use.weights.items()},
                "module": use.module.removeprefix("model."),
            }
        )
        for use in result.uses
    ]
    return result


def _write_parts(folder: Path, result: Parts) -> None:
    (folder / "parts").mkdir()
    for index, part in enumerate(result.parts):
        ir.save(part, folder / _part_file(index, part))


def _caches(part: ir.Model) -> tuple[CacheSpec, ...]:
    nodes = [node for node in part.graph if node.op_type == CACHE_ATTENTION]
    return tuple(cache_of(node, str(number)) for number, node in enumerate(nodes))


def _part_file(index: int, part: ir.Model) -> str:
    return f"parts/{index}-{part.graph.name}.onnx"


def _tensors(folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for name in manifest.weight_files:
        tensors.update(read_header(folder / name))
    return tensors


def _manifest(
    checkpoint: Checkpoint,
    config: Any,
    task: str,
    dtype: Dtype,
    traced: TracedModel,
    folder: Path,
    weight_files: list[FileEntry],
    head: SentencePooling | None,
) -> Manifest:
    """The manifest without its stages, which are stitched from it."""
    result = traced.cut
    parts = tuple(
        Part(
            file=_part_file(i, model),
            inputs=result.inputs[i],
            outputs=result.outputs[i],
            weights=result.weights[i],
            caches=_caches(model),
        )
        for i, model in enumerate(result.parts)
    )
    last = result.uses[-1]
    final = {last.writes[spec.name]: spec for spec in result.outputs[last.part]}
    places = [skeleton.max_positions(traced.model), None if any(p.caches for p in parts) else result.longest]
    max_positions = min((limit for limit in places if limit is not None), default=None)
    text, extra = _copy_tokenizer(checkpoint, config, folder, max_positions, head)
    names = getattr(config, "id2label", None) or {}
    classifies = task in ("text-classification", "token-classification", "image-classification")
    return Manifest.model_construct(
        format="stageline-bundle",
        version=VERSION,
        task=task,
        architecture=config.model_type,
        dtype=dtype,
        opset=OPSET,
        inputs=tuple(
            TensorSpec(name=i.name, dtype=str(i.dtype).removeprefix("torch."), shape=i.shape) for i in traced.inputs
        ),
        outputs=tuple(final[name].model_copy(update={"name": name}) for name in traced.outputs),
        vocabulary=getattr(config, "vocab_size", None),
        max_positions=max_positions,
        text=text,
        parts=parts,
        uses=tuple(result.uses),
        stages=(),
        labels=tuple(str(names[i]) for i in sorted(names)) if classifies and names else None,
        weight_files=tuple(entry.path for entry in weight_files),
        files=(*(file_entry(folder, part.file) for part in parts), *weight_files, *extra),
        trace=traced.how,
        made_by={name: version(name) for name in ("stageline", "torch", "transformers", "onnxscript", "onnx-ir")},
    )


def _copy_tokenizer(
    checkpoint: Checkpoint, config: Any, folder: Path, max_positions: int | None, head: SentencePooling | None
) -> tuple[TextSettings | None, list[FileEntry]]:
    """Bring the tokenizer and the small files beside it into the bundle, and say how text becomes tensors."""
    target = folder / "tokenizer"
    target.mkdir()
    if checkpoint.kind == "gguf":
        gguf.save_tokenizer(checkpoint, target)
    for file in checkpoint.auxiliary:
        shutil.copyfile(file, target / file.name)
    files = [file_entry(folder, f"tokenizer/{file.name}") for file in sorted(target.iterdir())]
    if not (target / "tokenizer.json").is_file():
        return None, files
    stated = read_json_object(target / "tokenizer_config.json") if (target / "tokenizer_config.json").is_file() else {}
    limits = [stated.get("model_max_length"), max_positions, head.max_seq_length if head else None]
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < _NAMES_A_LIMIT]
    end = config.eos_token_id
    ends = () if end is None else tuple(np.atleast_1d(end).tolist())
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    return TextSettings(
        tokenizer="tokenizer/tokenizer.json",
        max_length=min(known, default=_NAMES_A_LIMIT),
        pad_id=max(0, pad),
        eos_ids=ends,
    ), files
