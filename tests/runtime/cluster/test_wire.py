"""Frames arrive as they were sent, or the connection ends with one clear error."""

import hmac
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stageline.models.errors import WireError
from stageline.runtime.cluster import wire as wire_module
from stageline.runtime.cluster.wire import BEAT, MOST_BYTES, Wire

KEYS = b"a" * 32, b"b" * 32
DTYPES = st.sampled_from(["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64"])
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
MESSAGES = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))


@contextmanager
def pair() -> Iterator[tuple[Wire, Wire]]:
    """Both ends of a connection."""
    left, right = socket.socketpair()
    ends = Wire(left, *KEYS), Wire(right, *reversed(KEYS))
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


def sent(frames: list[tuple[int, dict[str, Any], list[Any]]]) -> list[bytes]:
    """What goes over the wire for each frame."""
    left, right = socket.socketpair()
    with right:
        wire, found = Wire(left, *KEYS), []
        for frame in frames:
            before = wire.bytes_sent
            wire.send(*frame)
            found.append(right.recv(wire.bytes_sent - before, socket.MSG_WAITALL))
        wire.close()
    return found


def outcome(data: bytes) -> list[int]:
    """The kinds of the frames that are taken from a connection that brings `data` and then ends; its end is a
    WireError."""
    left, right = socket.socketpair()
    with left:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        left.sendall(data)
    wire, kinds = Wire(right, *reversed(KEYS)), []
    with pytest.raises(WireError) as raised:
        kinds += (frame.kind for frame in iter(wire.receive, None))
    assert "\n" not in str(raised.value)
    return kinds


def signed(head: bytes, body: bytes, tags: tuple[bytes | None, bytes | None] = (None, None)) -> bytes:
    """A frame of this head and body, as one who has the key would sign it."""
    first = hmac.digest(KEYS[0], head, "sha256")[:16]
    last = hmac.digest(KEYS[0], head + body, "sha256")[:16]
    return head + (tags[0] or first) + body + (tags[1] or last)


def head(kind: int = 1, arrays: int = 0, json_bytes: int = 2, length: int = 2, number: int = 0) -> bytes:
    return struct.pack("<4sHHIQQ4x", b"SLF1", kind, arrays, json_bytes, length, number)


@settings(deadline=None, max_examples=40)
@given(MESSAGES, st.lists(ARRAYS, max_size=5))
def test_frames_arrive_as_they_were_sent(message: dict[str, Any], arrays: list[Any]) -> None:
    with pair() as (left, right):
        for kind in (1, 2):
            left.send(kind, message, arrays)
            frame = right.receive()
            assert (frame.kind, frame.message) == (kind, message)
            for given_, came in zip(arrays, frame.arrays, strict=True):
                assert (came.dtype, came.shape, came.flags.writeable) == (given_.dtype, given_.shape, True)
                assert came.tobytes() == given_.tobytes()  # NaNs too


def test_arrays_that_are_not_contiguous_arrive() -> None:
    array = np.arange(60).reshape(3, 4, 5).transpose(2, 0, 1)[::2]
    with pair() as (left, right):
        left.send(1, {}, [array])
        assert np.array_equal(right.receive().arrays[0], array)


def test_beats_are_not_received_and_keep_a_silent_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "BEAT_S", 0.02)
    monkeypatch.setattr(wire_module, "SILENT_S", 0.3)
    with pair() as (left, right):
        left.live()
        with pytest.raises(WireError, match=r"no sign of life for 0\.3 s"):
            left.receive()
    with pair() as (left, right):
        left.live()
        right.live()
        threading.Timer(0.7, left.send, (5, {})).start()
        assert right.receive().kind == 5


def test_what_cannot_be_sent_leaves_the_connection() -> None:
    with pair() as (left, right):
        with pytest.raises(WireError, match="an array of complex128 cannot be sent"):
            left.send(1, {}, [np.zeros(2, complex)])
        with pytest.raises(WireError, match="an array of object"):
            left.send(1, {}, [np.array([print])])
        left.send(2, {})
        assert right.receive().kind == 2


FRAMES: list[tuple[int, dict[str, Any], list[Any]]] = [
    (1, {"outputs": ["a", "b"]}, [np.arange(12.0).reshape(3, 4), np.zeros((0, 3), np.int64)]),
    (BEAT, {}, []),
    (2, {"first": None}, [np.ones(3, bool)]),
    (3, {}, []),
]


