"""Drawing tokens on a GPU, behind the last stage and in its stream."""

from contextlib import suppress

from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Array, Device, Value
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.engines.cuda_session import CudaSession
from stageline.runtime.engines.lowering.draw_graph import SETTINGS, draw_graph, greedy_graph

_GREEDY = SETTINGS.index("greedy")


class CudaSampler:
    """Keeps the promises of `Sampler`. Borrows the device."""

    def __init__(self, device: Device, vocabulary: int) -> None:
        """EngineError if ONNX Runtime has no CUDA."""
        assert isinstance(device, CudaDevice)
        self._device = device
        self._greedy = CudaSession(device, "the greedy sampler", greedy_graph(vocabulary))
        self._drawing = CudaSession(device, "the sampler", draw_graph(vocabulary))

    def draw(self, logits: Value, settings: Array) -> tuple[Value, Value]:
        """See `Sampler.draw`."""
        if (settings[:, _GREEDY] == 1).all():
            found = self._greedy.run("draw", {"logits": logits}, ("token", "drawn"), in_place=("logits",))
        else:
            given = {"logits": logits, "settings": settings}
            found = self._drawing.run("draw", given, ("token", "drawn"), in_place=("logits",))
        return found["token"], found["drawn"]

    def close(self) -> None:
        """See `Sampler.close`. No work may be running."""
        with suppress(CudaError, EngineError):  # the GPU may be lost
            self._device.gpu.make_current()
            self._greedy.close()
            self._drawing.close()
