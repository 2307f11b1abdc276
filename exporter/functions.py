"""Functions of torch that ONNX has none for, in terms of those that it has."""

from typing import Any

import torch

# Giles, "Approximating the erfinv function" (2010), table 5: float32, for w = -log(1 - x^2) below 5 and from there on
_CENTRAL = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
            -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
         1.00167406, 2.83297682)  # fmt: skip


def erfinv(x: torch.Tensor) -> torch.Tensor:
    """The inverse of the error function, to float32's precision; infinite at -1 and 1."""
    given = x.float()
    w = -torch.log((1 - given) * (1 + given))
    central, tail = _polynomial(_CENTRAL, w - 2.5), _polynomial(_TAIL, torch.sqrt(w.clamp(min=5)) - 3)
    finite = given * torch.where(w < 5, central, tail)
    return torch.where(given.abs() == 1, given * float("inf"), finite).to(x.dtype)


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


def complex_unsqueeze(x: torch.Tensor, dim: int) -> Any:
    """A new dimension of a complex tensor (the rotary embeddings of Llama 4 and DeepSeek-V2); of others nothing, which
    torch takes as leave to keep its own."""
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_complex(torch.view_as_real(x).unsqueeze(dim if dim >= 0 else dim + x.dim() + 1))


def without_unknown(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with such functions replaced; itself if it has none."""
    if any(map(_is_unknown, program.graph.nodes)):
        program = program.run_decompositions(_REPLACEMENTS)
    return program


def _is_unknown(node: torch.fx.Node) -> bool:
    complex_only = node.target is torch.ops.aten.unsqueeze.default
    return node.target in _REPLACEMENTS and (not complex_only or node.meta["val"].is_complex())


_REPLACEMENTS = {torch.ops.aten.erfinv.default: erfinv, torch.ops.aten.unsqueeze.default: complex_unsqueeze}