def test_ten_thousand_changed_frames_are_refused_and_nothing_crashes() -> None:
    whole, draw = sent(FRAMES), random.Random(7)
    assert outcome(b"".join(whole)) == [1, 2, 3]
    for _ in range(10_000):
        frames = list(whole)
        place = draw.randrange(len(frames))
        frame = frames[place]
        at = draw.randrange(len(frame))
        match draw.randrange(7):
            case 0:
                frames[place] = frame[:at] + bytes([frame[at] ^ (1 << draw.randrange(8))]) + frame[at + 1 :]
            case 1:
                frames[place] = frame[:at]
            case 2:
                frames[place] = frame[:at] + draw.randbytes(draw.randrange(1, 9)) + frame[at:]
            case 3:
                frames.insert(place, frame)  # replayed
            case 4:
                other = (place + 1) % len(frames)
                frames[place], frames[other] = frames[other], frames[place]
            case 5:
                frames[place] = draw.randbytes(len(frame))
            case 6:
                del frames[place]
        taken = outcome(b"".join(frames))
        assert taken == [1, 2, 3][: len(taken)], "a frame was taken that was not the next one"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (signed(head(length=MOST_BYTES + 1), b"{}"), "bytes of JSON"),
        (signed(head(json_bytes=2**17, length=2**18), b"{}"), "bytes of JSON"),
        (signed(head(json_bytes=3), b"{}"), "bytes of JSON"),
        (signed(head(arrays=65), b"{}"), "65 arrays"),
        (signed(head(number=1), b"{}"), "frame 0 was to come, not 1"),
        (signed(head(), b"[]"), "no object"),
        (signed(head(), b"{{"), "cannot be read"),
        (signed(head(), b"\xff\xff"), "cannot be read"),
        (signed(head(), b"{}", (b"x" * 16, None)), "not signed"),
        (signed(head(), b"{}", (None, b"x" * 16)), "not signed"),
        (signed(head(arrays=1), b"{}"), "cannot be read"),
        (signed(head(arrays=1, length=12), b"{}" + struct.pack("<BBQ", 9, 1, 0)), "of kind 9"),
        (signed(head(arrays=1, length=12), b"{}" + struct.pack("<BBQ", 1, 9, 0)), "9 dimensions"),
        (signed(head(arrays=1, length=12), b"{}" + struct.pack("<BBQ", 4, 1, 2**63)), "more bytes than its frame"),
        (signed(head(arrays=1, length=20), b"{}" + struct.pack("<BBQQ", 4, 2, 2**63, 2**63)), "more bytes"),
        (signed(head(length=4), b"{}ab"), "2 bytes are left over"),
        (signed(head(json_bytes=60_000, length=60_000), b"[" * 60_000), "cannot be read"),
        (signed(head(length=1000), b"{}"), "closed"),
        (b"GET / HTTP/1.1\r\nHost: localhost:7070\r\nAccept: */*\r\n\r\n", "not signed"),
    ],
)
def test_frames_that_lie_are_refused_in_one_line(data: bytes, why: str) -> None:
    left, right = socket.socketpair()
    with left:
        left.sendall(data)
    wire = Wire(right, *reversed(KEYS))
    with pytest.raises(WireError, match=why):
        wire.receive()
    with pytest.raises(WireError):
        wire.send(1, {})


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**16 - 1), st.integers(0, 70), st.binary(max_size=300), st.integers(0, 300))
def test_any_signed_body_is_a_frame_or_refused(kind: int, arrays: int, body: bytes, json_bytes: int) -> None:
    """Of one who has the key and lies."""
    outcome(signed(head(kind, arrays, json_bytes, len(body)), body))


def test_frames_of_the_other_direction_are_refused() -> None:
    (mine,) = sent([(1, {}, [])])
    left, right = socket.socketpair()
    with right:
        right.sendall(mine)
        with pytest.raises(WireError, match="not signed"):
            Wire(left, *KEYS).receive()


def test_json_is_as_the_standard_has_it() -> None:
    with pair() as (left, _), pytest.raises(ValueError, match="not JSON compliant"):
        left.send(1, {"a": float("nan")})
