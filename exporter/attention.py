"""The ways to trace a model's attention, tried in order: with a KV cache, as one ONNX operator, as the model has it.

A way registers a function of its own with transformers for as long as a trace takes. The cache's operator is
`stageline::CacheAttention` (docs/reference/bundle.md), whose keys and values of earlier tokens are state that no graph
input shows. It encodes the mask itself: causal, a window, soft caps, sinks. If a model's masks or attention do more
than an operator, that way refuses the model, with the reason, and the next one is tried.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import onnx_ir as ir
import torch
from stageline.exporter.blocks import Call, watch
from stageline.exporter.cache_task import CacheTask
from stageline.exporter.mask_window import window_of
from stageline.exporter.rotary_scaling import rows_of, scaled_rotary
from stageline.exporter.skeleton import COMPUTES_ITSELF, RefusedError, Task, inputs_of, outputs_of
from stageline.exporter.token_mixing import check_apart
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_OPERATOR = "stageline::CacheAttention"
# Arguments of an attention function that change nothing here: positions are in the queries already.
_HARMLESS = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings", "layer_idx",
        "target_dtype", "dropout", "deterministic", "output_hidden_states", "return_dict", "output_router_logits",
        "is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    }
)  # fmt: skip


class Attention:
    """One way to trace attention, for one trace; this one leaves it to the model, as primitive operators.

    A method raises RefusedError if the model does not allow this way, NoCacheError if it allows none with a cache.
    """

    name: ClassVar[str] = "primitive"  # in the manifest
    implementation: ClassVar[str] = "eager"  # as transformers knows it
    cached: ClassVar[bool] = False

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """While entered, models that were built with `implementation` call this attention."""
        return contextlib.nullcontext()

    def wrap(
        self,
        model: Any,
        dtype: torch.dtype,
        task: str,
        head: torch.nn.Module | None,
        image_size: tuple[int, int] | None = None,
    ) -> Task | CacheTask:
        """The model with the inputs and outputs of the bundle; `image_size` as in `inputs_of`."""
        wrapped = Task(model, inputs_of(model, dtype, image_size), outputs_of(task), head)
        wrapped.rows_of = partial(rows_of, scaled_rotary(model))
        return wrapped

    def watch(self, task: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> list[Call]:
        """Run the task, and return the calls of its blocks."""
        return watch(task, samples)

    def check_graph(self, graph: ir.Graph) -> None:
        """Check the traced graph."""


@dataclass(frozen=True)
class _AttentionCall:
    """One call of attention: query [batch, heads, length, size], key and value with as many or fewer heads."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    options: dict[str, Any]


class _OneOperator(Attention):
    """Attention as one operator, which `emit` adds to the graph."""

    understood: ClassVar[frozenset[str]]  # further arguments that `emit` reads, or that the mask holds already

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """The function for transformers; returns [batch, length, heads, value size]."""
        known = _HARMLESS | self.understood
        unknown = sorted(k for k, v in options.items() if k not in known and v is not None and v is not False)
        if unknown:
            raise RefusedError(f"its attention takes {', '.join(unknown)}")
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        return self.emit(_AttentionCall(query, key, value, attention_mask, causal, options)), None

    def emit(self, call: _AttentionCall) -> torch.Tensor:
        raise NotImplementedError


class FusedAttention(_OneOperator):
    """The ONNX operator Attention (opset 23), without sinks, soft caps or biases."""

    name, implementation = "fused", "stageline"
    understood = frozenset({"scaling", "sliding_window", "head_mask"})

    def __init__(self) -> None:
        self.called = False

    def installed(self) -> contextlib.AbstractContextManager[None]:
        return _registered(self.implementation, self.attend, sdpa_mask)

    def watch(self, task: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> list[Call]:
        calls = super().watch(task, samples)
        if not self.called:  # then the model wants the mask that goes with its own attention: a bias, no truth table
            raise RefusedError(COMPUTES_ITSELF)
        return calls

    def emit(self, call: _AttentionCall) -> torch.Tensor:
        self.called = True
        query, key, mask = call.query, call.key, call.mask
        if mask is not None and mask.shape[-1] != key.shape[-2]:
            mask = mask[..., : key.shape[-2]]
        if mask is not None:  # ONNX Runtime broadcasts batch and heads, not the queries
            mask = mask.expand(*mask.shape[:-2], query.shape[-2], -1)
        result = torch.onnx.ops.attention(
            query, key, call.value, mask, scale=call.options.get("scaling"), is_causal=mask is None and call.causal
        )
        return result[0].transpose(1, 2).contiguous()


@dataclass
class _Pass:
    """What one forward pass shows: the rows' lengths [batch] for the operator, the windows of masks and of attention,
    the masks that were given out, with their windows, and whether attention was ever called without one."""

    past_lengths: torch.Tensor
    new_lengths: torch.Tensor
    mask_windows: set[int | None] = field(default_factory=set)
    call_windows: set[int | None] = field(default_factory=set)
    masks: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)
    unmasked: bool = False

    def check(self) -> None:
        """RefusedError if attention did not get what the masks would have added."""
        if not self.call_windows:
            raise RefusedError(COMPUTES_ITSELF)
        missing = sorted(map(str, self.mask_windows - self.call_windows))
        if self.masks and self.unmasked and missing:  # else a mask is missing that no layer uses
            raise RefusedError(
                f"its masks have a window of {', '.join(missing)} tokens that its attention does not name"
            )

    def check_mask(self, mask: torch.Tensor, window: int | None) -> None:
        """RefusedError if a mask does not reach attention as it was given out, with the window that attention names."""
        for given, given_window in self.masks:
            if mask.untyped_storage()._cdata == given.untyped_storage()._cdata:  # itself, or a part of it
                if given_window != window:
                    raise RefusedError(
                        f"its masks have a window of {given_window} tokens, its attention names {window}"
                    )
                return
        raise RefusedError("it adds a bias of its own to attention")


