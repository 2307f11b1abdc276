"""A plan becomes an engine on this GPU: read piece by piece while other threads run, with what its contexts share."""

from collections.abc import Callable
from typing import Any, BinaryIO

from stageline.models.errors import EngineError
from stageline.runtime.engines.tensorrt.flavour import started
from stageline.runtime.engines.tensorrt.records import EngineRecord

_PIECE_BYTES = 32 * 2**20  # of the plan in Python's memory at a time


class Loaded:
    """An engine that TensorRT has loaded, and the configuration of its contexts, which share scratch memory and, with
    TensorRT-RTX, the kernels that it compiles for this GPU.

    Belongs to the thread that made it, with the GPU's context current. Owns all until `close()`.
    """

    def __init__(
        self, trt: Any, record: EngineRecord, plan: BinaryIO, kernels: bytes | None, stage: str, device: str
    ) -> None:
        """`plan`: the engine file, which was checked. `kernels`: what `kernels()` gave after an earlier run, or None.
        `stage` and `device` are names, for messages. EngineError if TensorRT refuses the plan."""
        self._trt, self._stage, self._device = trt, stage, device
        self._errors = _logger(trt)
        self._runtime = started(trt.Runtime, self._errors, lambda: str(self._errors.last))
        # A version-compatible plan holds its runtime as host code. The guard has compared the plan's digest.
        self._runtime.engine_host_code_allowed = record.options.version_compatible
        # Given bytes instead of a reader, TensorRT's bindings keep Python's lock until the whole plan is loaded.
        self.engine = self._runtime.deserialize_cuda_engine(_reader(trt, plan))
        if self.engine is None:
            raise self.refused("does not open")
        if record.options.weight_streaming:
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.scratch_bytes: int = self.engine.device_memory_size_v2
        self._kernels: Any = None
        self._times: Any = None
        self._config = self._configured(kernels)

    def context(self, scratch_address: int) -> Any:
        """Another execution context, which uses the scratch memory at this address. EngineError without memory."""
        self.forget_errors()
        context = self.engine.create_execution_context(self._config)
        if context is None:
            raise self.refused("has no memory for another execution context")
        context.set_device_memory(scratch_address, self.scratch_bytes)
        if self._times is not None:
            context.profiler = self._times
        return context

    def time_layers(self, report: Callable[[str, float], None]) -> None:
        """Tell `report` the name and the seconds of each layer that runs in contexts made from here on. TensorRT then
        returns from a run when the GPU has done it."""
        self._times = _layer_times(self._trt, report)

    @property
    def times_layers(self) -> bool:
        """Whether `time_layers` was called."""
        return self._times is not None

    def kernels(self) -> bytes | None:
        """The kernels that were compiled for this GPU, to be given to the next `Loaded`. None: TensorRT's plans hold
        theirs."""
        serialized = None if self._kernels is None else self._kernels.serialize()
        return None if serialized is None else bytes(serialized)

    def forget_errors(self) -> None:
        """From here on a refusal quotes only errors that are logged later."""
        self._errors.last = ""

    def refused(self, what: str) -> EngineError:
        """The error of a refused call, with TensorRT's reason if it logged one."""
        why = f": {self._errors.last}" if self._errors.last else ""
        return EngineError(f"{self._stage} {what} in TensorRT on {self._device}{why}")

    def close(self) -> None:
        """Free the engine. Its contexts are gone."""
        del self._config, self._kernels, self.engine, self._runtime  # in this order

    def _configured(self, kernels: bytes | None) -> Any:
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "create_runtime_cache"):  # TensorRT-RTX, which compiles kernels when they are first needed
            self._kernels = config.create_runtime_cache()
            if kernels is not None:
                self._kernels.deserialize(kernels)  # False, and empty, if they are of another driver or GPU
            config.set_runtime_cache(self._kernels)
            # Lazily compiled kernels take the place of slower ones in later runs; a captured graph would keep the slow.
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config


def _reader(trt: Any, plan: BinaryIO) -> Any:
    class PlanReader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return plan.read(min(num_bytes, _PIECE_BYTES))  # TensorRT asks again for what is missing

        def seek(self, offset: int, where: Any) -> bool:
            plan.seek(offset, int(where))  # SET, CUR and END have the numbers of C
            return True

    return PlanReader()


def _layer_times(trt: Any, report: Callable[[str, float], None]) -> Any:
    class LayerTimes(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms / 1e3)

    return LayerTimes()


def _logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's last error."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())

    return Errors()
