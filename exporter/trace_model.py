"""From a checkpoint to the part graphs of its model: the first attention that fits, traced, cut and fused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from stageline.exporter import skeleton
from stageline.exporter.attention import STRATEGIES, Attention
from stageline.exporter.blocks import Call, kinds, stampable
from stageline.exporter.cache_task import CacheTask
from stageline.exporter.cut import NotProvenError, PartGraph, cut
from stageline.exporter.exact_constants import take_buffers
from stageline.exporter.failure import reason_of
from stageline.exporter.falcon_alibi import rounded_alibi
from stageline.exporter.fuse import fuse_norms
from stageline.exporter.last_token import find_by_mask
from stageline.exporter.matching import TensorsError, missing_error
from stageline.exporter.quantise.choice import Quantisation, schemes
from stageline.exporter.quantise.nearest import Scheme
from stageline.exporter.scans import any_length
from stageline.exporter.sentence_head import PREFIX, SentenceHead
from stageline.exporter.skeleton import COMPUTES_ITSELF, NoCacheError, RefusedError
from stageline.exporter.trace import quiet, representatives, trace
from stageline.exporter.weights import Weights, find
from stageline.models.checkpoint import Checkpoint
from stageline.models.cross_encoder import CrossEncoder
from stageline.models.errors import ExportError
from stageline.models.sentence import SentencePooling
from stageline.runtime.bundle.manifest import ImageSettings, Refusal, Use
from stageline.runtime.bundle.recut import check_stages
from torch._subclasses.fake_tensor import FakeTensorMode

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Wanted:
    """What is traced, and for what."""

    checkpoint: Checkpoint
    config: Any
    task: str
    dtype: Dtype
    pooling: SentencePooling | None
    stages: int | Sequence[int]
    progress: Callable[[str], None]
    cross_encoder: CrossEncoder | None = None
    image: ImageSettings | None = None
    notes: list[str] = field(default_factory=list)
    """Grows while the export finds what a user should know of the bundle; each is a sentence without its full stop."""
    keep_packed: bool = True
    """Whether quantised weights stay as they are."""
    quantise: Quantisation | None = None
    """How matrices of floats are quantised."""


@dataclass(frozen=True)
class TracedModel:
    """What tracing a model yields, before any weight is placed: its parts, and how it uses them in order (prologue,
    blocks, epilogue). The trace holds for rows of up to `longest` tokens (None: of any length)."""

    task: skeleton.Task | CacheTask
    weights: Weights
    parts: tuple[PartGraph, ...]
    uses: tuple[Use, ...]
    longest: int | None
    how: str
    attention: str
    schemes: Mapping[str, Scheme]
    """How tensors of the checkpoint are quantised, by name."""
    refused: tuple[Refusal, ...] = ()
    no_cache_reason: str | None = None


def trace_model(wanted: Wanted) -> TracedModel:
    """Trace the model with the first attention that it allows. ExportError if it cannot be traced at all."""
    left = [strategy for strategy in STRATEGIES if wanted.task == "text-generation" or not strategy.cached]
    refused: list[Refusal] = []
    no_cache_reason = None
    while left:
        strategy = left.pop(0)
        try:
            traced = _trace_with(wanted, strategy())
            wanted.notes.extend(traced.weights.notes)
            return replace(traced, refused=tuple(refused), no_cache_reason=no_cache_reason)
        except RefusedError as error:
            refused.append(Refusal(attention=strategy.name, reason=str(error)))
            if isinstance(error, NoCacheError):
                left = [other for other in left if not other.cached]
        if strategy.cached and not any(other.cached for other in left):
            no_cache_reason = next((r.reason for r in refused if r.reason != COMPUTES_ITSELF), refused[-1].reason)
            wanted.progress(f"tracing without a KV cache ({no_cache_reason})")
    reasons = ", ".join(f"{refusal.attention} ({refusal.reason})" for refusal in refused)
    raise ExportError(f"model_type {wanted.config.model_type!r} allows no attention that can be traced: {reasons}")


def _trace_with(wanted: Wanted, attention: Attention) -> TracedModel:
    try:
        with attention.installed():
            fake = _FakeModel.of(wanted, attention)
            with any_length(fake.task), rounded_alibi(fake.task.model):
                stack = _blocks(fake, attention)
                check_stages(len(stack), wanted.stages)  # before what takes time
                return _parts(fake, attention, stack, wanted.progress)
    except TensorsError:
        raise
    except ExportError as error:
        if not attention.cached:
            raise
        raise NoCacheError(str(error)) from error  # what is wrong without a cache as well will be raised again


@dataclass(frozen=True)
class _FakeModel:
    """A model without data, ready to be run in `mode`."""

    task: skeleton.Task | CacheTask
    weights: Weights
    mode: FakeTensorMode
    buffers: Mapping[str, torch.Tensor]
    """The task's buffers that half precision rounds, in float32."""
    schemes: Mapping[str, Scheme]

    @classmethod
    def of(cls, wanted: Wanted, attention: Attention) -> "_FakeModel":
        dtype = getattr(torch, wanted.dtype)
        build = partial(skeleton.build, wanted.config, wanted.task, attention=attention.implementation)
        model = build(dtype=dtype)
        buffers = take_buffers(model, build(dtype=torch.float32)) if dtype != torch.float32 else {}
        find_by_mask(model)
        weights = find(wanted.checkpoint, model)
        ways = {} if wanted.quantise is None else schemes(model, weights.names, wanted.quantise)
        if wanted.quantise is not None and not ways:  # said before what takes time
            raise TensorsError(
                f"{wanted.checkpoint.path} has no matrix to quantise (of linear layers or embeddings, with rows that a "
                "group of 16 divides); leave out --quantise"
            )
        mode = skeleton.fake_mode()
        skeleton.fake_weights(model, mode, weights.names.keys() | weights.missing)
        head = None
        if wanted.pooling is not None:
            with torch.device("meta"):
                head = SentenceHead(wanted.pooling, dtype)
            skeleton.fake_weights(head, mode, ())
        size = wanted.image.size if wanted.image else None
        task = attention.wrap(model, dtype, wanted.task, head, size).eval()
        return cls(task, weights, mode, {"model." + name: buffer for name, buffer in buffers.items()}, ways)

    def samples(self) -> tuple[torch.Tensor, ...]:
        """Fresh inputs."""
        with self.mode:
            return tuple(torch.ones(spec.sample_shape(), dtype=spec.dtype) for spec in self.task.inputs)


