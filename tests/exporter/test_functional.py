"""Which programs go to torch's ONNX exporter as they are, and what is rewritten in them."""

from typing import Any

import pytest
import torch
from stageline.exporter import functional
from torch.onnx._internal.exporter._decomp import (
    create_onnx_friendly_decomposition_table,
    get_onnx_implemented_overloads,
)
from torch.onnx._internal.exporter._registration import ONNXRegistry

IMPLEMENTED = set(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib()))
TABLE: dict[Any, Any] = create_onnx_friendly_decomposition_table(IMPLEMENTED)


class Of(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def program_of(function: Any) -> torch.export.ExportedProgram:
    x = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    return torch.export.export(Of(function), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_every_operator_that_is_kept_has_a_function_of_onnx() -> None:
    kept = {*functional._OF_SIZES, *functional._COMPOSITE, *functional._SAME.values(), torch.ops.aten._to_copy.default}
    assert kept <= IMPLEMENTED


def test_plain_functions_stay_and_what_does_nothing_goes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = torch.dropout(x.to(torch.float32), 0.5, False)
        whole = x.to(torch.int64) * torch.tensor(2)
        return (whole > 2) & (whole.transpose(1, 2).reshape(-1, 3, 4) < 20)

    program = program_of(function)
    x = torch.randn(5, 3, 4) * 20
    want = program.module()(x)
    done = functional.without_retracing(program).run_decompositions(TABLE)
    assert done is program
    assert targets(done)[0] == "aten._to_copy.default"
    assert not [
        t for t in targets(done) if "dropout" in t or "detach" in t or "assert" in t or ".to." in t or "__and__" in t
    ]
    assert torch.equal(done.module()(x), want)


def test_an_output_that_nothing_was_done_to_keeps_its_name() -> None:
    program = program_of(lambda x: (torch.dropout(x + 1, 0.5, False), (x * 2).to(torch.float32), x.to(torch.int64)))
    want = program.module()(x := torch.randn(4, 3, 4))
    names = list(program.graph_signature.user_outputs)
    done = functional.without_retracing(program).run_decompositions(TABLE)
    assert done is program
    outputs = next(node for node in done.graph.nodes if node.op == "output").args[0]
    assert [node.name for node in outputs] == names
    assert all(map(torch.equal, done.module()(x), want))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1).add_(x),  # changes a tensor
        lambda x: torch.dropout(x, 0.5, True) * 0,  # does something
        lambda x: torch.special.log_ndtr(x),  # ONNX has no function for it
        lambda x: torch.broadcast_to(x, (2, *x.shape)),  # composite, and taken apart by torch
    ],
)
def test_every_other_program_is_decomposed_by_torch(function: Any) -> None:
    program = program_of(function)
    before = targets(program)
    done = functional.without_retracing(program).run_decompositions(TABLE)
    assert done is not program
    assert targets(program) == before
    assert not any("add_" in t or "log_ndtr" in t or "broadcast_to" in t for t in targets(done))
