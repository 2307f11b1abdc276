"""Engines by name."""

import sys

import pytest
from stageline.models.errors import EngineError
from stageline.runtime.engines import engine_factory


def test_an_unknown_engine_gives_the_known_ones() -> None:
    with pytest.raises(EngineError, match=r"^unknown engine 'onyx'; known engines: onnxruntime, onnx.*, tensorrt$"):
        engine_factory("onyx")


def test_an_engine_that_is_not_installed_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stageline.runtime.engines.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r'^the engine onnxruntime is not installed: pip install "stageline\[cpu\]"$'):
        engine_factory("onnxruntime")
