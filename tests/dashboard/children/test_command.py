"""`stageline dashboard`: what it starts, and its message if it cannot."""

import os
import sys
from pathlib import Path

import pytest
from stageline.dashboard import __main__ as program
from stageline.exporter.commands.cli import main


class Replaced(Exception):  # noqa: N818 - what happens instead of another program
    pass


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would replace the process."""
    commands: list[list[str]] = []

    def execv(path: str, arguments: list[str]) -> None:
        commands.append(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    return commands


def test_options_reach_the_script(replaced: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--store", str(tmp_path / "s.sqlite"), "--bundles", str(tmp_path), "--port", "8599"]
    with pytest.raises(Replaced):
        main(["dashboard", *options])
    (command,) = replaced
    assert command[:4] == [sys.executable, "-P", "-m", "stageline.dashboard"]
    monkeypatch.setattr(sys, "argv", command[3:])
    with pytest.raises(Replaced):
        program.main()
    streamlit = replaced[1]
    flags, own = streamlit[: streamlit.index("--")], streamlit[streamlit.index("--") + 1 :]
    assert flags[flags.index("--server.address") + 1] == "127.0.0.1"
    assert flags[flags.index("--browser.gatherUsageStats") + 1] == "false"
    assert flags[flags.index("--server.port") + 1] == "8599"
    assert own == ["--store", str(tmp_path / "s.sqlite"), "--bundles", str(tmp_path)]


def test_without_streamlit_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["dashboard"]) == 1
    assert 'pip install "stageline[dashboard]"' in capsys.readouterr().err
