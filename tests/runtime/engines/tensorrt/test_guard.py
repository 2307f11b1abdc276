"""No engine is handed out that was not built for this GPU, by this TensorRT, from this bundle, or was changed since."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from stageline.models.errors import EngineError, StagelineError
from stageline.runtime.builder import build
from stageline.runtime.bundle.float32_nodes import write_float32_nodes
from stageline.runtime.bundle.folder import Bundle, file_entry
from stageline.runtime.bundle.recut import recut
from stageline.runtime.doctor import diagnose
from stageline.runtime.engines.tensorrt import flavour
from stageline.runtime.engines.tensorrt.guard import checked_engine, weight_digests
from stageline.runtime.engines.tensorrt.lower import Precision
from stageline.runtime.engines.tensorrt.records import (
    EngineRecord,
    EnginesManifest,
    OptimizationProfile,
    Options,
    SizeRange,
)
from stageline.runtime.engines.tensorrt.store import EngineStore, read_engines
from stageline.runtime.engines.tensorrt.targets import TargetGpu, check_target

ADA, BLACKWELL, TURING = TargetGpu("RTX 4090", "sm89"), TargetGpu("RTX 5090", "sm120"), TargetGpu("RTX 2080", "sm75")
VERSION = "1.7.1.116"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX is installed in that version, TensorRT is not: the guard reads versions and loads nothing."""
    monkeypatch.setattr(flavour, "version", lambda name: _version(name, VERSION))


def _version(name: str, rtx: str) -> str:
    if name != "tensorrt-rtx":
        raise flavour.PackageNotFoundError(name)
    return rtx


def put(
    path: Path,
    target: str = "sm89",
    stage: int = 1,
    precision: Precision = "fp16",
    flavour_name: flavour.FlavourName = "tensorrt-rtx",
    options: Options | None = None,
) -> EngineRecord:
    """Put an engine of a stage into the bundle: 64 bytes that say what they are, since none is deserialised here."""
    bundle = Bundle.open(path)
    (path / "engines").mkdir(exist_ok=True)
    name = f"engines/{stage}.{target}.{precision}.{flavour_name}.plan"
    (path / name).write_bytes(f"{stage} {target} {precision}".encode().ljust(64))
    cut = bundle.manifest.stages[stage]
    graph = next(entry for entry in bundle.manifest.files if entry.path == cut.file)
    record = EngineRecord(
        stage=cut.file,
        plan=file_entry(path, name),
        report=file_entry(path, name),
        key="0" * 64,
        graph_sha256=str(graph.sha256),
        weight_files=weight_digests(bundle.manifest),
        flavour=flavour_name,
        version=VERSION,
        target=target,
        precision=precision,
        options=options or Options(),
        profiles=(OptimizationProfile(name="rows", sizes={"batch": SizeRange(min=1, opt=2, max=2)}),),
        inputs=cut.inputs,
        outputs=cut.outputs,
        build_s=1,
    )
    EngineStore(path, read_engines(path)).put(record)
    return record


def refusal(path: Path, gpu: TargetGpu = ADA, precision: Precision | None = None) -> str:
    with pytest.raises(EngineError) as caught, checked_engine(Bundle.open(path), 1, gpu, precision).opened():
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_engine_that_fits_is_handed_out_with_its_bytes(bundle: Path) -> None:
    record = put(bundle)
    checked = checked_engine(Bundle.open(bundle), 1, ADA)
    assert (checked.record, checked.flavour.name) == (record, "tensorrt-rtx")
    with checked.opened() as file:
        assert file.read() == (bundle / record.plan.path).read_bytes()


def test_the_gpus_own_engine_comes_before_a_portable_one(bundle: Path) -> None:
    put(bundle)
    put(bundle, "portable")
    assert checked_engine(Bundle.open(bundle), 1, ADA).record.target == "sm89"
    assert checked_engine(Bundle.open(bundle), 1, BLACKWELL).record.target == "portable"
    assert "this GPU is sm75 (RTX 2080)" in refusal(bundle, TURING)  # portable begins at compute capability 8.0


