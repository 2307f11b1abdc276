"""GPTQ: rounding to nearest where inputs tell nothing, and outputs that are nearer where they do."""

import numpy as np
import pytest
import torch
from stageline.exporter.quantise.gptq import DAMPING, gptq, hessian_of
from stageline.exporter.quantise.nearest import ROLES, Bits, Parts, Scheme
from stageline.models import packing


def drawn(rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return rng.standard_normal((rows, columns)).astype(np.float32)


def correlated(columns: int, count: int = 1024) -> torch.Tensor:
    """Inputs [count, columns] that mostly lie near a few directions, as a model's do."""
    rng = np.random.default_rng(columns)
    few = rng.standard_normal((count, columns // 8)) @ rng.standard_normal((columns // 8, columns))
    return torch.from_numpy((few + 0.3 * rng.standard_normal((count, columns))).astype(np.float32))


def values(scheme: Scheme, parts: Parts, shape: tuple[int, int]) -> np.ndarray:
    return packing.dequantised(scheme.packing(shape, "float32"), dict(zip(ROLES, parts, strict=True)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hessian", [torch.eye(256) * 7, torch.zeros(256, 256), torch.rand(256).diag()])
def test_inputs_without_correlation_round_to_nearest(bits: Bits, hessian: torch.Tensor) -> None:
    weight, scheme = drawn(33, 256), Scheme(bits, 32)
    for made, wanted in zip(gptq(weight, hessian, scheme), scheme.round(weight), strict=True):
        np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 64, 32), (40, 320, 64), (64, 256, 128)])
def test_products_of_correlated_inputs_are_nearer(bits: Bits, rows: int, columns: int, group: int) -> None:
    weight, inputs, scheme = drawn(rows, columns), correlated(columns), Scheme(bits, group)
    made, nearest = gptq(weight, inputs.T @ inputs, scheme), scheme.round(weight)

    def error(parts: Parts) -> float:
        return float(np.square(inputs.numpy() @ (values(scheme, parts, weight.shape) - weight).T).sum())

    assert error(made) < 0.4 * error(nearest)
    np.testing.assert_array_equal(made.zeros, nearest.zeros)
    np.testing.assert_array_equal(made.scales, nearest.scales)


def test_it_is_the_algorithm_of_the_paper() -> None:
    """Column by column with an inverse of the Hessian that shrinks (the paper's equations 2 and 3), in float64."""
    weight, inputs, scheme = drawn(5, 192), correlated(192), Scheme(4, 64)
    hessian = (inputs.T @ inputs).double().numpy()
    order = np.argsort(-hessian.diagonal(), kind="stable")
    zeros, scales = scheme.grid(weight.reshape(5, 3, 64))
    step, zero = (np.repeat(part.astype(np.float64), 64, axis=1) for part in (scales, zeros))
    left = weight.astype(np.float64)
    inverse = np.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * np.eye(192))
    wanted = np.empty_like(left)
    for column in order:
        number = (np.rint(left[:, column] / step[:, column]) + zero[:, column]).clip(0, 15)
        wanted[:, column] = (number - zero[:, column]) * step[:, column]
        error = (left[:, column] - wanted[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    made = values(scheme, gptq(weight, inputs.T @ inputs, scheme), weight.shape)
    assert (made == wanted).mean() > 0.99  # a sum in float32 may fall on the other side of a half


def test_inputs_fewer_than_columns_are_enough() -> None:
    weight, scheme = drawn(16, 256), Scheme(4, 32)
    inputs = correlated(256, count=3)
    made = values(scheme, gptq(weight, inputs.T @ inputs, scheme), weight.shape)
    nearest = values(scheme, scheme.round(weight), weight.shape)
    moved = inputs.numpy() @ (made - weight).T, inputs.numpy() @ (nearest - weight).T
    assert np.square(moved[0]).sum() < 0.01 * np.square(moved[1]).sum()


def test_a_token_that_is_far_longer_counts_as_the_others_do() -> None:
    inputs = correlated(32)
    long = inputs.clone()
    long[::7] *= 1000
    torch.testing.assert_close(hessian_of(long.reshape(2, -1, 32)), hessian_of(inputs))
    units = inputs.double().numpy() / np.linalg.norm(inputs.double().numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(hessian_of(inputs).numpy(), units.T @ units, rtol=1e-3, atol=1e-3)
    assert hessian_of(torch.zeros(3, 8)).equal(torch.zeros(8, 8))
