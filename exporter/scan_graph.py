"""Recurrences over tokens as graphs for rows of any length: the operator Scan of a trace in ONNX's own operators.

h[t] = decay[t] h[t-1] + added[t] is computed by doubling: within chunks of `_CHUNK` elements, then over the chunks'
last states in the same way, and so on. This is the parallel prefix sum of Blelloch, "Prefix Sums and Their
Applications" (1990). The graph is written here because the sizes of chunks of chunks, in torch's symbols, cost minutes
a trace and lead it to take some for constants.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, rewrite

SCAN = ("stageline", "Scan")
_CHUNK = 32
_LEVELS = 4
LONGEST = _CHUNK**_LEVELS
"""Tokens."""


def lower_scans(model: ir.Model) -> None:
    """Write every Scan in `model` out, in place."""
    rewrite(model, [RewriteRule(_scan, _written_out)])


def _scan(op: Any, decay: ir.Value, added: ir.Value) -> ir.Value:
    result: ir.Value = op.Scan(decay, added, _domain=SCAN[0])
    return result


def _written_out(op: Any, decay: ir.Value, added: ir.Value) -> ir.Value:
    return _Writer(op, _widths(decay), _widths(added)).states(decay, added, _LEVELS - 1)


def _widths(value: ir.Value) -> list[int]:
    """What one element of a row holds."""
    assert value.shape is not None
    return [size for size in list(value.shape)[3:] if isinstance(size, int)]


class _Writer:
    """Writes nodes to `op`. An element of `decay` and of `added` is a vector each, or a matrix each."""

    def __init__(self, op: Any, decay_widths: list[int], added_widths: list[int]):
        self.op, self.decay_widths, self.added_widths = op, decay_widths, added_widths
        self.compose = op.Mul if len(added_widths) == 1 else op.MatMul

    def states(self, decay: ir.Value, added: ir.Value, levels: int) -> ir.Value:
        """Of [batch, any, length, ...], where a row has at most one chunk of chunks, `levels` times over."""
        op = self.op
        length = op.Shape(added, start=2, end=3)
        whole = op.Mul(op.Div(op.Add(length, self.numbers(_CHUNK - 1)), self.numbers(_CHUNK)), self.numbers(_CHUNK))
        pads = op.Concat(self.numbers(0), op.Sub(whole, length), axis=0)
        decay = self.chunked(decay, pads, self.decay_widths)
        added = self.chunked(added, pads, self.added_widths)
        shift = 1
        while shift < _CHUNK:
            earlier_decay, later_decay = self.sliced(decay, 3, 0, -shift), self.sliced(decay, 3, shift, _CHUNK)
            earlier, later = self.sliced(added, 3, 0, -shift), self.sliced(added, 3, shift, _CHUNK)
            later = op.Add(later, self.compose(later_decay, earlier))
            added = op.Concat(self.sliced(added, 3, 0, shift), later, axis=3)
            later_decay = self.compose(later_decay, earlier_decay)
            decay = op.Concat(self.sliced(decay, 3, 0, shift), later_decay, axis=3)
            shift *= 2
        if levels:
            last = op.Constant(value_int=_CHUNK - 1)
            ends = self.states(op.Gather(decay, last, axis=3), op.Gather(added, last, axis=3), levels - 1)
            before = op.Pad(self.sliced(ends, 2, 0, -1), self.numbers(1, 0), None, self.numbers(2))
            added = op.Add(added, self.compose(decay, op.Unsqueeze(before, self.numbers(3))))
        flat = op.Reshape(added, self.numbers(0, 0, -1, *self.added_widths))
        states: ir.Value = op.Slice(flat, self.numbers(0), length, self.numbers(2))
        return states

    def chunked(self, value: ir.Value, pads: ir.Value, widths: list[int]) -> ir.Value:
        """[batch, any, chunks, _CHUNK, ...]. What fills the last chunk comes after all that is kept."""
        filled = self.op.Pad(value, pads, None, self.numbers(2))
        chunks: ir.Value = self.op.Reshape(filled, self.numbers(0, 0, -1, _CHUNK, *widths))
        return chunks

    def sliced(self, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        part: ir.Value = self.op.Slice(value, self.numbers(start), self.numbers(end), self.numbers(axis))
        return part

    def numbers(self, *values: int) -> ir.Value:
        constant: ir.Value = self.op.Constant(value_ints=list(values))
        return constant