@pytest.mark.parametrize(
    ("name", "runs", "refuses"),
    [
        (
            "tensorrt-rtx",
            ("sm80", "sm86", "sm89", "sm120", "sm121", "sm122"),
            ("sm75", "sm87", "sm90", "sm100", "sm110"),
        ),
        ("tensorrt", ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120"), ("sm70", "sm75")),
    ],
)
def test_portable_is_what_the_flavour_supports(
    name: flavour.FlavourName, runs: tuple[str, ...], refuses: tuple[str, ...]
) -> None:
    kind = flavour.FLAVOURS[name]
    assert [gpu for gpu in (*runs, *refuses) if kind.runs("portable", TargetGpu("a GPU", gpu))] == list(runs)
    assert all(kind.runs(gpu, TargetGpu("a GPU", gpu)) for gpu in (*runs, *refuses))  # if it could be built


def test_a_portable_engine_of_rtx_is_refused_on_a_gpu_for_data_centres(bundle: Path) -> None:
    put(bundle, "portable")
    assert refusal(bundle, TargetGpu("NVIDIA H100", "sm90")) == (
        f"stage 1 was built for portable in fp16 with TensorRT-RTX {VERSION}; this GPU is sm90 (NVIDIA H100), and such "
        f"engines run on RTX GPUs (sm80, sm86, sm89 and sm12x). Rebuild: stageline build {bundle} --target sm90"
    )


def test_a_stage_without_an_engine_says_how_to_build_one(bundle: Path) -> None:
    command = f"Build: stageline build {bundle} --target sm89"
    assert refusal(bundle) == f"stage 1 has no TensorRT engine in {bundle}. {command}"
    put(bundle, stage=0)
    assert "stage 1 has no TensorRT engine" in refusal(bundle)


def test_an_engine_for_another_target_is_refused(bundle: Path) -> None:
    put(bundle)
    assert refusal(bundle, BLACKWELL) == (
        f"stage 1 was built for sm89 in fp16 with TensorRT-RTX {VERSION}; this GPU is sm120 (RTX 5090). "
        f"Rebuild: stageline build {bundle} --target sm120"
    )


def test_an_engine_of_another_version_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bundle)
    monkeypatch.setattr(flavour, "version", lambda name: _version(name, "1.8.0.2"))
    assert f"with TensorRT-RTX {VERSION}; TensorRT-RTX 1.8.0.2 is installed here. Rebuild: " in refusal(bundle)


@pytest.mark.parametrize(("here", "runs"), [("1.8.0.2", True), ("1.6.9.9", False), ("2.0.0.0", False)])
def test_a_version_compatible_engine_runs_on_later_ones_of_its_major_version(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, here: str, runs: bool
) -> None:
    put(bundle, options=Options(version_compatible=True))
    monkeypatch.setattr(flavour, "version", lambda name: _version(name, here))
    if runs:
        assert checked_engine(Bundle.open(bundle), 1, ADA).record.options.version_compatible
    else:
        assert f"TensorRT-RTX {here} is installed here" in refusal(bundle)


def test_an_engine_of_a_flavour_that_is_not_installed_is_refused(bundle: Path) -> None:
    put(bundle, flavour_name="tensorrt")
    assert 'TensorRT is not installed: pip install "stageline[gpu]"' in refusal(bundle)


def test_an_engine_of_another_precision_is_refused_when_one_is_asked_for(bundle: Path) -> None:
    put(bundle)
    assert "fp16 with TensorRT-RTX" in refusal(bundle, precision="bf16")
    assert "bf16 is requested" in refusal(bundle, precision="bf16")


def test_an_engine_that_keeps_other_nodes_in_float32_is_refused(bundle: Path) -> None:
    put(bundle)
    opened = Bundle.open(bundle)
    write_float32_nodes(opened, "bf16", ["1/x"])
    assert checked_engine(Bundle.open(bundle), 1, ADA).record
    write_float32_nodes(opened, "fp16", ["1/x"])
    assert "the bundle keeps other nodes in float32 now. Rebuild: stageline build" in refusal(bundle)


