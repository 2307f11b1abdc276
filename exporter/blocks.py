"""Finding the blocks of any architecture by watching one forward pass, and grouping those that are alike.

A block is a call to a child of a container (ModuleList, Sequential, ModuleDict). The container whose children hold the
most parameters, counted once a call, is the model's stack. Nothing here knows the name of an architecture.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from stageline.models.errors import ExportError
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
_TORCH_INTERNALS = frozenset({"_parameters", "_buffers", "_modules", "forward", "training"})


@dataclass
class Call:
    """One call of a block. `inputs` and `outputs` are the leaves of its arguments and of what it returned."""

    module: str
    block: torch.nn.Module
    count: int  # earlier calls of the same module
    inputs: list[Any]
    outputs: list[Any] = field(default_factory=list)
    chain: int | None = None  # which input leaf is the previous block's first output


def watch(task: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> list[Call]:
    """The calls of the model's blocks in order. ExportError when no stack of blocks is found.

    The model runs as if it were exported. So it takes the same path as in the trace, and keeps no tensor of this call
    in its caches.
    """
    owner = {
        f"{path}.{name}" if path else name: path
        for path, container in task.named_modules()
        if isinstance(container, CONTAINERS)
        for name, _ in container.named_children()
    }
    calls: list[tuple[str, int, Call]] = []  # container, depth, call
    depth = 0

    def watched(path: str, module: torch.nn.Module) -> Any:
        original, count = module.forward, itertools.count()

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            call = Call(path, module, next(count), _pytree.tree_leaves((args, kwargs)))
            calls.append((owner[path], depth, call))
            depth += 1
            output = original(*args, **kwargs)
            depth -= 1
            call.outputs = _pytree.tree_leaves(output)
            return output

        return forward

    children = {path: module for path, module in task.named_modules() if path in owner}
    try:
        for path, module in children.items():
            module.forward = watched(path, module)
        with mock.patch.multiple(torch.compiler, _is_compiling_flag=True, _is_exporting_flag=True):
            task(*samples)
    finally:
        for module in children.values():
            vars(module).pop("forward", None)
    stacks: dict[tuple[str, int], list[Call]] = {}
    for container, level, call in calls:
        stacks.setdefault((container, level), []).append(call)
    stacks = {key: stack for key, stack in stacks.items() if any(map(_is_hidden, stack[-1].inputs))}
    if not stacks:
        raise ExportError(
            f"{type(getattr(task, 'model', task)).__name__} cannot be cut: looked for calls to the children of a "
            "ModuleList, Sequential or ModuleDict with a hidden state, and its forward makes none"
        )
    weight = {key: sum(p.numel() for c in stack for p in c.block.parameters()) for key, stack in stacks.items()}
    best = max(stacks, key=lambda key: (weight[key], -key[1]))
    stack = stacks[best]
    for earlier, later in itertools.pairwise(stack):
        leaf = earlier.outputs[0] if earlier.outputs else None
        found = [i for i, value in enumerate(later.inputs) if value is leaf and isinstance(leaf, torch.Tensor)]
        later.chain = found[0] if found else None
    if len(stack) > 1:
        stack[0].chain = stack[1].chain
    return stack


def _is_hidden(leaf: Any) -> bool:
    """Whether it may be a hidden state; tables that are looked up by token ids are not blocks."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def kinds(stack: list[Call]) -> list[int]:
    """For each block the index of the first block like it: same modules, same settings, same arguments.

    This compares Python objects only; the trace then proves it on the graphs (stageline.exporter.cut).
    """
    firsts: list[int] = []
    result = []
    for index, call in enumerate(stack):
        for first in firsts:
            if _same_call(stack[first], call) and _same_module(stack[first].block, call.block, first, index):
                result.append(first)
                break
        else:
            firsts.append(index)
            result.append(index)
    return result


def stampable(stack: list[Call]) -> str | None:
    """None if the trace may replace blocks by their inputs; else the reason why not."""
    for index, call in enumerate(stack[1:], start=1):
        if call.chain is None:
            return f"what block {index - 1} ({stack[index - 1].module}) returns is not what block {index} is given"
    for index, call in enumerate(stack):
        if not isinstance(call.outputs[0], torch.Tensor):
            return f"block {index} ({call.module}) does not return a hidden state first"
        if call.chain is not None and call.inputs[call.chain].shape != call.outputs[0].shape:
            return f"block {index} ({call.module}) changes the shape of the hidden state"
    return None


def _same_call(a: Call, b: Call) -> bool:
    """Whether two blocks got the same arguments, except the hidden state that runs through them."""
    if a.chain != b.chain or len(a.inputs) != len(b.inputs):
        return False
    for position, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=True)):
        if position == a.chain:
            if x.shape != y.shape or x.dtype != y.dtype:
                return False
        elif isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
            if x is not y:
                return False
        elif x is not y and (type(x) is not type(y) or x != y):
            return False
    return True


def _same_module(a: torch.nn.Module, b: torch.nn.Module, index_a: int, index_b: int) -> bool:
    """Whether two modules are built alike: types, shapes, buffers, settings. A setting that is the block's own index in
    both (layer_idx) counts as equal; the trace shows whether the graph depends on it."""
    if a is b:
        return True
    pairs = list(_walk(a, b))
    if not pairs:
        return False
    return all(_same_one(x, y, index_a, index_b) for x, y in pairs)


def _walk(a: torch.nn.Module, b: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Matching submodules of two modules; nothing if their trees differ."""
    tree_a, tree_b = dict(a.named_modules()), dict(b.named_modules())
    if tree_a.keys() == tree_b.keys():
        yield from ((tree_a[name], tree_b[name]) for name in tree_a)


def _same_one(a: torch.nn.Module, b: torch.nn.Module, index_a: int, index_b: int) -> bool:
    if type(a) is not type(b):
        return False
    for mine, other in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        if mine.keys() != other.keys():
            return False
        for name in mine:
            x, y = mine[name], other[name]
            if (x is None) != (y is None):
                return False
            if x is not None and y is not None and (x.shape != y.shape or x.dtype != y.dtype):
                return False
    for name, buffer in a._buffers.items():
        twin = b._buffers[name]
        if buffer is not None and twin is not None and not _same_values(buffer, twin):
            return False
    ours = {
        k: v for k, v in vars(a).items() if k not in _TORCH_INTERNALS and not k.startswith(("_forward", "_backward"))
    }
    theirs = {k: v for k, v in vars(b).items() if k in ours}
    return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k], index_a, index_b) for k in ours)


def _same_values(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are equal. Two without data (weights) count as equal: the trace shows what they are."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    without_data = [tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in (x, y)]
    return all(without_data) or (not any(without_data) and torch.equal(x, y))


def _same(x: Any, y: Any, index_x: int, index_y: int) -> bool:
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if type(x) is int:
        return x == y or (x == index_x and y == index_y)
    if isinstance(x, torch.nn.Module):
        return True  # a submodule, or one named twice: compared where it stands in the tree
    if isinstance(x, torch.Tensor):
        return _same_values(x, y)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(_same(p, q, index_x, index_y) for p, q in zip(x, y, strict=True))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[k], y[k], index_x, index_y) for k in x)
    if isinstance(x, functools.partial):
        return x.func is y.func and _same((x.args, x.keywords), (y.args, y.keywords), index_x, index_y)
    if callable(x) and hasattr(x, "__func__"):
        return bool(x.__func__ is y.__func__)  # bound methods of the two modules
    return bool(x == y)
