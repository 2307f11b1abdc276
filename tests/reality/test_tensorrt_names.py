"""Every name of TensorRT that the sources use is in NVIDIA's published Python bindings, and takes the arguments that it
is given: in the oldest version that Stageline takes, in the newest, and in some between. And what the fakes pretend to
be is there as well.

The bindings are imported on a library that does nothing (tests/helpers/stub_nvinfer.c): their classes, enumerations and
signatures are all there without a GPU and without NVIDIA's libraries. TensorRT-RTX's are looked at in the same way.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
from stageline.runtime.engines.tensorrt.flavour import TENSORRT, TENSORRT_RTX
from stageline.runtime.engines.tensorrt.targets import RTX_TARGETS
from tensorrt_calls import BY_NAME, DATA_CENTRE_ONLY, ROOT, RTX_BY_NAME, RTX_ONLY, Use, uses
from wheels import unpacked

pytestmark = [pytest.mark.reality, pytest.mark.slow]

STUB = ROOT / "tests" / "helpers" / "stub_nvinfer.c"
PACKAGES = {"tensorrt": "tensorrt-cu13-bindings", "tensorrt-rtx": "tensorrt-rtx-cu13-bindings"}
LIBRARIES = {
    "tensorrt": ("libnvinfer.so.{major}", "libnvonnxparser.so.{major}", "libnvinfer_plugin.so.{major}"),
    "tensorrt-rtx": ("libtensorrt_rtx.so.{major}", "libtensorrt_onnxparser_rtx.so.{major}"),
}
LOOK = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[3]]
trt = __import__(sys.argv[2])
docs = {}
for name in json.loads(sys.stdin.read()):
    value = trt
    for part in name.split("."):
        value = getattr(value, part, None)
        if value is None:
            break
    docs[name] = None if value is None else str(value.__init__.__doc__ if isinstance(value, type) else value.__doc__)
seek, severity = trt.SeekPosition, trt.ILogger.Severity
assert [int(seek.SET), int(seek.CUR), int(seek.END)] == [0, 1, 2]
assert severity.INTERNAL_ERROR <= trt.ILogger.ERROR and not severity.WARNING <= trt.ILogger.ERROR
from stageline.runtime.builder import network
from stageline.runtime.engines.tensorrt import loading
for logger in (loading._logger(trt), network._logger(trt)):
    logger.log(severity.ERROR, "said")
told = []
loading._layer_times(trt, lambda *one: told.append(one)).report_layer_time("a layer", 2.0)
assert told == [("a layer", 0.002)]
monitor = network._monitor(trt, lambda phase, step, steps: True)
monitor.phase_start("build", None, 3)
assert monitor.step_complete("build", 0)
monitor.phase_finish("build")
import io
try:
    reader = loading._reader(trt, io.BytesIO(b"a plan"))
except RuntimeError as error:
    assert "cuda driver" in str(error), error
else:
    assert reader.seek(2, seek.SET) and reader.read(100, 0) == b"plan"
from stageline.models.errors import EngineError
if "rtx" not in sys.argv[2]:  # TensorRT-RTX's are made, and refuse later
    for start in (lambda: network.parse(trt, None, False), lambda: loading.Loaded(trt, None, None, None, "", "")):
        try:
            start()
        except EngineError as error:
            assert "TensorRT does not start: " in str(error) and chr(10) not in str(error), error
        else:
            raise AssertionError("it starts without its libraries")
print(json.dumps({"version": trt.__version__, "docs": docs}))
"""


def bindings(flavour: str, version: str) -> Path:
    """The unpacked wheel of a version (`10.15.*`; empty: the newest)."""
    return unpacked(PACKAGES[flavour] + (f"=={version}" if version else ""))


