"""`stageline profile` and `stageline plan`: what they print, and what they refuse in one line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hasty import hasty_profiles
from stageline.exporter.commands.cli import main
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.planning import calibrate
from stageline.runtime.planning.calibrate import Speed
from stageline.runtime.planning.measure import measure
from stageline.runtime.planning.profile import Grid, Machine, MachineProfile, read_profile, write_profile


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """The commands' profiles too."""
    with hasty_profiles():
        yield


@pytest.fixture(scope="module")
def profiled(hasty: None, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny bundle with a profile of this machine."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("profiled") / "bundle"))
    bundle = Bundle.open(path)
    write_profile(bundle, measure(bundle, [1], [Grid((1, 4), (4, 16))]))
    return path


def document(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([*map(str, arguments)]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_profile_is_stored_in_the_bundle(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert main(["profile", str(path), "--threads", "1"]) == 0
    message = capsys.readouterr().out
    assert f"{path}/profiles/" in message
    assert str(Machine.here()) in message
    profile, warning = read_profile(path, Machine.here())
    assert warning is None
    assert {point.threads for point in profile.points} == {1}


def test_plan_for_processors_of_this_machine(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", profiled, "--devices", "cpu:0,cpu:1", "--length", "16", "--micro-batch", "4")
    message = document(capsys, *asked)
    assert sum(message["layers"]) == 3
    assert message["tokens_per_s"] == pytest.approx(64 / message["bottleneck_s"])
    assert message["warning"] is None
    assert main([*map(str, asked), "--explain"]) == 0
    lines = capsys.readouterr().out
    assert "stage  device  blocks  compute ms  copy ms  bubble" in lines
    assert "is the bottleneck" in lines
    assert "next best: --layers" in lines


def test_profile_of_quantised_weights_is_stored_beside(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(profiled, tmp_path / "bundle"))
    before, _ = read_profile(path, Machine.here())
    assert main(["profile", str(path), "--threads", "1", "--quantise", "int8"]) == 0
    message = capsys.readouterr().out
    assert f"{Machine.here('int8')}\n" in message
    assert "-int8-weights.json: " in message
    profile, warning = read_profile(path, Machine.here("int8"))
    assert (profile.machine.quantise, warning) == ("int8", None)
    assert read_profile(path, Machine.here()) == (before, None)
    assert main(["plan", str(path), "--devices", "cpu:0", "--length", "16", "--quantise", "int8"]) == 0
    assert capsys.readouterr().err == ""


def test_plan_takes_the_times_of_its_weights(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(profiled, tmp_path / "bundle"))
    as_they_are, _ = read_profile(path, Machine.here())
    twice_as_fast = [point.model_copy(update={"seconds": point.seconds / 2}) for point in as_they_are.points]
    fields = {"machine": Machine.here("int8"), "points": twice_as_fast}
    write_profile(Bundle.open(path), MachineProfile.model_validate({**dict(as_they_are), **fields}))
    asked = ("plan", path, "--devices", "cpu:0", "--length", "16", "--micro-batch", "4")
    slow, fast = document(capsys, *asked), document(capsys, *asked, "--quantise", "int8")
    assert (slow["warning"], fast["warning"]) == (None, None)
    assert fast["tokens_per_s"] == pytest.approx(2 * slow["tokens_per_s"], rel=0.01)


def test_profile_of_other_weights_is_used_with_a_warning_that_names_both(
    profiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(profiled), "--devices", "cpu:0", "--length", "16", "--quantise", "int4"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "stageline: warning: the profile is for weights that are not quantised, not for int4 weights: "
        f"times may be far off; run stageline profile {profiled} --quantise int4"
    )


def test_profile_of_another_machine_is_used_with_a_warning_that_names_both(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(profiled, tmp_path / "bundle"))
    (file,) = (path / "profiles").iterdir()
    text = file.read_text().replace(Machine.here().cpu, "Another CPU")
    file.unlink()
    (path / "profiles" / "other.json").write_text(text)
    assert main(["plan", str(path), "--devices", "cpu:0", "--length", "16"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: the profile is from another machine (Another CPU" in line
    assert f"not from this one ({Machine.here()})" in line


@pytest.mark.parametrize("objective", ["throughput", "latency", "cost", "energy"])
def test_plan_for_devices_that_are_not_here(
    tiny_llama: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = document(capsys, "plan", tiny_llama, "--devices", "2xL4,H100", "--objective", objective, "--explain")
    assert sum(message["layers"]) == 6
    assert message["price_per_million_tokens"] > 0
    assert message["energy_j_per_token"] > 0
    assert message["next_best"]["layers"]


def test_cost_and_throughput_want_different_devices(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, fast = (
        document(capsys, "plan", tiny_llama, "--devices", "T4,B200", "--objective", objective)
        for objective in ("cost", "latency")
    )
    assert cheap["price_per_million_tokens"] <= fast["price_per_million_tokens"]
    assert fast["cycle_s"] <= cheap["cycle_s"]


def test_how_many_of_which_device_serve_a_rate(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--rate", "2000", "--ttft-p99-ms", "50", "--length", "64", "--new-tokens", "16", "--capacity", "128")
    message = document(capsys, "plan", tiny_llama, "--devices", "T4,H100", *asked)["serving"]
    assert {size["kind"] for size in message} == {"T4", "H100"}
    assert message == sorted(message, key=lambda size: size["price_per_h"])
    for size in message:
        assert size["devices"] == size["pipelines"] * size["stages"]
        assert size["report"]["ttft"]["p99"] <= 0.05


def test_without_devices_and_without_a_profile_it_plans_for_this_machine_and_says_that_it_guesses(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(tiny_llama, tmp_path / "llama", ignore=shutil.ignore_patterns("profiles"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reached = Speed(count=1, threads=1, flops_per_s=5e10, bytes_per_s=1e10)
    asked = []

    def measured(count: int, threads: int, quantise: str | None) -> Speed:
        asked.append((count, threads, quantise))
        return reached.model_copy(update={"count": count})

    monkeypatch.setattr(calibrate, "measured_speed", measured)
    monkeypatch.setattr(calibrate, "undisturbed", lambda work, until: (work(), 0.0))
    assert main(["plan", str(bundle), "--quantise", "int8", "--json"]) == 0
    assert set(asked) == {(len(allowed_cores()), 1, "int8")}
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert {name for stage in found["stages"] for name in stage["devices"]} <= {f"cpu:{n}" for n in allowed_cores()}
    assert found["tokens_per_s"] > 0
    for text in (
        "is not measured on this machine",
        "a roofline of this machine's cores, w",
        f"stageline profile {bundle} --quantise int8",
    ):
        assert text in found["warning"]
        assert text in shown.err


def test_layers_are_pinned(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = document(capsys, "plan", tiny_llama, "--devices", "3xL4", "--layers", "1,3,2")
    assert message["layers"] == [1, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "L4", "--cluster", "c.toml"), "give --devices or --cluster, not both"),
        (("--devices", "H1000"), "unknown device 'H1000'; known devices: H100"),
        (("--devices", "L4", "--layers", "2,x"), "'2,x' is not a list of numbers such as 8,7,9"),
        (("--devices", "2xL4", "--layers", "2,5"), "layers 2,5 do not fit: give each stage at least 1 block, 6 in all"),
        (("--devices", "L4", "--layers", "3,3"), "no plan exists"),
        (("--devices", "L4", "--capacity", "4096"), "--capacity is 4096, the model can place 512 tokens; lower it"),
        (("--devices", "L4", "--slots", "100000000", "--dtype", "float16"), "no plan fits: at the best cut"),
        (("--devices", "L4", "--quantise", "int4"), "has no rate for int4; known: bfloat16"),
        (("--devices", "L4", "--objective", "beauty"), "'--objective'"),
        (("--devices", "L4", "--dtype", "float16", "--quantise", "int8"), "give --dtype or --quantise, not both"),
    ],
)
def test_what_cannot_be_planned_is_reported_in_one_line(
    tiny_llama: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "plan", tiny_llama, *arguments)


def test_a_cluster_file_is_planned_for(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'ordered = true\n[[devices]]\nname = "a"\nkind = "L4"\n[[devices]]\nname = "b"\nkind = "T4"\n'
        '[[links]]\nfrom = "a"\nto = "b"\ngb_s = 1\n'
    )
    message = document(capsys, "plan", tiny_llama, "--cluster", file, "--layers", "4,2")
    assert [stage["devices"] for stage in message["stages"]] == [["a"], ["b"]]
