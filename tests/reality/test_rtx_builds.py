"""TensorRT-RTX builds what half-precision checkpoints are lowered to: in their type and quantised, for one GPU and all.

It needs no GPU for that. The graphs have caches, whose operators are the youngest that TensorRT has to know. What else
a build does (files, processes, records) is tested in tests/runtime/builder.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from llamas import ONE_BLOCK
from stageline.runtime.builder import network
from stageline.runtime.builder.profiles import narrowed, profiles_of
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import StageFile
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.lower import QUANTISED, Precision, lower
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload

pytestmark = [
    pytest.mark.reality,
    pytest.mark.slow,
    pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt-rtx is not installed"),
]
LOAD = Workload(micro_batch=2, length=8, slots=2, capacity=16)
CAPABILITIES_AT = 32
"""The byte of a plan that has a bit for each compute capability it runs on: sm80, 86, 89, 120, 121 are bits 1 to 5."""


@pytest.mark.parametrize(
    ("dtype", "precision", "target"),
    [
        ("bfloat16", "bf16", "sm89"),
        ("bfloat16", "bf16", "portable"),
        *(("bfloat16", precision, "sm89") for precision in QUANTISED),
        ("float16", "fp16", "portable"),
        *(("float16", precision, "sm89") for precision in QUANTISED),
    ],
)
def test_a_generator_builds(dtype: str, precision: Precision, target: str, export_once: Callable[..., Path]) -> None:
    bundle = Bundle.open(export_once(ONE_BLOCK, dtype=dtype))
    (stage,) = bundle.manifest.stages
    trt = TENSORRT_RTX.load()
    lowered = lower(StageFile(0, bundle.path / stage.file, bundle.path, stage.caches), precision, 16, stripped=False)
    decode = narrowed(profiles_of(bundle.manifest, LOAD), lowered.inputs)[:1]
    parsed = network.parse(trt, lowered, stripped=False)
    plan, _ = network.build(parsed, lowered, target, 16, decode, Options(), None, lambda *step: True)
    runs_on = bytes(plan)[CAPABILITIES_AT]
    if target == "sm89":
        assert runs_on == 0b1000
    else:  # as stageline.runtime.engines.tensorrt.flavour has it: no Turing, which is bit 0
        assert runs_on & 0b111111 == 0b111110