def look(flavour: str, folder: Path, libraries: Path) -> dict[str, str | None]:
    """The docstring of each name, None for a name that is not there. For a class it is its constructor's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    # tensorrt_cu13_bindings-10.15.1.29.dist-info; TensorRT-RTX's libraries are all .so.1
    (about,) = folder.glob("*.dist-info")
    major = re.split(r"[-.]", about.name)[1]
    for name in LIBRARIES[flavour]:
        library = name.format(major=major)
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(libraries / library), str(STUB)]
        subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, folder, f"{flavour.replace('-', '_')}_bindings", ROOT / "tests" / "helpers"],
        input=json.dumps(sorted({name for use in uses() for name in use.names})),
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    docs: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])["docs"]
    return docs


def signatures(name: str, doc: str) -> list[list[str]]:
    """The parameters of each overload in a docstring of pybind11, `self` included, those with a default as `NAME=`."""
    found = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name.split('.')[-1])}\((.*)\) -> ", line)
        if match and "*args" not in match[1]:
            parameters = re.split(r", (?=\w+:)", match[1])
            found.append([p.split(":")[0] + ("=" if re.search(r" = ", p) else "") for p in parameters if p])
    return found


def wrong(use: Use, docs: dict[str, str | None]) -> str | None:
    """What the bindings would say to this use."""
    there = {name: doc for name in use.names if (doc := docs[name]) is not None}
    if not there:
        return f"{' or '.join(use.names)} is not there"
    if use.positional is None:
        return None
    ((name, doc),) = there.items()
    name = name if "." in name else f"{name}.__init__"
    given = use.positional + (use.names[0] != f"{name.rsplit('.', 1)[0]}.__init__")  # the object itself
    for parameters in signatures(name, doc):
        rest = [parameter for parameter in parameters[given:] if parameter.rstrip("=") not in use.keywords]
        named = {parameter.rstrip("=") for parameter in parameters[given:]}
        if given <= len(parameters) and set(use.keywords) <= named and all(p.endswith("=") for p in rest):
            return None
    return f"{name} takes {signatures(name, doc)}, and is called with {given} and {use.keywords}"


def faults(docs: dict[str, str | None], absent: set[str]) -> set[str]:
    """What is wrong with the uses, apart from names that this flavour lacks and the sources ask for before use."""
    return {fault for use in uses() if not set(use.names) & absent and (fault := wrong(use, docs))}


@pytest.mark.parametrize("version", ["10.15.*", "10.16.*", "11.0.*", ""], ids=["10.15", "10.16", "11.0", "newest"])
def test_tensorrt_has_every_name_and_takes_every_call(version: str, tmp_path: Path) -> None:
    docs = look("tensorrt", bindings("tensorrt", version), tmp_path)
    assert len(docs) > 90
    assert faults(docs, RTX_ONLY) == set()
    assert {name for name in RTX_ONLY if docs[name] is not None} == set()


@pytest.mark.parametrize(
    ("version", "lacks"),
    # network.py says so of a target that the installed version does not know
    [("1.4.*", {"ComputeCapability.SM121 is not there"}), ("", set())],
    ids=["1.4", "newest"],
)
def test_tensorrt_rtx_has_every_name_and_takes_every_call(version: str, lacks: set[str], tmp_path: Path) -> None:
    docs = look("tensorrt-rtx", bindings("tensorrt-rtx", version), tmp_path)
    assert faults(docs, DATA_CENTRE_ONLY) == lacks


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        ("10.14.*", {"LayerType.KV_CACHE_UPDATE"}),
        (
            "10.13.*",
            {
                "LayerType.KV_CACHE_UPDATE",
                "LayerType.ATTENTION_INPUT",
                "IAttentionInputLayer",
                "IAttention.decomposable",
                "ILayer.attention or IAttentionInputLayer.attention",
            },
        ),
    ],
)
def test_older_versions_lack_what_is_called(version: str, lacks: set[str], tmp_path: Path) -> None:
    """So the oldest version that is taken is the right one; and this check finds what is missing."""
    docs = look("tensorrt", bindings("tensorrt", version), tmp_path)
    assert faults(docs, RTX_ONLY) == {f"{name} is not there" for name in lacks}
    assert version < TENSORRT.oldest


def test_what_is_used_by_name_is_used() -> None:
    source = "\n".join((ROOT / file).read_text() for file in ("runtime/builder/network.py", *LOADING))
    for name in (BY_NAME | RTX_BY_NAME) - {"SeekPosition.END", "LayerType.KV_CACHE_UPDATE"}:
        kind, _, member = name.partition(".")
        assert member in source or (kind == "ComputeCapability" and member.lower() in RTX_TARGETS), name


LOADING = tuple(f"runtime/engines/tensorrt/{name}.py" for name in ("loading", "bindings", "engine"))
PRETENDED: dict[type, str] = {
    fake_tensorrt._Runtime: "Runtime",
    fake_tensorrt._Engine: "ICudaEngine",
    fake_tensorrt._Config: "IRuntimeConfig",
    fake_tensorrt._Context: "IExecutionContext",
    fake_tensorrt._RtxConfig: "IRuntimeConfig",
    fake_tensorrt._RtxContext: "IExecutionContext",
    fake_tensorrt._KernelCache: "IRuntimeCache",
}


def test_the_fake_takes_what_the_real_one_takes(tmp_path: Path) -> None:
    real = look("tensorrt-rtx", bindings("tensorrt-rtx", f"{TENSORRT_RTX.oldest}.*"), tmp_path)
    for kind, name in PRETENDED.items():
        for method, function in inspect.getmembers(kind, inspect.isfunction):
            doc = real.get(f"{name}.{method}")
            if doc is not None:
                counts = {len(parameters) for parameters in signatures(method, doc)}
                assert len(inspect.signature(function).parameters) in counts, f"{name}.{method}"
    for fake in (fake_tensorrt._Config, fake_tensorrt._Context, fake_tensorrt.FakeTensorRT):
        names = {one.rpartition(".")[2] if "." in one else one for one in RTX_ONLY}
        assert not names & set(dir(fake)), fake


def test_bindings_without_their_libraries_are_one_line() -> None:
    folder = bindings("tensorrt", "11.0.*")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dataclasses import replace\n"
        "from stageline.runtime.engines.tensorrt import flavour\n"
        "flavour.version = lambda name: '11.0.0.114'\n"
        "try: replace(flavour.TENSORRT, module='tensorrt_bindings').load()\n"
        "except flavour.EngineError as error: print(error)\n"
    )
    done: Any = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert re.fullmatch(r"TensorRT is installed but does not load: libnv\w+\.so\.11: cannot open .*doctor", line), line
