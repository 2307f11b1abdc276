"""A Hugging Face Hub on this machine: the part of its HTTP API by which huggingface_hub downloads models."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and what was asked of it. Change either while it runs."""

    models: dict[str, Path] = field(default_factory=dict)
    """Folders by ORG/NAME."""
    gated: set[str] = field(default_factory=set)
    """Names whose files need `token`."""
    token: str = "hf_secret"
    status: int | None = None
    """What every request is answered, if set."""
    endpoint: str = ""
    downloads: list[str] = field(default_factory=list)
    """Files whose content was sent."""


@contextmanager
def asked_by_huggingface_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub asks in this process, without a token and with `cache` as its cache."""
    with serving() as hub:
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port, until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub = self.hub
        if hub.status is not None:
            return self._send(hub.status)
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, what, rest = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:]
        elif len(parts) > 3 and parts[2] == "resolve":
            name, what, rest = "/".join(parts[:2]), "resolve", parts[3:]
        else:
            return self._send(404)
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {hub.token}"):
            return self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        folder = hub.models.get(name)
        if folder is None:
            return self._send(401 if given is None else 404, {"X-Error-Code": "RepoNotFound"})
        if rest and rest[0] not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if what == "revision":
            siblings = [{"rfilename": n, "size": file.stat().st_size} for n, file in files.items()]
            return self._send(200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        if what == "tree":
            return self._send(200, {}, json.dumps([_entry(n, file) for n, file in files.items()]).encode())
        file = "/".join(rest[1:])
        if name in hub.gated and given is None:
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = files[file].read_bytes()
        if self.command == "GET":
            hub.downloads.append(file)
        return self._send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data)

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _entry(name: str, file: Path) -> dict[str, object]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest[:40]}
