"""`stageline chat`, at the ends of a pipe and on a terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stageline.exporter.commands.cli import main
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.pipeline import Pipeline

COMMAND = [sys.executable, "-c", "from stageline.exporter.commands.cli import main; raise SystemExit(main())", "chat"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}a"


@pytest.fixture(scope="module")
def llama(word_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny Llama that chats."""
    folder = Path(shutil.copytree(word_llama, tmp_path_factory.mktemp("chat") / "llama"))
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    manifest = Bundle.open(folder).manifest
    files = (*manifest.files, file_entry(folder, "tokenizer/chat_template.jinja"))
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return folder


def test_each_line_of_a_pipe_is_a_question(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a cat", "", "a dog sat", "/clear", "a cat", "/exit", "mats"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(llama), "--temperature", "0", "--max-tokens", "5", "--system", "on mats"]) == 0
    answers = capsys.readouterr().out.splitlines()
    expected = []
    with Pipeline.open(llama) as pipeline:

        def ask(*said: str) -> str:
            roles = ["system", *(("user", "assistant") * 9)]
            messages = [{"role": role, "content": one} for role, one in zip(roles, said, strict=False)]
            return pipeline.generate(pipeline.chat_prompt(messages), max_tokens=5).result().text

        expected.append(ask("on mats", "a cat"))
        expected.append(ask("on mats", "a cat", expected[0], "a dog sat"))
    assert answers == [*expected, expected[0]]


def test_what_does_not_chat_is_reported_in_a_line(
    word_llama: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    for whom, wrong in (
        (word_llama, "has no chat template"),
        (tiny_bundle, "does not chat"),
        ("http://127.0.0.1:9", "cannot be reached"),
    ):
        assert main(["chat", str(whom)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert wrong in said


class Slow(BaseHTTPRequestHandler):
    """A service that counts in its answers, until the client has gone; the third question is refused."""

    asked: list[list[dict[str, str]]]
    left: threading.Event

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "slow"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body["messages"])
        if len(self.asked) == 2:
            return self._send(400, b'{"error": {"message": "not \\u001b[31mthis"}}')
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for number in range(400 if len(self.asked) == 1 else 3):
                chunk = {"choices": [{"delta": {"content": f"{number}\u001b[2J "}}]}
                self.wfile.write(f": ping\n\ndata: {json.dumps(chunk)}\n\n".encode())
                time.sleep(0.02)
            self.wfile.write(b"data: [DONE]\n\n")
            return None
        self.left.set()
        return None

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def slow() -> Iterator[tuple[str, type[Slow]]]:
    handler = type("Handler", (Slow,), {"asked": [], "left": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler
    server.shutdown()
    thread.join()
    server.server_close()


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: os.set_inheritable(slave, True) or _own_terminal(slave),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Read until it appears, and return what came, that included."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode()
        end = self.seen.index(text) + len(text)
        came, self.seen = self.seen[:end], self.seen[end:]
        return came

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def _own_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background is told to ignore it


def test_ctrl_c_stops_the_answer_and_not_the_chat(slow: tuple[str, type[Slow]]) -> None:
    url, service = slow
    terminal = Terminal(url, "--system", "count")
    try:
        terminal.wait_for("> ")
        terminal.type("go\n")
        terminal.wait_for(" 5")
        terminal.type("\x03")
        stopped = terminal.wait_for("[stopped]")
        assert "\x1b[2J" not in stopped
        assert service.left.wait(10)
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type("refused\n")
        assert "answers 400: not" in terminal.wait_for("this")
        terminal.wait_for("> ")
        terminal.type("more\n")
        terminal.wait_for("2[2J")
        terminal.wait_for("> ")
        terminal.type("/clear\n")
        terminal.wait_for("> ")
        terminal.type("again\n")
        terminal.wait_for("2[2J")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
    first, _, third, fourth = service.asked
    system = {"role": "system", "content": "count"}
    assert first == [system, {"role": "user", "content": "go"}]
    assert [one["role"] for one in third] == ["system", "user", "assistant", "user"]  # what was refused is forgotten
    assert re.match(r"0\x1b\[2J 1\x1b\[2J ", third[2]["content"])
    assert fourth == [system, {"role": "user", "content": "again"}]