def test_changed_weights_refuse_a_full_engine_and_fit_a_stripped_one(
    bundle: Path, change_weight: Callable[[Path, int], str]
) -> None:
    put(bundle)
    change_weight(bundle, 1)
    assert "the bundle's weights have changed since" in refusal(bundle)
    put(bundle, precision="bf16", options=Options(stripped=True))
    assert checked_engine(Bundle.open(bundle), 1, ADA).record.options.stripped


def test_a_flipped_byte_a_truncated_and_a_missing_file_each_say_so(bundle: Path) -> None:
    record = put(bundle)
    file = bundle / record.plan.path
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(data)
    advice = f"Rebuild: stageline build {bundle} --target sm89 --precision fp16"
    name = record.plan.path
    message = f"the engine of stage 1: {name} was changed since it was built (SHA-256 differs). {advice}"
    assert refusal(bundle) == message
    file.write_bytes(data[:20])
    assert refusal(bundle) == f"the engine of stage 1: {name} is truncated: 20 bytes, 64 were built. {advice}"
    file.unlink()
    assert refusal(bundle) == f"the engine of stage 1: {name} is missing. {advice}"


def test_an_engine_that_leads_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    file = bundle / put(bundle).plan.path
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "is outside the bundle" in refusal(bundle)


def test_engines_of_another_cut_are_not_used(bundle: Path) -> None:
    put(bundle)
    recut(bundle, 1)
    with pytest.raises(EngineError, match="stage 0 has no TensorRT engine"):
        checked_engine(Bundle.open(bundle), 0, ADA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is not valid"),
        ('{"format": "stageline-engines", "version": 2}', "has version 2; this stageline reads version 1"),
        ('{"format": "other", "version": 1}', "has format 'other'"),
        ('{"format": "stageline-engines", "version": 1, "run": 1}', "is not valid (run:"),
        ('{"format": "stageline-engines", "version": 1, "timings": [{"path": "../x", "size_bytes": 1}]}', "leaves"),
    ],
)
def test_a_broken_manifest_of_engines_is_one_line_and_the_bundle_opens(bundle: Path, text: str, message: str) -> None:
    (bundle / "engines").mkdir()
    (bundle / "engines/manifest.json").write_text(text)
    assert Bundle.open(bundle).manifest.stages
    with pytest.raises(StagelineError) as caught:
        read_engines(bundle)
    assert message in str(caught.value)
    assert "stageline build" in str(caught.value)


def test_the_manifest_survives_being_written_and_read(bundle: Path) -> None:
    records = (put(bundle), put(bundle, "portable", 0))
    assert read_engines(bundle) == EnginesManifest(engines=records)


def test_the_flavour_follows_target_and_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flavour.choose("sm89", None).name == "tensorrt-rtx"
    assert flavour.choose("portable", ADA).name == "tensorrt-rtx"
    assert flavour.choose("here", ADA).name == "tensorrt-rtx"
    for target, gpu, message in (
        ("here", None, "no NVIDIA GPU with a driver"),
        ("sm90", None, "builds for it only on such a GPU, and this machine has no NVIDIA GPU"),
        ("sm90", ADA, r"this machine has RTX 4090 \(sm89\)"),
        ("sm90", TargetGpu("H100", "sm90"), r"TensorRT is not installed: pip install \"stageline\[gpu\]\""),
    ):
        with pytest.raises(EngineError, match=message):
            flavour.choose(target, gpu)
    monkeypatch.setattr(flavour, "version", lambda name: "10.15.1")  # both are installed
    assert flavour.choose("sm90", TargetGpu("H100", "sm90")).name == "tensorrt"
    assert flavour.choose("here", ADA).name == "tensorrt"
    assert flavour.choose("sm120", ADA).name == "tensorrt-rtx"
    assert flavour.choose("portable", ADA).name == "tensorrt-rtx"
    assert flavour.choose("portable", TargetGpu("H100", "sm90")).name == "tensorrt"  # RTX's would not run there
    assert flavour.choose("portable", None).name == "tensorrt-rtx"
    with pytest.raises(EngineError, match="unknown target 'ada'"):
        check_target("ada")


