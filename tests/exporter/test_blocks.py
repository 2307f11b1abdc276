"""Blocks are found and grouped by what a forward pass does, not by what a model is called."""

from typing import Any

import pytest
import torch
from stageline.exporter.blocks import Call, kinds, stampable, watch
from stageline.models.errors import ExportError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import compile_compatible_method_lru_cache


class Block(torch.nn.Module):
    def __init__(self, index: int, width: int = 4, scale: float = 1.0):
        super().__init__()
        self.layer_idx, self.scale = index, scale
        self.linear = torch.nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden) * self.scale + mask


class Model(torch.nn.Module):
    """Blocks in a list, given one of two masks in turn."""

    def __init__(self, blocks: list[torch.nn.Module], masks: int = 1):
        super().__init__()
        self.embed = torch.nn.Linear(4, 4)
        self.layers = torch.nn.ModuleList(blocks)
        self.masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masks = [torch.full((1,), float(i)) for i in range(self.masks)]
        hidden = self.embed(x)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, masks[index % self.masks])
        return hidden


def calls(model: torch.nn.Module) -> list[Call]:
    return watch(model, (torch.ones(2, 4),))


def test_blocks_are_found_in_order() -> None:
    stack = calls(Model([Block(i) for i in range(4)]))
    assert [call.module for call in stack] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert kinds(stack) == [0, 0, 0, 0]
    assert stampable(stack) is None


def test_an_index_is_alike_but_another_setting_is_not() -> None:
    stack = calls(Model([Block(i, scale=2.0 if i == 2 else 1.0) for i in range(4)]))
    assert kinds(stack) == [0, 0, 2, 0]


def test_blocks_given_other_masks_are_of_other_kinds() -> None:
    assert kinds(calls(Model([Block(i) for i in range(5)], masks=2))) == [0, 1, 0, 1, 0]


def test_one_module_called_many_times_is_many_blocks() -> None:
    shared = Block(0)
    stack = calls(Model([shared, shared, shared]))
    assert [(call.module, call.count) for call in stack] == [("layers.0", 0), ("layers.0", 1), ("layers.0", 2)]
    assert kinds(stack) == [0, 0, 0]


def test_the_stack_with_most_parameters_wins_over_a_small_head() -> None:
    class Headed(Model):
        def __init__(self) -> None:
            super().__init__([Block(i) for i in range(3)])
            self.head = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(super().forward(x))

    assert [call.module for call in calls(Headed())] == ["layers.0", "layers.1", "layers.2"]


def test_tables_that_are_looked_up_are_no_blocks() -> None:
    class Tables(Model):
        def __init__(self) -> None:
            super().__init__([Block(i) for i in range(2)])
            self.tables = torch.nn.ModuleList(torch.nn.Embedding(1000, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + sum(table(torch.zeros(1, dtype=torch.long)) for table in self.tables)

    assert [call.module for call in calls(Tables())] == ["layers.0", "layers.1"]


def test_blocks_whose_forward_is_called_by_name_are_found() -> None:
    class ByName(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer.forward(x, torch.zeros(1))
            return x

    model = ByName([Block(i) for i in range(3)])
    assert stampable(calls(model)) is None
    assert "forward" not in vars(model.layers[0]), "the model is as it was"


def test_watching_leaves_no_tensor_in_the_caches_of_the_model() -> None:
    @compile_compatible_method_lru_cache(maxsize=1)
    def table(module: torch.nn.Module) -> torch.Tensor:
        return torch.ones(1)

    class Cached(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + table(self)

    model = Cached([Block(i) for i in range(2)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        calls(model)
    assert type(table(model)) is torch.Tensor


def test_buffers_without_data_are_alike_but_not_like_those_with_data() -> None:
    blocks = [Block(i) for i in range(4)]
    with FakeTensorMode():
        for block in blocks[:2]:
            block.register_buffer("stored", torch.ones(1))
    for block in blocks[2:]:
        block.register_buffer("stored", torch.ones(1))
    assert kinds(calls(Model(blocks))) == [0, 0, 2, 2]


def test_work_between_blocks_forbids_stamping() -> None:
    class Between(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, torch.zeros(1)) * 2
            return x

    reason = stampable(calls(Between([Block(i) for i in range(3)])))
    assert reason == "what block 0 (layers.0) returns is not what block 1 is given"


def test_a_model_without_a_stack_is_refused_saying_what_was_looked_for() -> None:
    with pytest.raises(ExportError, match="looked for calls to the children of a ModuleList, Sequential or ModuleDict"):
        calls(Plain())


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear: Any = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]
