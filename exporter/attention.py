"""Decoders with a KV cache: how a causal model is traced so that its attention reads what it has seen before.

Attention becomes one operator, `stageline::CacheAttention` (docs/bundle.md), whose keys and values of earlier tokens
are state that no graph input shows. The model sees positions that begin at each row's past, and gives logits only where
they are asked for. What a mask would say the operator says itself (causal, a window, soft caps, sinks); a model whose
masks or attention say more is refused here, with the reason, and traced without a cache.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from stageline.exporter.skeleton import Input
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

ATTENTION = "stageline_cache"
OPERATOR = "stageline::CacheAttention"
_FAR = 1 << 20  # a query so late that any window has closed behind it
# What transformers hands to an attention function and what changes nothing here: positions are in the queries already.
HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "position_embeddings",
        "layer_idx",
        "target_dtype",
        "dropout",
        "deterministic",
        "output_hidden_states",
        "return_dict",
        "output_router_logits",
        "is_causal",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)


class NotCachedError(Exception):
    """This model's attention cannot read a KV cache; the message says why."""


@dataclass
class _Seen:
    """What one forward pass showed: the rows' lengths for the operator, and the windows of masks and of attention."""

    past_lengths: torch.Tensor
    new_lengths: torch.Tensor
    mask_windows: set[int | None] = field(default_factory=set)
    call_windows: set[int | None] = field(default_factory=set)
    shows_masks: bool = False
    masks: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)
    """The masks that were given out, where it shows some, with their windows."""


_seen: _Seen | None = None  # of the forward pass that is under way: transformers gives attention functions no context


