"""The GPUs of this machine for tests marked `gpu`, which skip, naming what is missing, where there is none."""

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Value
from stageline.runtime.devices.cuda.arrays import CudaArray
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import Driver, load
from stageline.runtime.devices.cuda.launch import Launch
from stageline.runtime.engines import Device

FLOAT = np.dtype("float32")
# y = a * x + b for n numbers; plain PTX, which the driver compiles: no compiler is needed.
PTX = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry scale(
    .param .u64 p_x, .param .u64 p_y, .param .f32 p_a, .param .f32 p_b, .param .u32 p_n)
{
    .reg .pred %p<2>;
    .reg .f32 %f<5>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [p_x];
    ld.param.u64 %rd2, [p_y];
    ld.param.f32 %f1, [p_a];
    ld.param.f32 %f2, [p_b];
    ld.param.u32 %r1, [p_n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    cvta.to.global.u64 %rd3, %rd1;
    cvta.to.global.u64 %rd4, %rd2;
    mul.wide.u32 %rd5, %r5, 4;
    add.s64 %rd6, %rd3, %rd5;
    add.s64 %rd7, %rd4, %rd5;
    ld.global.f32 %f3, [%rd6];
    fma.rn.f32 %f4, %f3, %f1, %f2;
    st.global.f32 [%rd7], %f4;
DONE:
    ret;
}
\0"""


def need_gpus(count: int = 1) -> Driver:
    """This machine's driver, or a skip."""
    try:
        driver = load()
    except EngineError as error:
        pytest.skip(str(error))
    if driver.count() < count:
        pytest.skip(f"{count} GPUs are needed, this machine has {driver.count()}")
    return driver


class Scale:
    """A stage on a GPU that gives a * x + b, by a kernel of its own. Keeps the promises of `Engine`."""

    def __init__(self, reads: str, gives: str, a: float, b: float, device: Device) -> None:
        from cuda.bindings import driver as cuda

        assert isinstance(device, CudaDevice)
        self.input_names, self.output_names, self.max_rows = (reads,), (gives,), None
        self.packs, self.block_tokens = False, None
        self._a, self._b, self._device, self._cuda = a, b, device, cuda
        device.gpu.make_current()
        status, self._module = cuda.cuModuleLoadData(PTX)
        assert status == cuda.CUresult.CUDA_SUCCESS, status
        status, self._kernel = cuda.cuModuleGetFunction(self._module, b"scale")
        assert status == cuda.CUresult.CUDA_SUCCESS, status

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> Mapping[str, Value]:
        with Launch(self._device, "scale") as launch:
            given = launch.local(inputs[self.input_names[0]], FLOAT)
            result = launch.take(given.shape, FLOAT)
            launch.begin()
            self.enqueue(given.buffer.address, result.address, int(np.prod(given.shape)))
            done = launch.end()
        return {self.output_names[0]: CudaArray(self._device, result, given.shape, FLOAT, done)}

    def enqueue(self, x: int, y: int, count: int) -> None:
        """The kernel alone, on device memory."""
        types = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_float, ctypes.c_float, ctypes.c_uint32)
        blocks, arguments = max(1, -(-count // 256)), (x, y, self._a, self._b, count)
        (status,) = self._cuda.cuLaunchKernel(
            self._kernel, blocks, 1, 1, 256, 1, 1, 0, self._device.stream, (arguments, types), 0
        )
        assert status == self._cuda.CUresult.CUDA_SUCCESS, status

    def close(self) -> None:
        self._device.gpu.make_current()
        self._device.gpu.driver.synchronize(self._device.stream)
        self._cuda.cuModuleUnload(self._module)
