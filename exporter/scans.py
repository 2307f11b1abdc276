"""Recurrences over tokens (state spaces, the gated delta rule) in a form that holds for rows of any length.

transformers computes them without kernels in a Python loop over tokens or chunks, so a trace holds the loop of one
length. Here they are products of matrices and a scan, h[t] = decay[t] h[t-1] + added[t], which is one operator in the
trace and is written out after it (stageline.exporter.scan_graph).
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from stageline.exporter.scan_graph import LONGEST, SCAN
from torch.nn.functional import pad, silu, softplus


@contextlib.contextmanager
def any_length(model: torch.nn.Module) -> Iterator[None]:
    """While entered, the modules of `model` call the functions of this file in place of transformers' loops."""
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, replacement in _REPLACEMENTS.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement(getattr(module, name))))
        yield


def scan(decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """h[t] = decay[t] h[t-1] + added[t] with h[-1] = 0, as one operator of the trace.

    Either each [batch, any, length, width], multiplied element by element, or matrices: decay [..., n, n], added
    [..., n, m].
    """
    result: torch.Tensor = torch.onnx.ops.symbolic(
        "::".join(SCAN), [decay, added], dtype=added.dtype, shape=added.shape, version=1
    )
    return result


def _selective_scan(original: Any) -> Any:
    """Mamba's scan; see transformers.models.mamba.modeling_mamba.mamba_selective_scan, whose arguments these are."""

    def selective_scan(
        hidden_states: torch.Tensor,  # [batch, width, length]
        dt: torch.Tensor,  # like it
        A: torch.Tensor,  # [width, state]
        B: torch.Tensor,  # [batch, state, length]
        C: torch.Tensor,  # like B
        D: torch.Tensor | None = None,  # [width]
        z: torch.Tensor | None = None,  # like hidden_states
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        torch._check(hidden_states.shape[2] <= LONGEST)  # type: ignore[no-untyped-call]
        step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        step = softplus(step) if delta_softplus else step
        decay = torch.exp(A[None, :, None, :] * step[..., None])
        added = step[..., None] * B.transpose(1, 2)[:, None].float() * hidden_states[..., None].float()
        states = scan(decay, added.to(decay.dtype))
        output = (states * C.transpose(1, 2)[:, None]).sum(-1).to(hidden_states.dtype)
        if D is not None:
            output = output + hidden_states * D[None, :, None]
        if z is not None:
            output = output * silu(z)
        return (output, states[:, :, -1]) if return_last_state else output

    return selective_scan


def _whole_chunks(original: Any) -> Any:
    """Mamba 2's scan, given whole chunks: its own padding is a branch on the length."""

    def chunk_scan(
        hidden_states: torch.Tensor,  # [batch, length, heads, width]
        dt: torch.Tensor,  # [batch, length, heads]
        A: torch.Tensor,
        B: torch.Tensor,  # [batch, length, groups, state]
        C: torch.Tensor,  # like B
        chunk_size: int,
        **options: Any,
    ) -> Any:
        length = hidden_states.shape[1]
        extra = (length // chunk_size + 2) * chunk_size - length
        hidden_states, B, C = (pad(x, (0, 0, 0, 0, 0, extra)) for x in (hidden_states, B, C))
        result = original(hidden_states, pad(dt, (0, 0, 0, extra)), A, B, C, chunk_size, **options)
        if isinstance(result, tuple):
            return result[0][:, :length], *result[1:]
        return result[:, :length]

    return chunk_scan


def _chunked_delta_rule(original: Any) -> Any:
    """The gated delta rule; see transformers.models.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule, whose
    arguments these are, and Yang et al., "Gated Delta Networks" (2024), for the form by chunks."""

    def delta_rule(
        query: torch.Tensor,  # [batch, length, key heads, key width]
        key: torch.Tensor,  # like it
        value: torch.Tensor,  # [batch, length, heads, width]
        g: torch.Tensor,  # [batch, length, heads], the logarithm of the decay
        beta: torch.Tensor,  # like g
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        assert initial_state is None
        assert not output_final_state
        length, heads = value.shape[1:3]
        torch._check(length <= LONGEST)  # type: ignore[no-untyped-call]
        if key.shape[2] != heads:
            query, key = (x.repeat_interleave(heads // key.shape[2], dim=2) for x in (query, key))
        dtype = query.dtype
        if use_qk_l2norm_in_kernel:
            query, key = (
                x.float() * torch.rsqrt((x.float() * x.float()).sum(-1, keepdim=True) + 1e-6) for x in (query, key)
            )
        chunks = length // chunk_size + 2

        def chunked(x: torch.Tensor) -> torch.Tensor:
            """[batch, length, heads, ...] -> [batch, heads, chunks, chunk_size, ...]"""
            filled = pad(x.float(), (0, 0) * (x.dim() - 2) + (0, chunks * chunk_size - length))
            return filled.reshape(x.shape[0], chunks, chunk_size, *x.shape[2:]).transpose(1, 3).transpose(2, 3)

        query, key, value, beta, decay = map(chunked, (query * key.shape[-1] ** -0.5, key, value, beta, g))
        decay = decay.cumsum(dim=3)
        later = torch.ones(chunk_size, chunk_size, dtype=torch.bool).triu(1)
        between = (decay[..., None] - decay[..., None, :]).masked_fill(later, float("-inf")).exp()
        key_beta = key * beta[..., None]
        inverse = _inverse((key_beta @ key.transpose(-1, -2)) * between)
        values = inverse @ (value * beta[..., None])
        seen = inverse @ (key_beta * decay.exp()[..., None])
        inside = (query @ key.transpose(-1, -2)) * between
        query = query * decay.exp()[..., None]
        key = (key * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2)
        # the state after a chunk: what is left of the state before, less what its own keys see of that, and its values
        kept = decay[..., -1].exp()[..., None, None] * torch.eye(key.shape[-2]) - key @ seen
        # Padded, then cut: before the padding one chunk may be left, and the tracer takes a size of 1 for a constant.
        states = pad(scan(kept, key @ values), (0, 0, 0, 0, 1, 0))[:, :, :-1]
        output = query @ states + inside @ (values - seen @ states)
        output = output.transpose(2, 3).transpose(1, 3).reshape(output.shape[0], -1, heads, output.shape[-1])
        return output[:, :length].to(dtype), None

    return delta_rule


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of the lower triangle of `matrix` [..., n, n] with ones on its diagonal; n is a power of 2.

    By blocks: the inverse of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']]. Sums of powers would lose all digits.
    """
    size = matrix.shape[-1]
    inverse = torch.ones(*matrix.shape[:-2], size, 1, 1)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = matrix.reshape(*matrix.shape[:-2], pairs, 2 * width, pairs, 2 * width)
        own = (blocks * torch.eye(pairs)[:, None, :, None]).sum(-2)[..., width:, :width]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -(second @ own @ first)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        inverse = torch.cat([top, torch.cat([below, second], -1)], -2)
        width *= 2
    return inverse[..., 0, :, :]


_REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "mamba_selective_scan": _selective_scan,
    "mamba2_chunk_scan": _whole_chunks,
    "torch_chunk_gated_delta_rule": _chunked_delta_rule,
}
