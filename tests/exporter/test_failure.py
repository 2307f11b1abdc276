"""Why a model cannot be traced, said about the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stageline.exporter.failure import reason_of


def _raised(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause
    return error


def test_an_operator_without_a_function_is_named() -> None:
    inside = ValueError("No ONNX function found for <OpOverload(op='aten.special_airy_ai', overload='default')>. x")
    error = _raised(RuntimeError("Failed to convert\npages of advice"), inside)
    assert reason_of(error) == "it uses aten.special_airy_ai, which ONNX has no function for"


def test_an_operator_that_torch_does_not_export_as_used_is_named() -> None:
    inside = RuntimeError("Cannot find a compatible OpOverload for aten.sub with the provided arguments. Tried\nmore")
    error = _raised(RuntimeError("Failed to decompose the FX graph\npages of advice"), inside)
    assert reason_of(error) == "it uses aten.sub in a way that torch does not export to ONNX"


def test_a_loop_over_the_length_is_said_to_be_one() -> None:
    def loop(x: torch.Tensor) -> torch.Tensor:
        return sum((x[:, t] for t in range(x.shape[1])), torch.zeros(2))

    class Looping(torch.nn.Module):
        forward = staticmethod(loop)

    length = torch.export.Dim("length")
    with pytest.raises(torch._dynamo.exc.UserError) as raised:
        torch.export.export(Looping(), (torch.ones(2, 7),), dynamic_shapes=({1: length},))
    assert "rows of one length only" in reason_of(raised.value)


def test_errors_of_torch_are_named_without_their_text() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) @ torch.ones(3)
    assert reason_of(raised.value) == "RuntimeError inside torch"


def test_mixed_types_suggest_float32() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.bfloat16)
    assert reason_of(raised.value) == "its code mixes types; try --dtype float32"


def test_what_torch_says_when_transformers_calls_it_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "transformers"
    folder.mkdir()
    file = folder / "modeling_odd.py"
    file.write_text("def wrong(x):\n    return x.eq(None)\n\ndef own(x):\n    raise ValueError('text is needed')\n")
    odd: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), odd)
    with pytest.raises(TypeError) as raised:
        odd["wrong"](torch.ones(2))
    assert reason_of(raised.value) == "TypeError (modeling_odd.py, line 2: return x.eq(None))"
    with pytest.raises(ValueError, match="text") as raised_by_itself:
        odd["own"](torch.ones(2))
    assert reason_of(raised_by_itself.value).startswith("text is needed (modeling_odd.py, line 5")