def _blocks(fake: _FakeModel, attention: Attention) -> list[Call]:
    """The calls of the model's blocks, found by running it."""
    try:
        with quiet(), fake.mode, torch.no_grad(), skeleton.no_such_attention(attention.implementation):
            return attention.watch(fake.task, fake.samples())
    except (RefusedError, ExportError, KeyError):
        raise
    except Exception as error:
        raise ExportError(
            f"{type(fake.task.model).__name__} cannot be run on {', '.join(i.name for i in fake.task.inputs)} alone: "
            f"{reason_of(error)}"
        ) from error


def _parts(fake: _FakeModel, attention: Attention, stack: list[Call], progress: Callable[[str], None]) -> TracedModel:
    """The model's parts: stamped from a few blocks if that is proven, else from all of them."""
    kind = kinds(stack)
    real = representatives(kind)
    reason = stampable(stack)
    if reason is None and len(real) < len(stack):
        alike = "1 kind" if len(set(kind)) == 1 else f"{len(set(kind))} kinds"
        how = f"stamped: {len(stack)} blocks of {alike}, proven on {len(real)} traced blocks"
        try:
            return _cut(fake, attention, stack, kind, real, how)
        except NotProvenError as error:
            reason = str(error)
    every = f"all {len(stack)} blocks" if len(stack) > 1 else "1 block"
    if reason is not None:
        progress(f"tracing {every} ({reason})")
    how = f"full: {every} traced" + (f", because {reason}" if reason else "")
    return _cut(fake, attention, stack, kind, frozenset(range(len(stack))), how)


def _cut(
    fake: _FakeModel, attention: Attention, stack: list[Call], kind: list[int], real: frozenset[int], how: str
) -> TracedModel:
    """Trace the blocks `real`, cut the graph into parts, and fuse them."""
    traced = trace(fake.task, fake.samples(), stack, kind, real, fake.buffers)
    attention.check_graph(traced.model.graph)
    if attention.cached and traced.longest is not None:  # a row may take more tokens in one step than that
        raise NoCacheError(f"it computes more than {traced.longest} tokens at a time in another way")
    source = {"model." + name: tensor for name, tensor in fake.weights.names.items()}
    head = getattr(fake.task, "head", None)
    source |= {} if head is None else {"head." + name: PREFIX + name for name, _ in head.named_parameters()}
    parameters = {"model." + name for name, _ in fake.task.model.named_parameters(remove_duplicate=False)}
    missing = {"model." + name for name in fake.weights.missing}
    parts, uses = cut(traced, stack, kind, frozenset(source.keys() | parameters | missing))
    read = {name for use in uses for name in use.weights.values()}
    if not read <= source.keys():
        lacking = {name.removeprefix("model.") for name in read - source.keys()}
        raise missing_error(fake.weights.checkpoint, fake.task.model, lacking)
    for part in parts:
        fuse_norms(part.model)
    bound = tuple(_bound(use, source) for use in uses)
    needed = {name: tensor for name, tensor in fake.weights.names.items() if "model." + name in read}
    weights = replace(fake.weights, names=needed)
    return TracedModel(fake.task, weights, parts, bound, traced.longest, how, attention.name, fake.schemes)


def _bound(use: Use, source: dict[str, str]) -> Use:
    """The use with the names of the weight files' tensors, and of the model's module, in place of the task's."""
    weights = {local: source[name] for local, name in use.weights.items()}
    return use.model_copy(update={"weights": weights, "module": use.module.removeprefix("model.")})
