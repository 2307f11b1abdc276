"""From a lowered stage to an engine: what an installed TensorRT cannot do is said in one line."""

from types import SimpleNamespace
from typing import Any

import pytest
from stageline.models.errors import EngineError
from stageline.runtime.builder import network


def test_a_target_that_this_tensorrt_rtx_does_not_know_is_one_line() -> None:
    """TensorRT-RTX 1.4 has no ComputeCapability.SM121."""
    trt: Any = SimpleNamespace(ComputeCapability=SimpleNamespace(SM120=120), __version__="1.4.0.76")
    chosen: list[tuple[int, int]] = []
    config = SimpleNamespace(
        num_compute_capabilities=0, set_compute_capability=lambda one, place: chosen.append((one, place))
    )
    network._set_target(trt, config, "sm120")
    assert chosen == [(120, 0)]
    with pytest.raises(EngineError, match=r"^TensorRT-RTX 1\.4\.0\.76 does not build for sm121; a newer one may: pip"):
        network._set_target(trt, config, "sm121")
