"""A matrix rounded so that its products keep, not each of its numbers: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Columns are rounded one after the other. What rounding one changes in the products is taken back, as far as the inputs
allow, by the columns that are still to be rounded. Those of the largest inputs come first, and the scales and zero
points are those of rounding to nearest, so that the layout is the same.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stageline.exporter.quantise.nearest import Parts, Scheme, steps

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it, as the paper has it."""
_BLOCK = 128  # columns after which the later ones are changed, as one product


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    """The Hessian float32 [K, K] of a product's squared error on inputs float32 [..., K], each token as long as the
    others: a few tokens of a model are a thousand times longer, and would be all that counts."""
    flat = torch.nn.functional.normalize(inputs.reshape(-1, inputs.shape[-1]), dim=1)
    return flat.T @ flat


def gptq(weight: NDArray[np.float32], hessian: torch.Tensor, scheme: Scheme) -> Parts:
    """weight [N, K] rounded for inputs x [n, K] whose hessian x.T @ x float32 [K, K] is given. Holds about four times
    the weight, and three Hessians in float64."""
    rows, columns = weight.shape
    zeros, scales = scheme.grid(weight.reshape(rows, -1, scheme.group))
    step, zero = torch.from_numpy(steps(scales).T.copy()), torch.from_numpy(zeros.T.astype(np.float32))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    groups = (order // scheme.group).tolist()
    spread = _spread(hessian[order][:, order])
    left = torch.from_numpy(weight.T.copy())[order]
    numbers = torch.empty(columns, rows, dtype=torch.uint8)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        lost = torch.empty(stop - start, rows)
        for column in range(start, stop):
            scale, middle, wanted = step[groups[column]], zero[groups[column]], left[column]
            number = (wanted / scale).round_().add_(middle).clamp_(0, scheme.top)
            numbers[order[column]] = number.to(torch.uint8)
            error = (wanted - (number - middle) * scale) / spread[column, column]
            left[column + 1 : stop].addr_(spread[column, column + 1 : stop], error, alpha=-1)
            lost[column - start] = error
        left[stop:] -= spread[start:stop, stop:].T @ lost
    return scheme.pack(np.ascontiguousarray(numbers.numpy().T), zeros, scales)


def _spread(hessian: torch.Tensor) -> Any:
    """The upper Cholesky factor U of the damped Hessian's inverse, which is U.T @ U: float32 [K, K]."""
    exact = hessian.double()
    diagonal = exact.diagonal()
    mean = diagonal.mean()
    diagonal += DAMPING * mean if mean > 0 else 1  # of inputs that are all 0, every column is rounded to nearest
    # H = R R.T with R upper is the lower factor of H read backwards; U is the inverse of R
    factor = torch.linalg.cholesky(exact.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(factor, torch.eye(len(exact), dtype=torch.float64), upper=True).float()
