"""The names of TensorRT that our sources use, and how they call them, read from the sources themselves."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTEXT = "IExecutionContext"
MODULE = ""
RECEIVERS: dict[str, dict[str, tuple[str, ...]]] = {
    "runtime/engines/tensorrt/loading.py": {
        "trt": (MODULE,),
        "self._trt": (MODULE,),
        "self._runtime": ("Runtime",),
        "self.engine": ("ICudaEngine",),
        "self._kernels": ("IRuntimeCache",),
        "context": (CONTEXT,),
        "config": ("IRuntimeConfig",),
        "strategies": ("DynamicShapesKernelSpecializationStrategy",),
    },
    "runtime/engines/tensorrt/bindings.py": {"context": (CONTEXT,)},
    "runtime/engines/tensorrt/engine.py": {"binding.context": (CONTEXT,)},
    "runtime/builder/network.py": {
        "trt": (MODULE,),
        "network.trt": (MODULE,),
        "builder": ("Builder",),
        "network.builder": ("Builder",),
        "config": ("IBuilderConfig",),
        "made": ("IOptimizationProfile",),
        "timing_cache": ("ITimingCache",),
        "network.definition": ("INetworkDefinition",),
        "parser": ("OnnxParser",),
        "network.parser": ("OnnxParser",),
        "error": ("ParserError",),
        "layer": ("ILayer", "IAttentionInputLayer"),
        "layer.attention": ("IAttention",),
    },
    "runtime/builder/report.py": {
        "trt": (MODULE,),
        "network.definition": ("INetworkDefinition",),
        "layer": ("ILayer",),
        "tensor": ("ITensor",),
        "engine": ("ICudaEngine",),
        "engine.create_engine_inspector()": ("EngineInspector",),
    },
    "runtime/builder/worker.py": {"trt": (MODULE,), "runtime": ("Runtime",)},
}
"""File -> the expression of an object of TensorRT -> its class, or classes of which one has the name."""

BY_NAME = {
    "BuilderFlag.WEIGHT_STREAMING",
    "BuilderFlag.VERSION_COMPATIBLE",
    "ILogger.log",
    "IProfiler.report_layer_time",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
    "IProgressMonitor.phase_finish",
    "IStreamReaderV2.read",
    "IStreamReaderV2.seek",
    "SeekPosition.END",
    "LayerType.KV_CACHE_UPDATE",  # what the parser makes of TensorScatter, in which every cache is written
}
"""Used without being written as an attribute: by getattr, by overriding, or by the ONNX parser."""

RTX_BY_NAME = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    *(f"ComputeCapability.{name}" for name in ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")),
    f"{CONTEXT}.is_stream_capturable",
}
RTX_ONLY = RTX_BY_NAME | {
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
"""What only TensorRT-RTX has; the sources ask for these before they use them."""
DATA_CENTRE_ONLY = {"HardwareCompatibilityLevel", "HardwareCompatibilityLevel.AMPERE_PLUS"}


@dataclass(frozen=True)
class Use:
    """A name, in one of its classes, and the arguments of a call of it: how many by position, and names of others.
    None: it is not called."""

    names: tuple[str, ...]
    positional: int | None = None
    keywords: tuple[str, ...] = ()


def uses() -> set[Use]:
    """Every use in the sources."""
    found = {Use((name,)) for name in BY_NAME | RTX_BY_NAME}
    for file, receivers in RECEIVERS.items():
        tree = ast.parse((ROOT / file).read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            classes = receivers.get(ast.unparse(node.value), ())
            if isinstance(node.value, ast.Attribute) and MODULE in receivers.get(ast.unparse(node.value.value), ()):
                classes = (node.value.attr,)  # trt.BuilderFlag.REFIT
            if classes:
                names = tuple(f"{kind}.{node.attr}".removeprefix(".") for kind in classes)
                found.add(_use(names, calls.get(id(node))))
    return found


def _use(names: tuple[str, ...], call: ast.Call | None) -> Use:
    if call is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return Use(names)
    return Use(names, len(call.args), tuple(sorted(str(keyword.arg) for keyword in call.keywords)))
