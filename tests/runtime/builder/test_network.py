"""From a lowered stage to an engine: what an installed TensorRT cannot do is said in one line."""

from types import SimpleNamespace
from typing import Any

import pytest
from stageline.models.errors import EngineError
from stageline.runtime.builder import network


def test_a_tensorrt_that_does_not_start_is_one_line_with_its_reason() -> None:
    """With an old driver the bindings raise TypeError, and the reason is in the log alone."""

    class Trt:
        class ILogger:
            ERROR = 1

            def __init__(self) -> None:
                pass

        @staticmethod
        def Builder(logger: Any) -> Any:  # noqa: N802
            logger.log(1, "CUDA initialization failure with error: 35.\n Please check your CUDA installation")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(EngineError) as caught:
        network.parse(Trt, None, False)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "TensorRT does not start: CUDA initialization failure with error: 35. Please check your CUDA installation; "
        "see: stageline doctor"
    )


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