class CachedTask(torch.nn.Module):
    """A causal model as `logits [batch, picks, vocabulary]` of what each row has new.

    Inputs: `input_ids [batch, length]`, rows padded on the right; `past_lengths [batch]`, the tokens each row has seen
    before; `new_lengths [batch]`, its real tokens now; `logits_at [batch, picks]`, the places whose logits are wanted.
    All int64.
    """

    inputs: tuple[Input, ...] = (
        Input("input_ids", torch.int64, ("batch", "length")),
        Input("past_lengths", torch.int64, ("batch",)),
        Input("new_lengths", torch.int64, ("batch",)),
        Input("logits_at", torch.int64, ("batch", "picks")),
    )
    output_names = ("logits",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.shows_masks = False
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" not in accepted:
            raise NotCachedError("it does not take the positions of its tokens")
        self.extra = {"use_cache": False} if "use_cache" in accepted else {}
        if model.get_output_embeddings() is None:
            raise NotCachedError("its output embeddings are not a module")

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        global _seen
        ids, past, new, logits_at = tensors
        places = past[:, None] + torch.arange(ids.shape[1], dtype=torch.int64)
        # Padding takes the last real position, so that no place lies outside a table of positions.
        positions = torch.minimum(places, (past + new - 1).clamp(min=0)[:, None])

        def pick(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            index = logits_at[:, :, None].expand(-1, -1, args[0].shape[-1])
            return (args[0].gather(1, index),)

        _seen = _Seen(past, new, shows_masks=self.shows_masks)
        handle = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            result = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                return_dict=True,
                **self.extra,
            )
            _check(_seen)
        finally:
            handle.remove()
            _seen = None
        if result.logits.shape[1] != logits_at.shape[1]:
            raise NotCachedError("it makes logits without calling its output embeddings")
        return (result.logits,)


def check_masks(task: CachedTask, samples: tuple[torch.Tensor, ...]) -> None:
    """NotCachedError where a mask does not reach attention as it was made, with the window that attention names.

    Without masks, as the operator wants it, a model forgets what it would add to them (Falcon a bias for distance).
    """
    task.shows_masks = True
    try:
        task(*samples)
    finally:
        task.shows_masks = False


def _check(seen: _Seen) -> None:
    if not seen.call_windows:
        raise NotCachedError("it computes attention itself")
    if not seen.mask_windows <= seen.call_windows:
        missing = sorted(map(str, seen.mask_windows - seen.call_windows))
        raise NotCachedError(f"its masks have a window of {', '.join(missing)} tokens that its attention does not name")


def _check_mask(mask: torch.Tensor, window: int | None) -> None:
    for made, made_window in _seen.masks if _seen is not None else ():
        if mask.untyped_storage()._cdata == made.untyped_storage()._cdata:  # itself, or a part of it
            if made_window != window:
                raise NotCachedError(f"its masks have a window of {made_window} tokens, its attention names {window}")
            return
    raise NotCachedError("it adds a bias of its own to attention")


def _emit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The operator: query [batch, heads, length, size] and as many or fewer heads of key and value ->
    [batch, length, heads, value size]."""
    if _seen is None:
        raise NotCachedError("it attends outside its forward pass")
    if query.shape[2] is not key.shape[2] and query.shape[2] != key.shape[2]:
        raise NotCachedError("it attends to something else than its own tokens")
    if query.shape[1] % key.shape[1]:
        raise NotCachedError(f"it has {query.shape[1]} query heads for {key.shape[1]} of keys")
    _seen.call_windows.add(window)
    attributes: dict[str, Any] = {"scale": float(query.shape[-1] ** -0.5 if scale is None else scale)}
    if window is not None:
        attributes["window"] = window
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    inputs: list[torch.Tensor | None] = [query, key, value, _seen.past_lengths, _seen.new_lengths]
    result: torch.Tensor = torch.onnx.ops.symbolic(
        OPERATOR,
        [*inputs, *([] if sinks is None else [sinks])],
        attrs=attributes,
        dtype=query.dtype,
        shape=(query.shape[0], query.shape[2], query.shape[1], value.shape[3]),
        version=1,
    )
    return result


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    scale, window, softcap, sinks = (options.pop(n, None) for n in ("scaling", "sliding_window", "softcap", "s_aux"))
    if attention_mask is not None:
        _check_mask(attention_mask, window)
    unknown = sorted(k for k, v in options.items() if k not in HARMLESS and v is not None and v is not False)
    if unknown:
        raise NotCachedError(f"its attention takes {', '.join(unknown)}")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotCachedError("its attention is not causal")
    return _emit(query, key, value, scale, window, softcap, sinks), None


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """In place of torch's scaled_dot_product_attention, for models that call it themselves."""
    if attn_mask is not None:
        _check_mask(attn_mask, None)
    elif not is_causal:
        raise NotCachedError("its attention is not causal")
    return _emit(query, key, value, scale, None, None, None).transpose(1, 2)


def _mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, mask_function: Callable[..., Any], **options: Any
) -> torch.Tensor | None:
    """In place of a mask: nothing, after a look at which tokens it would show; or a stand-in, to see where it goes."""
    assert _seen is not None
    window = _window_of(mask_function)
    _seen.mask_windows.add(window)
    if not _seen.shows_masks:
        return None
    _seen.masks.append((torch.ones((batch_size, 1, q_length, kv_length), dtype=torch.bool), window))
    return _seen.masks[-1][0]


def _window_of(mask_function: Callable[..., Any]) -> int | None:
    """How many tokens back a causal mask lets a query see, itself included; None for all. Asked of the mask itself."""
    try:
        with _disable_current_modes():
            shown = _shown(mask_function, _FAR)
            window = int(shown.sum())
            for query in (0, 1, 2, 7, 100, *(q for q in (window - 1, window, window + 1) if q < _FAR)):
                seen = _shown(mask_function, query)
                if int(seen.sum()) != min(window, query + 1) or not bool(seen[-min(window, query + 1) :].all()):
                    raise NotCachedError("its masks are neither causal nor of a sliding window")
    except NotCachedError:
        raise
    except Exception as error:  # a mask that depends on data
        raise NotCachedError(f"its masks cannot be read ({type(error).__name__})") from error
    return window if window <= _FAR else None


def _shown(mask_function: Callable[..., Any], query: int) -> torch.Tensor:
    """Which of the tokens 0 to `query` that query sees; later ones must be hidden."""
    zero = torch.tensor(0)
    kv = torch.arange(query + 2)
    shown = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), kv)).expand(query + 2)
    if bool(shown[-1]):
        raise NotCachedError("its attention is not causal")
    return shown[:-1]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


@contextlib.contextmanager
def torch_attention() -> Iterator[None]:
    """Let models that call torch's attention themselves (attn_implementation "sdpa") give the operator instead."""
    mask, attend = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], torch.nn.functional.scaled_dot_product_attention
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask
    torch.nn.functional.scaled_dot_product_attention = _torch_attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
