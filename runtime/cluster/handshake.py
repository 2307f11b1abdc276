"""How two ends of a connection prove to each other that they know the key, and what they sign frames with from then on.

    pipeline ── magic, epoch, nonce ──────────────> host
    pipeline <── magic, nonce, proof of the host ── host
    pipeline ── proof of the pipeline ────────────> host
    pipeline <── frame: welcome, or why not ─────── host

The key of an epoch is HMAC-SHA256 of the key file's and the epoch's number; proofs and the keys of the two directions
are HMACs of both nonces with that. So neither a handshake nor a frame can be used a second time. An epoch is one
opening of a pipeline; a host refuses those before the last one that it has seen.
"""

import hmac
import secrets
import socket
import struct
from pathlib import Path
from time import monotonic

from stageline.models.errors import RequestError, WireError
from stageline.runtime.cluster.wire import Wire

HANDSHAKE_S = 5.0
_MAGIC = b"STAGELN1"
_EPOCH = struct.Struct("<Q")
_NONCE, _PROOF = 32, 32
_SHORTEST_KEY = 32


def read_key(file: str | Path) -> bytes:
    """The key in a file, white space around it left out. RequestError if it cannot be read or is too short."""
    try:
        with Path(file).open("rb") as opened:
            key = opened.read(4096).strip()
    except OSError as error:
        raise RequestError(f"cannot read the key file {file} ({error.strerror})") from error
    if len(key) < _SHORTEST_KEY:
        raise RequestError(
            f"the key in {file} has {len(key)} bytes, at least {_SHORTEST_KEY} are needed; make one with: "
            "openssl rand -hex 32"
        )
    return key


def greet(connection: socket.socket, key: bytes, epoch: int) -> Wire:
    """The pipeline's side, on a connected socket, which the wire owns. WireError if the other end does not answer, is
    no host, or has another key."""
    until = monotonic() + HANDSHAKE_S
    nonce = secrets.token_bytes(_NONCE)
    _send(connection, _MAGIC + _EPOCH.pack(epoch) + nonce)
    answer = _read(connection, len(_MAGIC) + _NONCE + _PROOF, until)
    if not answer.startswith(_MAGIC):
        raise WireError("what answers there is no stage host of this version of Stageline")
    host_nonce, proof = answer[len(_MAGIC) : -_PROOF], answer[-_PROOF:]
    keys = _Keys(key, epoch, nonce + host_nonce)
    if not hmac.compare_digest(proof, keys.derived("host's proof")):
        raise WireError("its key is another one; give both ends the same key file")
    _send(connection, keys.derived("pipeline's proof"))
    return Wire(connection, keys.derived("from pipeline"), keys.derived("from host")).live()


def answer(connection: socket.socket, key: bytes) -> tuple[Wire, int]:
    """The host's side: the wire, and the epoch of the pipeline. WireError for who does not prove that it has the
    key."""
    until = monotonic() + HANDSHAKE_S
    hello = _read(connection, len(_MAGIC) + _EPOCH.size + _NONCE, until)
    if not hello.startswith(_MAGIC):
        raise WireError("what connected is no pipeline of this version of Stageline")
    (epoch,) = _EPOCH.unpack_from(hello, len(_MAGIC))
    nonce = secrets.token_bytes(_NONCE)
    keys = _Keys(key, epoch, hello[-_NONCE:] + nonce)
    _send(connection, _MAGIC + nonce + keys.derived("host's proof"))
    if not hmac.compare_digest(_read(connection, _PROOF, until), keys.derived("pipeline's proof")):
        raise WireError("its key is another one; give both ends the same key file")
    return Wire(connection, keys.derived("from host"), keys.derived("from pipeline")).live(), epoch


class _Keys:
    def __init__(self, key: bytes, epoch: int, nonces: bytes) -> None:
        self._epoch_key = hmac.digest(key, b"epoch" + _EPOCH.pack(epoch), "sha256")
        self._nonces = nonces

    def derived(self, purpose: str) -> bytes:
        return hmac.digest(self._epoch_key, purpose.encode() + b"\0" + self._nonces, "sha256")


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.settimeout(HANDSHAKE_S)
        connection.sendall(data)
    except OSError as error:
        raise WireError(f"the connection ended ({error.strerror or error})") from error


def _read(connection: socket.socket, length: int, until: float) -> bytes:
    """Exactly `length` bytes, before the time `until` however they trickle in."""
    data = b""
    while len(data) < length:
        try:
            connection.settimeout(max(1e-3, until - monotonic()))
            more = connection.recv(length - len(data))
        except OSError as error:
            late = isinstance(error, TimeoutError)
            why = f"no answer within {HANDSHAKE_S:g} s" if late else f"the connection ended ({error.strerror or error})"
            raise WireError(why) from error
        if not more:
            raise WireError("the other end closed the connection; is its key the same?")
        data += more
    return data
