"""The graph of a scan, run by ONNX Runtime, against the loop that it stands for."""

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from stageline.exporter.scan_graph import LONGEST, SCAN, lower_scans

LENGTHS = (1, 7, 31, 32, 33, 64, 700, 2100, 40_000)  # 2100, 40,000: chunks of chunks, of those


@cache
def _session(*tails: tuple[int, ...]) -> ort.InferenceSession:
    """Of a graph that is one Scan, whose two inputs have these dimensions after those of batch, rows and tokens."""
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "any", "length", *tail]))
        for name, tail in zip(("decay", "added"), tails, strict=True)
    ]
    scan = ir.Node(SCAN[0], SCAN[1], inputs)
    scan.outputs[0].name, scan.outputs[0].type, scan.outputs[0].shape = "states", inputs[1].type, inputs[1].shape
    graph = ir.Graph(inputs, scan.outputs, nodes=[scan], opset_imports={"": 23, SCAN[0]: 1}, name="scan")
    model = ir.Model(graph, ir_version=10)
    lower_scans(model)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_scan_of_vectors_is_the_loop(length: int) -> None:
    random = np.random.default_rng(length)
    decay, added = random.random((2, 2, 3, length, 4), np.float32)
    state, states = np.zeros((2, 3, 4)), []
    for t in range(length):
        state = decay[:, :, t] * state + added[:, :, t]
        states.append(state)
    _same(_session((4,), (4,)).run(None, {"decay": decay, "added": added}), states)


@pytest.mark.parametrize("length", LENGTHS[:-1])
def test_a_scan_of_matrices_is_the_loop(length: int) -> None:
    random = np.random.default_rng(length)
    decay = random.random((2, 1, length, 3, 3), np.float32) / 3 - 0.1
    added = random.random((2, 1, length, 3, 2), np.float32)
    state, states = np.zeros((2, 1, 3, 2)), []
    for t in range(length):
        state = decay[:, :, t] @ state + added[:, :, t]
        states.append(state)
    _same(_session((3, 3), (3, 2)).run(None, {"decay": decay, "added": added}), states)


def _same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    expected = np.stack(want, 2)
    assert got[0].shape == expected.shape
    assert np.abs(got[0] - expected).max() <= 5e-6 * np.abs(expected).max()


def test_what_is_longest_fills_the_chunks_of_chunks() -> None:
    ones = np.ones((1, 1, LONGEST, 1), np.float32)
    (states,) = _session((1,), (1,)).run(None, {"decay": ones, "added": ones})
    assert states[0, 0, -1, 0] == LONGEST
