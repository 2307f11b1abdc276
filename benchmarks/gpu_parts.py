"""Runs one part of gpu_proof.py: gpu_parts.py NAME MATERIALS FILE.

Here are the parts that need no bundles; gpu_parity.py, gpu_speed.py and gpu_beside.py have the others.
"""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from gpu_beside import tensorrt, torch_beside
from gpu_parity import decoder_parity, encoder_parity, generation
from gpu_results import Memory, MissingError, Results, need_gpu, need_torch
from gpu_speed import decode, encode
from stageline.models.errors import StagelineError
from stageline.runtime.bench.energy import Meters
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.doctor import diagnose

ROOT = Path(__file__).parents[1]
TESTS = "tests/runtime/devices/cuda/test_real_gpu.py"
SIZES = {"4 KiB": 1 << 12, "1 MiB": 1 << 20, "256 MiB": 1 << 28}
_PRODUCT = 8192  # rows and columns of the matrices whose product is timed
_COPIED_BYTES = 1 << 30  # by torch


def driver(materials: Path, results: Results) -> None:
    """What is installed, and copies between pinned or pageable host memory and the device, on it, and between two."""
    found = diagnose()
    results.add(python=found.python, system=found.system, driver=found.driver.version, cuda=found.driver.cuda)
    for gpu in found.gpus:
        results.add(**asdict(gpu))
    for engine in found.engines:
        results.add(engine=engine.name, package=engine.package, version=engine.version)
    for problem in found.problems:
        results.add(problem=problem)
    need_gpu()
    (device,) = open_gpus([(0, 0)], (0,))
    results.add(gpu=device.gpu.driver.name(0), capability=".".join(map(str, device.gpu.driver.capability(0))))
    for name, size in SIZES.items():
        _host_copies(device, name, size, results)
    for size in (SIZES["1 MiB"], SIZES["256 MiB"]):
        one, other = (device.gpu.memory.take(size) for _ in range(2))
        copy = partial(device.gpu.driver.copy, other.address, one.address, size, device.stream)
        seconds = _timed(device, copy, 50)
        results.add(copy="on the device", size_bytes=size, us=seconds * 1e6, gb_per_s=2 * size / seconds / 1e9)
        del one, other
    count = device.gpu.driver.count()
    device.close()
    if count > 1:
        _peer_copies(results)


def _host_copies(device: CudaDevice, name: str, size: int, results: Results) -> None:
    driver, on_device = device.gpu.driver, device.gpu.memory.take(size)
    pageable, pinned = np.zeros(size, np.uint8), device.gpu.pinned.take(size)
    for kind, host in (("pinned", pinned.address), ("pageable", pageable.ctypes.data)):
        up = partial(driver.upload, on_device.address, host, size, device.stream)
        down = partial(driver.download, host, on_device.address, size, device.stream)
        for way, copy in (("to the device", up), ("to the host", down)):
            seconds = _timed(device, copy, 5 if size > SIZES["1 MiB"] else 50)
            results.add(copy=f"{kind}, {way}", size=name, us=seconds * 1e6, gb_per_s=size / seconds / 1e9)


def _peer_copies(results: Results) -> None:
    here, there = open_gpus([(0, 0), (1, 1)], (0,))
    size, direct = SIZES["256 MiB"], here.gpu.reaches(there.gpu)
    there.gpu.make_current()
    source = there.gpu.memory.take(size)
    here.gpu.make_current()
    target = here.gpu.memory.take(size)
    contexts = (here.gpu.context, there.gpu.context)
    copy = partial(
        here.gpu.driver.copy_peer, target.address, contexts[0], source.address, contexts[1], size, here.stream
    )
    seconds = _timed(here, copy, 10)
    results.add(
        copy="from another GPU", direct=direct, size_bytes=size, us=seconds * 1e6, gb_per_s=size / seconds / 1e9
    )
    del source, target
    for device in (here, there):
        device.close()


def _timed(device: CudaDevice, copy: Callable[[], None], repeats: int) -> float:
    """Seconds of a copy, by events, after one that is not counted."""
    driver = device.gpu.driver
    copy()
    began, ended = driver.new_event(), driver.new_event()
    driver.record(began, device.stream)
    for _ in range(repeats):
        copy()
    driver.record(ended, device.stream)
    driver.synchronize(device.stream)
    seconds = driver.elapsed_s(began, ended) / repeats
    for event in (began, ended):
        driver.destroy_event(event)
    return seconds


def cuda_tests(materials: Path, results: Results) -> None:
    """`pytest -m gpu` of the CUDA layer."""
    need_gpu()
    report = ROOT / ".cache" / "gpu_tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    command = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", TESTS]
    subprocess.run([sys.executable, "-m", "pytest", *command], cwd=ROOT, check=False)
    if not report.exists():
        raise MissingError("pytest gave no report; see cuda_tests.log")
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = next((child for child in case if child.tag == "skipped"), None)
        row = {"test": case.get("name"), "seconds": float(case.get("time", 0))}
        if skipped is not None:
            results.add(**row, skipped=skipped.get("message"))
        else:
            said = {} if bad is None else {"why": (bad.get("message") or "").split("\n")[0][:300]}
            results.add(**row, ok=bad is None, **said)


def rates(materials: Path, results: Results) -> None:
    """torch's copy on the device, and its products of matrices."""
    torch = need_torch()
    source = torch.randn(_COPIED_BYTES // 2, device="cuda", dtype=torch.float16)
    copy = partial(torch.empty_like(source).copy_, source)

    def timed(call: Callable[[], object], repeats: int) -> float:
        for _ in range(3):
            call()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(repeats):
            call()
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended)) / repeats / 1e3

    results.add(torch=torch.__version__, gpu=torch.cuda.get_device_name(0))
    seconds = timed(copy, 20)
    results.add(copy="torch, on the device", size_bytes=_COPIED_BYTES, gb_per_s=2 * _COPIED_BYTES / seconds / 1e9)
    del source, copy
    for dtype in ("bfloat16", "float16", "float32"):
        one, other = (torch.randn(_PRODUCT, _PRODUCT, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        seconds = timed(partial(torch.matmul, one, other), 10)
        results.add(type=dtype, size=_PRODUCT, tflop_per_s=2 * _PRODUCT**3 / seconds / 1e12)


PARTS: dict[str, Callable[[Path, Results], None]] = {
    part.__name__: part
    for part in (
        driver, cuda_tests, encoder_parity, decoder_parity, generation, decode, encode, rates, torch_beside, tensorrt,
    )
}  # fmt: skip


def main() -> None:
    """Run one part, and say what it left of memory."""
    name, materials, file = sys.argv[1:]
    results, meters = Results(Path(file)), Meters()
    memory = Memory(meters)
    try:
        PARTS[name](Path(materials), results)
        memory.add(results, "of the part")
    except MissingError as why:
        results.skip(str(why))
    except StagelineError as error:
        sys.exit(str(error))
    finally:
        meters.close()


if __name__ == "__main__":
    main()
