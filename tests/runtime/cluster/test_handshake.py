"""Who does not prove that it has the key gets nothing; a handshake cannot be used twice."""

import random
import socket
import struct
import threading
from pathlib import Path

import pytest
from stageline.models.errors import RequestError, WireError
from stageline.runtime.cluster import handshake
from stageline.runtime.cluster.handshake import answer, greet, read_key

KEY, OTHER = b"k" * 32, b"o" * 32


def meet(key: bytes, host_key: bytes, epoch: int = 7) -> tuple[object, object]:
    """What both ends get: a wire, a wire and an epoch, or an error."""
    left, right = socket.socketpair()
    found: list[object] = [None, None]

    def end(place: int, call: object, *arguments: object) -> None:
        try:
            found[place] = call(*arguments)  # type: ignore[operator]
        except WireError as error:
            found[place] = error
            (left, right)[place].close()

    host = threading.Thread(target=end, args=(1, answer, right, host_key))
    host.start()
    end(0, greet, left, key, epoch)
    host.join()
    return found[0], found[1]


def test_ends_with_one_key_have_a_wire_both_ways() -> None:
    mine, theirs = meet(KEY, KEY)
    wire, epoch = theirs  # type: ignore[misc]
    assert epoch == 7
    mine.send(3, {"a": 1})  # type: ignore[attr-defined]
    assert wire.receive().message == {"a": 1}
    wire.send(4, {"b": 2})
    assert mine.receive().message == {"b": 2}  # type: ignore[attr-defined]
    wire.close()
    mine.close()  # type: ignore[attr-defined]


def test_another_key_is_refused_by_the_pipeline_and_by_the_host() -> None:
    mine, theirs = meet(KEY, OTHER)
    assert "its key is another one; give both ends the same key file" in str(mine)
    assert isinstance(theirs, WireError)
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"STAGELN1" + struct.pack("<Q", 7) + b"n" * 32 + b"p" * 32)  # who does not look at the proof
        with pytest.raises(WireError, match="another one"):
            answer(right, KEY)


def test_a_recorded_handshake_is_refused() -> None:
    left, middle = socket.socketpair()
    inner, right = socket.socketpair()
    said: list[bytes] = []

    def forward() -> None:
        for length, source, target in ((48, middle, inner), (72, inner, middle), (32, middle, inner)):
            data = source.recv(length, socket.MSG_WAITALL)
            target.sendall(data)
            if source is middle:
                said.append(data)

    threading.Thread(target=forward).start()
    found: list[object] = []
    host = threading.Thread(target=lambda: found.append(answer(right, KEY)))
    host.start()
    greet(left, KEY, 7).close()
    host.join()
    found[0][0].close()  # type: ignore[index]
    again, host_end = socket.socketpair()
    with again, host_end:
        again.sendall(b"".join(said))
        with pytest.raises(WireError, match="another one"):
            answer(host_end, KEY)
    for end in (middle, inner):
        end.close()


def test_whatever_connects_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    for number in range(2000):
        left, right = socket.socketpair()
        data = draw.randbytes(draw.randrange(200))
        with left, right:
            left.sendall(b"STAGELN1" + data if number % 2 else data)
            left.shutdown(socket.SHUT_WR)
            with pytest.raises(WireError) as raised:
                answer(right, KEY)
            assert "\n" not in str(raised.value)
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.2)
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"STAGE")  # and then says nothing
        with pytest.raises(WireError, match=r"no answer within 0\.2 s"):
            answer(right, KEY)
    left, right = socket.socketpair()
    with left, right:
        right.sendall(b"HTTP/1.1 400 Bad Request\r\n" + bytes(100))
        with pytest.raises(WireError, match="no stage host of this version"):
            greet(left, KEY, 1)


def test_keys_come_from_files_and_are_long_enough(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("  " + "5" * 64 + "\n")
    assert read_key(file) == b"5" * 64
    file.write_text("short")
    with pytest.raises(RequestError, match=r"has 5 bytes, at least 32 are needed.*openssl rand -hex 32"):
        read_key(file)
    with pytest.raises(RequestError, match=r"cannot read the key file .*nothing \(No such file"):
        read_key(tmp_path / "nothing")
