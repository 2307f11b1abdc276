"""Frames over a socket: a fixed head, a JSON object and raw arrays, numbered, and signed with a key of the connection.

    head    32 bytes: magic, kind, arrays, bytes of the JSON, of the body, and the number of the frame, which counts up
    tag     16 bytes of HMAC-SHA256 over the head, checked before memory is taken for the body
    body    the JSON, then of each array its dtype and shape, then the arrays, each from a multiple of 64 on
    tag     16 bytes of HMAC-SHA256 over head and body

Nothing in a frame is ever executed or unpickled. A frame that is not the next one of its connection, or was changed, is
refused, and the connection with it: whoever holds the other end starts anew. Frames are signed, not encrypted.

Who is silent for `SILENT_S` is gone: each end sends a beat every `BEAT_S`, whatever it computes.
"""

import hmac
import json
import math
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import WireError

Array = NDArray[Any]
BEAT_S, SILENT_S = 0.5, 2.0
BEAT = 0
"""The kind of frame that only says that its sender lives."""
MOST_JSON, MOST_ARRAYS, MOST_DIMENSIONS = 2**16, 64, 8
MOST_BYTES = 2**31
"""Of a frame's body."""
_MAGIC = b"SLF1"
_HEAD = struct.Struct("<4sHHIQQ4x")  # magic, kind, arrays, bytes of JSON, bytes of the body, number
_TAG = 16
_ALIGNED = 64
_SMALL = 4096
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DTYPES = tuple(np.dtype(name) for name in ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64"))
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class Frame:
    """What came: its kind, its JSON object, and arrays that the receiver owns."""

    kind: int
    message: dict[str, Any]
    arrays: tuple[Array, ...]


class Wire:
    """One end of a connection, which it owns until `close()`. Any thread may send, one receives.

    All errors are WireError; after all but that of a frame that cannot be sent the connection is closed.
    """

    def __init__(self, connection: socket.socket, send_key: bytes, receive_key: bytes) -> None:
        """`connection` is connected; each end sends with the key that the other one receives with."""
        self._socket = connection
        self._socket.settimeout(SILENT_S)
        self._sending, self._receiving = hmac.new(send_key, None, "sha256"), hmac.new(receive_key, None, "sha256")
        self._sent = self._received = 0
        self.bytes_sent = self.bytes_received = 0
        self._lock = threading.Lock()  # guards what sends
        self._closed = threading.Event()
        self._why: str | None = None  # it ended

    def live(self) -> "Wire":
        """Send beats from now on, until the connection ends."""
        threading.Thread(target=self._beat, name="beats", daemon=True).start()
        return self

    def send(self, kind: int, message: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
        """Send a frame. WireError if the connection ended, or the other end takes nothing any more."""
        said = _JSON.encode(message).encode()
        body = _body(said, arrays)
        length = sum(len(part) for part in body)
        if length > MOST_BYTES:
            raise WireError(f"a step of {length:,} bytes does not fit a frame of {MOST_BYTES:,}; send fewer rows")
        with self._lock:
            head = _HEAD.pack(_MAGIC, kind, len(arrays), len(said), length, self._sent)
            signed = self._sending.copy()
            signed.update(head)
            tag = signed.digest()[:_TAG]
            for part in body:
                signed.update(part)
            self._send_all([head + tag, *body, signed.digest()[:_TAG]])
            self._sent += 1

    def receive(self) -> Frame:
        """The next frame that is not a beat. WireError if none comes, or one is not what it says."""
        while (frame := self._frame()).kind == BEAT:
            pass
        return frame

    def close(self) -> None:
        """End the connection; whoever waits at either end gets its WireError. May be called again, by any thread."""
        self._closed.set()
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _frame(self) -> Frame:
        head = self._read(_HEAD.size + _TAG)
        signed = self._receiving.copy()
        signed.update(head[: _HEAD.size])
        if not hmac.compare_digest(signed.digest()[:_TAG], head[_HEAD.size :]):
            raise self._broken("the head of a frame is not signed with the key")
        magic, kind, count, json_bytes, length, number = _HEAD.unpack(head[: _HEAD.size])
        if magic != _MAGIC or number != self._received:
            raise self._broken(f"frame {self._received} was to come, not {number}")
        if not (json_bytes <= min(length, MOST_JSON) and count <= MOST_ARRAYS and length <= MOST_BYTES):
            raise self._broken(f"a frame says that it has {json_bytes} bytes of JSON, {count} arrays, {length} bytes")
        rest = self._read(length + _TAG)
        body = rest[:length]
        signed.update(body)
        if not hmac.compare_digest(signed.digest()[:_TAG], rest[length:]):
            raise self._broken("a frame is not signed with the key")
        self._received += 1
        try:
            message = json.loads(body[:json_bytes].tobytes())
            if not isinstance(message, dict):
                raise ValueError("its JSON is no object")
            return Frame(kind, message, _arrays(body, json_bytes, count))
        except (ValueError, RecursionError, struct.error) as error:
            raise self._broken(f"a frame cannot be read: {error}") from error

    def _read(self, length: int) -> memoryview:
        buffer = rest = np.empty(length, np.uint8).data
        try:
            while rest:
                count = self._socket.recv_into(rest)
                if count == 0:
                    raise self._broken("the connection was closed")
                rest = rest[count:]
        except TimeoutError:
            raise self._broken(f"no sign of life for {SILENT_S:g} s") from None
        except OSError as error:
            raise self._broken(f"the connection ended ({error.strerror or error})") from error
        self.bytes_received += length
        return buffer

    def _send_all(self, parts: Sequence[bytes | memoryview]) -> None:
        left = [memoryview(part) for part in parts if len(part)]
        try:
            while left:
                count = self._socket.sendmsg(left)
                self.bytes_sent += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]
        except TimeoutError:
            raise self._broken(f"nothing was taken for {SILENT_S:g} s") from None
        except OSError as error:
            raise self._broken(f"the connection ended ({error.strerror or error})") from error

    def _broken(self, why: str) -> WireError:
        self._why = self._why or ("it was closed here" if self._closed.is_set() else why)
        self.close()
        return WireError(self._why)

    def _beat(self) -> None:
        try:
            while not self._closed.wait(BEAT_S):
                self.send(BEAT, {})
        except WireError:
            pass  # whoever receives notices by itself


def _body(said: bytes, arrays: Sequence[Array]) -> list[bytes | memoryview]:
    """The parts of a body, in order: the JSON, the table of arrays, and each array with what aligns it before it. What
    is small is joined: each part costs more than copying it."""
    contiguous = [np.asarray(array, order="C") for array in arrays]
    for array in contiguous:
        if array.dtype not in _CODES:
            raise WireError(f"an array of {array.dtype} cannot be sent; those that can: {', '.join(map(str, _DTYPES))}")
    joined = [said]
    joined += [struct.pack(f"<BB{array.ndim}Q", _CODES[array.dtype], array.ndim, *array.shape) for array in contiguous]
    end = sum(map(len, joined))
    parts: list[bytes | memoryview] = []
    for array in contiguous:
        gap = -end % _ALIGNED
        joined.append(bytes(gap))
        end += gap + array.nbytes
        if array.nbytes < _SMALL:
            joined.append(array.tobytes())
        else:
            parts += [b"".join(joined), array.reshape(-1).view(np.uint8).data]
            joined = []
    parts.append(b"".join(joined))
    return parts


def _arrays(body: memoryview, start: int, count: int) -> tuple[Array, ...]:
    """The arrays of a body whose table begins at `start`. ValueError or struct.error where they do not fill it."""
    values: NDArray[np.uint8] = np.asarray(body)
    kinds = []
    for _ in range(count):
        code, dimensions = struct.unpack_from("<BB", body, start)
        if code >= len(_DTYPES) or dimensions > MOST_DIMENSIONS:
            raise ValueError(f"an array is of kind {code} with {dimensions} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", body, start + 2)
        start += 2 + 8 * dimensions
        kinds.append((_DTYPES[code], shape))
    found = []
    for dtype, shape in kinds:
        start += -start % _ALIGNED
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(body):
            raise ValueError(f"an array of {list(shape)} has more bytes than its frame")
        found.append(values[start:end].view(dtype).reshape(shape))
        start = end
    if start != len(body):
        raise ValueError(f"{len(body) - start} bytes are left over")
    return tuple(found)
