"""The interface to CUDA: a Protocol of the driver calls that are used, implemented by cuda.bindings.

Handles and addresses are integers, sizes are bytes. There is no logic here: the rest of this package is tested against
a fake driver (tests/helpers/fake_cuda.py) with the same Protocol.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from stageline.models.errors import EngineError

INSTALL = 'pip install "stageline[gpu]"'
OLDEST_CUDA = (12, 8)
"""The CUDA of the oldest driver that has all calls. The youngest is cuEventElapsedTime_v2, in cuda.bindings."""
_STICKY = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT",
        "CONTAINED",
        "CONTEXT_IS_DESTROYED",
        "DEINITIALIZED",
        "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "MPS_CLIENT_TERMINATED",
        "NVLINK_UNCORRECTABLE",
        "TENSOR_MEMORY_LEAK",
        "UNKNOWN",
    )
)


class CudaError(Exception):
    """An error of a CUDA call. `name` is CUDA's own, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{name} in {call}")
        self.call, self.name = call, name

    @property
    def sticky(self) -> bool:
        """Whether every later call of the process on that device fails too."""
        return self.name in _STICKY


class Driver(Protocol):
    """CUDA's driver. Each call raises CudaError if CUDA refuses it, maybe because of an earlier failure.

    A stream or event belongs to the context that was current when it was made, and is used with it.
    """

    def count(self) -> int:
        """Number of GPUs."""
        ...

    def name(self, ordinal: int) -> str:
        """The GPU's model."""
        ...

    def capability(self, ordinal: int) -> tuple[int, int]:
        """Its compute capability."""
        ...

    def retain(self, ordinal: int) -> int:
        """The GPU's primary context, which libraries use too; `release` gives it back."""
        ...

    def release(self, ordinal: int) -> None: ...

    def make_current(self, context: int) -> None:
        """Make the context current in this thread."""
        ...

    def allocate(self, size: int) -> int:
        """Device memory, aligned to 256 bytes. May wait for the device."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_host(self, size: int) -> int:
        """Pinned host memory that every GPU can copy from and to. May wait for the device."""
        ...

    def free_host(self, address: int) -> None: ...

    def new_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Let the host wait for all work in the stream."""
        ...

    def new_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """The event happens when the stream reaches this point."""
        ...

    def wait(self, stream: int, event: int) -> None:
        """Work that is enqueued from now on waits for the event as last recorded."""
        ...

    def done(self, event: int) -> bool:
        """Whether the event has happened."""
        ...

    def synchronize_event(self, event: int) -> None:
        """Let the host wait for the event."""
        ...

    def elapsed_s(self, began: int, ended: int) -> float:
        """Seconds between two events that have happened."""
        ...

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """From pinned host memory to the device."""
        ...

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """From the device to pinned host memory."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Within a device."""
        ...

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int, stream: int) -> None:
        """Within a device: `width` bytes of each of `rows` rows that begin `pitch` bytes apart."""
        ...

    def copy_peer(self, target: int, to_context: int, source: int, context: int, size: int, stream: int) -> None:
        """From one device to another."""
        ...

    def zero(self, target: int, size: int, stream: int) -> None: ...

    def can_reach(self, ordinal: int, other: int) -> bool:
        """Whether the GPU can read the other's memory directly."""
        ...

    def enable_peer(self, context: int) -> None:
        """Let this thread's context access another's memory. May be called again."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record work that is enqueued instead of running it, until `end_capture`."""
        ...

    def end_capture(self, stream: int) -> int:
        """The recorded graph, ready to be launched."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def push_range(self, name: str) -> None:
        """Start a range that profilers show (NVTX)."""
        ...

    def pop_range(self) -> None: ...


@cache
def load() -> Driver:
    """The driver of this machine. EngineError names what is missing: CUDA for Python, a driver, or a GPU."""
    try:
        from cuda.bindings import driver as cuda
    except ImportError as error:
        raise EngineError(f"CUDA for Python is not installed: {INSTALL}") from error
    try:
        bindings = Bindings(cuda)
        old = too_old(bindings.cuda_version())
        if old is not None:
            raise EngineError(old)
        count = bindings.count()
    except CudaError as error:
        raise EngineError(f"the NVIDIA driver does not work ({error}); see: stageline doctor") from error
    except (RuntimeError, OSError) as error:  # there is no driver library
        raise EngineError("there is no NVIDIA driver on this machine; see: stageline doctor") from error
    if count == 0:
        raise EngineError("the NVIDIA driver shows no GPU (is CUDA_VISIBLE_DEVICES set?); see: stageline doctor")
    return bindings


def too_old(version: tuple[int, ...]) -> str | None:
    """What is wrong with a driver for this version of CUDA; None: nothing."""
    if version >= OLDEST_CUDA:
        return None
    here, oldest = (".".join(map(str, one)) for one in (version, OLDEST_CUDA))
    return f"the NVIDIA driver is for CUDA {here}, and Stageline needs one for {oldest} or newer; update the driver"


class Bindings:
    """`Driver`, implemented with the module cuda.bindings.driver (`cuda`)."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._success, self._not_ready = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_NOT_READY
        self._capture_mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._push, self._pop = _nvtx()
        self._call(cuda.cuInit, 0)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of the call. cuda.bindings returns the status first, then the results."""
        status, *results = function(*arguments)
        if status != self._success:
            raise CudaError(function.__name__, getattr(status, "name", str(status)))
        return results[0] if results else None

    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that the driver runs: (13, 2)."""
        number = int(self._call(self._cuda.cuDriverGetVersion))  # 13020
        return number // 1000, number % 1000 // 10

    def count(self) -> int:
        return int(self._call(self._cuda.cuDeviceGetCount))

    def name(self, ordinal: int) -> str:
        name: bytes = self._call(self._cuda.cuDeviceGetName, 256, self._call(self._cuda.cuDeviceGet, ordinal))
        return name.split(b"\0", 1)[0].decode()

    def capability(self, ordinal: int) -> tuple[int, int]:
        device, attribute = self._call(self._cuda.cuDeviceGet, ordinal), self._cuda.CUdevice_attribute
        major = self._call(
            self._cuda.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device
        )
        minor = self._call(
            self._cuda.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device
        )
        return int(major), int(minor)

    def retain(self, ordinal: int) -> int:
        return int(self._call(self._cuda.cuDevicePrimaryCtxRetain, self._call(self._cuda.cuDeviceGet, ordinal)))

    def release(self, ordinal: int) -> None:
        self._call(self._cuda.cuDevicePrimaryCtxRelease, self._call(self._cuda.cuDeviceGet, ordinal))

    def make_current(self, context: int) -> None:
        self._call(self._cuda.cuCtxSetCurrent, context)

    def allocate(self, size: int) -> int:
        return int(self._call(self._cuda.cuMemAlloc, size))

    def free(self, address: int) -> None:
        self._call(self._cuda.cuMemFree, address)

    def allocate_host(self, size: int) -> int:
        return int(self._call(self._cuda.cuMemHostAlloc, size, self._cuda.CU_MEMHOSTALLOC_PORTABLE))

    def free_host(self, address: int) -> None:
        self._call(self._cuda.cuMemFreeHost, address)

    def new_stream(self) -> int:
        return int(self._call(self._cuda.cuStreamCreate, self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def destroy_stream(self, stream: int) -> None:
        self._call(self._cuda.cuStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        self._call(self._cuda.cuStreamSynchronize, stream)

    def new_event(self) -> int:
        return int(self._call(self._cuda.cuEventCreate, self._cuda.CUevent_flags.CU_EVENT_DEFAULT.value))

    def destroy_event(self, event: int) -> None:
        self._call(self._cuda.cuEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        self._call(self._cuda.cuEventRecord, event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call(self._cuda.cuStreamWaitEvent, stream, event, 0)

    def done(self, event: int) -> bool:
        (status,) = self._cuda.cuEventQuery(event)
        if status == self._not_ready:
            return False
        if status != self._success:
            raise CudaError("cuEventQuery", status.name)
        return True

    def synchronize_event(self, event: int) -> None:
        self._call(self._cuda.cuEventSynchronize, event)

    def elapsed_s(self, began: int, ended: int) -> float:
        return float(self._call(self._cuda.cuEventElapsedTime, began, ended)) / 1e3

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.cuMemcpyHtoDAsync, target, source, size, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.cuMemcpyDtoHAsync, target, source, size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.cuMemcpyDtoDAsync, target, source, size, stream)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int, stream: int) -> None:
        how, device = self._cuda.CUDA_MEMCPY2D(), self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        how.srcMemoryType = how.dstMemoryType = device
        how.srcDevice, how.dstDevice = source, target
        how.srcPitch = how.dstPitch = pitch
        how.WidthInBytes, how.Height = width, rows
        self._call(self._cuda.cuMemcpy2DAsync, how, stream)

    def copy_peer(self, target: int, to_context: int, source: int, context: int, size: int, stream: int) -> None:
        self._call(self._cuda.cuMemcpyPeerAsync, target, to_context, source, context, size, stream)

    def zero(self, target: int, size: int, stream: int) -> None:
        self._call(self._cuda.cuMemsetD8Async, target, 0, size, stream)

    def can_reach(self, ordinal: int, other: int) -> bool:
        devices = [self._call(self._cuda.cuDeviceGet, number) for number in (ordinal, other)]
        return bool(self._call(self._cuda.cuDeviceCanAccessPeer, *devices))

    def enable_peer(self, context: int) -> None:
        try:
            self._call(self._cuda.cuCtxEnablePeerAccess, context, 0)
        except CudaError as error:
            if error.name != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":
                raise

    def begin_capture(self, stream: int) -> None:
        self._call(self._cuda.cuStreamBeginCapture, stream, self._capture_mode)

    def end_capture(self, stream: int) -> int:
        graph = self._call(self._cuda.cuStreamEndCapture, stream)
        try:
            return int(self._call(self._cuda.cuGraphInstantiate, graph, 0))
        finally:
            self._call(self._cuda.cuGraphDestroy, graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call(self._cuda.cuGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call(self._cuda.cuGraphExecDestroy, graph)

    def push_range(self, name: str) -> None:
        self._push(name)

    def pop_range(self) -> None:
        self._pop()


def _nvtx() -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """The functions that start and end a range; they do nothing without NVTX."""
    try:
        import nvtx
    except ImportError:
        return lambda name: None, lambda: None
    return nvtx.push_range, nvtx.pop_range