class CacheAttention(_OneOperator):
    """The operator CacheAttention, for models that call the attention function of their config."""

    name, implementation, cached = "cache", "stageline_cache", True
    understood = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})

    def __init__(self) -> None:
        self._pass: _Pass | None = None
        self._gives_masks = False

    def installed(self) -> contextlib.AbstractContextManager[None]:
        return _registered(self.implementation, self.attend, self.mask)

    def wrap(self, model: Any, *others: Any, **named: Any) -> Task | CacheTask:
        """All such models have the same inputs and outputs."""
        return CacheTask(model, self._over)

    def watch(self, task: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> list[Call]:
        """Without masks, as the operator wants it, a model forgets what it would add to them (Falcon: a bias for
        distance). So a first run gives out masks and checks that they reach attention unchanged."""
        self._gives_masks = True
        try:
            task(*samples)
        finally:
            self._gives_masks = False
        return super().watch(task, samples)

    def check_graph(self, graph: ir.Graph) -> None:
        check_apart(graph)

    @contextlib.contextmanager
    def _over(self, past_lengths: torch.Tensor, new_lengths: torch.Tensor) -> Iterator[None]:
        """A forward pass over rows of these lengths: transformers gives attention functions no context."""
        self._pass = _Pass(past_lengths, new_lengths)
        try:
            yield
            self._pass.check()
        finally:
            self._pass = None

    def mask(
        self, batch_size: int, q_length: int, kv_length: int, *_: Any, mask_function: Callable[..., Any], **__: Any
    ) -> torch.Tensor | None:
        """In place of a mask: nothing, after a look at which tokens it would show; or a stand-in, to see where it
        goes."""
        assert self._pass is not None
        window = window_of(mask_function)
        self._pass.mask_windows.add(window)
        if not self._gives_masks:
            return None
        mask = torch.ones((batch_size, 1, q_length, kv_length), dtype=torch.bool)
        self._pass.masks.append((mask, window))
        return mask

    def emit(self, call: _AttentionCall) -> torch.Tensor:
        query, key, value = call.query, call.key, call.value
        scale, window, softcap, sinks = map(call.options.get, ("scaling", "sliding_window", "softcap", "s_aux"))
        if self._pass is None:
            raise RefusedError("it attends outside its forward pass")
        if call.mask is None:
            self._pass.unmasked = True
        else:
            self._pass.check_mask(call.mask, window)
        if not call.causal:
            raise RefusedError("its attention is not causal")
        if query.shape[2] is not key.shape[2] and query.shape[2] != key.shape[2]:
            raise RefusedError("it attends to something else than its own tokens")
        if query.shape[1] % key.shape[1]:
            raise RefusedError(f"it has {query.shape[1]} query heads for {key.shape[1]} of keys")
        self._pass.call_windows.add(window)
        attributes: dict[str, Any] = {"scale": float(query.shape[-1] ** -0.5 if scale is None else scale)}
        if window is not None:
            attributes["window"] = window
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        inputs = [query, key, value, self._pass.past_lengths, self._pass.new_lengths]
        result: torch.Tensor = torch.onnx.ops.symbolic(
            _OPERATOR,
            [*inputs, *([] if sinks is None else [sinks])],
            attrs=attributes,
            dtype=query.dtype,
            shape=(query.shape[0], query.shape[2], query.shape[1], value.shape[3]),
            version=1,
        )
        return result


class TorchCacheAttention(CacheAttention):
    """The operator CacheAttention, for models that call torch's attention themselves."""

    name, implementation = "cache-torch", "sdpa"

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with (
            mock.patch.dict(AttentionMaskInterface._global_mapping, {self.implementation: self.mask}),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", self.attend_for_torch),
        ):
            yield

    def attend_for_torch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """In place of torch's function, which returns [batch, heads, length, value size]."""
        causal = is_causal or attn_mask is not None
        return self.emit(_AttentionCall(query, key, value, attn_mask, causal, {"scaling": scale})).transpose(1, 2)


@contextlib.contextmanager
def _registered(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """While entered, transformers knows an attention function and its masks by `name`."""
    with (
        mock.patch.dict(AttentionInterface._global_mapping, {name: attend}),
        mock.patch.dict(AttentionMaskInterface._global_mapping, {name: mask}),
    ):
        yield


STRATEGIES: tuple[type[Attention], ...] = (CacheAttention, TorchCacheAttention, FusedAttention, Attention)
"""In the order they are tried; those with a cache for models that generate text."""