@pytest.mark.parametrize(
    ("name", "target", "gpu", "message"),
    [
        (
            "tensorrt-rtx",
            "sm90",
            TargetGpu("H100", "sm90"),
            "target sm90: TensorRT-RTX builds for portable, sm75, sm80",
        ),
        ("tensorrt-rtx", "sm100", None, "target sm100: TensorRT-RTX builds for portable, sm75"),
        ("tensorrt", "sm89", TargetGpu("H100", "sm90"), "target sm89: TensorRT builds for it only on such a GPU, and"),
        ("tensorrt", "portable", None, "and this machine has no NVIDIA GPU; run stageline build there"),
        ("tensorrt", "portable", TURING, r"only on such a GPU, and this machine has RTX 2080 \(sm75\)"),
        ("tensorrt", "portable", ADA, None),
        ("tensorrt", "sm89", ADA, None),
        ("tensorrt-rtx", "sm121", None, None),
    ],
)
def test_a_flavour_that_is_named_must_build_for_the_target(
    name: flavour.FlavourName, target: str, gpu: TargetGpu | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "gpu_here", lambda: gpu)
    monkeypatch.setattr(flavour, "version", lambda name: "10.15.1")
    wanted = build.WantedEngine(flavour.FLAVOURS[name], target, "fp16")
    if message is None:
        build.check(wanted, Options(), "float32")
    else:
        with pytest.raises(EngineError, match=message):
            build.check(wanted, Options(), "float32")


def test_without_tensorrt_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(flavour.TENSORRT_RTX, module="no_such_tensorrt")
    with pytest.raises(EngineError, match=r'TensorRT-RTX is not installed: pip install "stageline\[rtx\]"'):
        absent.load()


def test_either_package_of_a_flavour_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def there(name: str) -> str:
        if name != "tensorrt-cu13":
            raise flavour.PackageNotFoundError(name)
        return "10.16.1.11"

    monkeypatch.setattr(flavour, "version", there)
    assert flavour.TENSORRT.version == "10.16.1.11"
    assert not flavour.TENSORRT_RTX.installed
    assert {engine.version for engine in diagnose().engines if engine.name == "tensorrt"} == {"10.16.1.11", None}


def test_an_older_tensorrt_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the layers that write caches in place, a build would end in the middle of TensorRT's bindings."""
    monkeypatch.setattr(flavour, "version", lambda name: "10.9.0.34")
    message = (
        'TensorRT 10.9.0.34 is installed, and Stageline needs 10.15 or newer: pip install --upgrade "stageline[gpu]"'
    )
    with pytest.raises(EngineError) as caught:
        flavour.TENSORRT.load()
    assert str(caught.value) == message
    with pytest.raises(EngineError, match=r"needs 10\.15 or newer"):
        build.check(build.WantedEngine(flavour.TENSORRT, "sm90", "fp16"), Options(), "float32")
    assert message in diagnose().problems
    monkeypatch.setattr(flavour, "version", lambda name: "10.15.1.29")
    assert flavour.TENSORRT.too_old is None


def test_the_oldest_versions_are_those_that_the_extras_install() -> None:
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    for kind in flavour.FLAVOURS.values():
        wanted = [Requirement(line) for line in project["optional-dependencies"][kind.extra]]
        (found,) = (one for one in wanted if one.name == kind.distributions[0])
        assert f">={kind.oldest}" in str(found.specifier)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import ctypes; ctypes.CDLL('libnvinfer.so.99')", "libnvinfer.so.99: cannot open shared object file: No such"),
        ("raise ImportError('libnvonnxparser.so.11:\\n cannot open it')", "libnvonnxparser.so.11: cannot open it"),
        ("import tensorrt_of_nobody", "No module named 'tensorrt_of_nobody'"),
    ],
)
def test_tensorrt_without_its_libraries_is_one_line(
    source: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError) as caught:
        replace(flavour.TENSORRT_RTX, module="broken_tensorrt").load()
    assert str(caught.value).startswith(f"TensorRT-RTX is installed but does not load: {why}")
    assert str(caught.value).endswith("; see: stageline doctor")
    assert "\n" not in str(caught.value)
