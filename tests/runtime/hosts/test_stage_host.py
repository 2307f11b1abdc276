"""A host serves who has the key, checks what it is asked, and lives on whatever comes."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stageline.models.errors import RequestError, WireError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.cluster.addresses import connect, listen, name_of, place_of
from stageline.runtime.cluster.handshake import greet
from stageline.runtime.cluster.messages import Kind, Open, StageOptions, stageline_version
from stageline.runtime.cluster.wire import Frame, Wire
from stageline.runtime.hosts import stage_host as host_module
from stageline.runtime.hosts.stage_host import StageHost
from stageline.runtime.options import PipelineOptions

KEY = b"k" * 32


@pytest.fixture(scope="module")
def bundle(word_llama: Path) -> Bundle:
    return Bundle.open(word_llama)


@pytest.fixture(scope="module")
def host(bundle: Bundle) -> Iterator[StageHost]:
    host = StageHost(bundle, ("127.0.0.1", 0), KEY, "cpu", 1)
    thread = threading.Thread(target=host.serve)
    thread.start()
    yield host
    host.close()
    thread.join()


def welcomed(host: StageHost, epoch: int | None = None) -> Wire:
    wire = greet(connect(host.address), KEY, epoch or time.time_ns())
    assert wire.receive().kind == Kind.WELCOME
    return wire


def asked(wire: Wire, kind: Kind, message: dict[str, object], arrays: list[object] | None = None) -> Frame:
    wire.send(kind, message, arrays or [])  # type: ignore[arg-type]
    return wire.receive()


def opening(bundle: Bundle, /, **changes: object) -> dict[str, object]:
    options = StageOptions.of(PipelineOptions(slots=2, capacity=32))
    own = Open(stageline=stageline_version(), bundle=bundle.digest(), layers=(2, 1), stage=0, options=options)
    return own.model_dump() | changes


STEP = {"inputs": ["input_ids", "past_lengths", "new_lengths"], "outputs": ["x"], "first": None}


def test_what_is_not_as_it_should_be_is_refused_and_the_session_lives_on(host: StageHost, bundle: Bundle) -> None:
    wire = welcomed(host)
    for changes, why in (
        ({"stageline": "0.0.1"}, "of Stageline 0.0.1, this host of"),
        ({"bundle": "0" * 64}, "is not the pipeline's; copy the whole folder here"),
        ({"stage": 2}, "there is no stage 2 of 2"),
        ({"layers": ()}, "layers"),
        ({"layers": (9, 9)}, "give each stage at least 1 block, 3 in all"),
        ({"path": "/etc/passwd"}, "no field that is known here"),
    ):
        frame = asked(wire, Kind.OPEN, opening(bundle, **changes))
        assert frame.kind == Kind.FAILED
        assert why in frame.message["error"]
        assert "\n" not in frame.message["error"]
    assert "no stage yet" in asked(wire, Kind.STEP, STEP).message["error"]
    assert asked(wire, Kind.OPEN, opening(bundle)).kind == Kind.OPENED
    assert "a stage already" in asked(wire, Kind.OPEN, opening(bundle)).message["error"]
    assert "kind 99" in asked(wire, 99, {}).message["error"]  # type: ignore[arg-type]
    wire.close()


def test_rows_outside_the_caches_never_reach_the_engine(host: StageHost, bundle: Bundle) -> None:
    wire = welcomed(host)
    opened = asked(wire, Kind.OPEN, opening(bundle)).message
    outputs = [name for name in opened["output_names"] if "present" not in name]
    step = {"inputs": opened["input_names"], "outputs": outputs[:1], "first": None}
    given = {"input_ids": np.array([[5]]), "past_lengths": np.array([0]), "new_lengths": np.array([1])}
    inputs = [given.get(name, np.array([[0]])) for name in opened["input_names"]]

    def packed(slots: object, past: object, counts: object) -> Frame:
        return asked(wire, Kind.STEP, step, [*inputs, np.array(slots), np.array(past), np.array(counts)])

    for rows, why in (
        (([2], [0], [1]), "there are 2"),
        (([-1], [0], [1]), "there are 2"),
        (([0], [32], [1]), "capacity of 32"),
        (([0], [-1], [1]), "capacity of 32"),
        (([0], [0], [0]), "capacity of 32"),
        (([0, 0], [0, 0], [1, 1]), "there are 2"),
        (([0, 1], [0], [1]), "int64, one of each"),
        (([0.0], [0], [1]), "int64, one of each"),
        (([[0]], [0], [1]), "one dimension"),
    ):
        frame = packed(*rows)
        assert (frame.kind, why in frame.message["error"]) == (Kind.FAILED, True), frame.message
    ranged = {**step, "first": 2}
    assert "slots 2 to 2 are asked for" in asked(wire, Kind.STEP, ranged, inputs).message["error"]
    assert "were sent" in asked(wire, Kind.STEP, step, []).message["error"]
    assert "not nothing" in asked(wire, Kind.STEP, {**step, "outputs": ["nothing"]}, inputs).message["error"]
    wire.send(Kind.COPY, {"source": 0, "target": 5, "tokens": 3})  # told with the next step
    assert "no slots 0 and 5" in packed([0], [0], [1]).message["error"]
    frame = packed([0], [0], [1])
    assert frame.kind == Kind.DONE
    assert np.isfinite(frame.arrays[0]).all()
    wire.close()


def test_an_earlier_epoch_is_refused_and_a_later_one_takes_over(host: StageHost) -> None:
    first = welcomed(host)
    epoch = time.time_ns()
    second, beside = welcomed(host, epoch), welcomed(host, epoch)
    with pytest.raises(WireError, match="closed"):
        first.receive()
    old = greet(connect(host.address), KEY, epoch - 1)
    frame = old.receive()
    assert frame.kind == Kind.FAILED
    assert f"opened later (epoch {epoch}, not {epoch - 1})" in frame.message["error"]
    assert asked(second, Kind.STEP, STEP).kind == asked(beside, Kind.STEP, STEP).kind == Kind.FAILED  # both live
    for wire in (old, second, beside):
        wire.close()


def test_a_host_lives_on_whatever_connects(host: StageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(5)
    for _ in range(200):
        with connect(host.address) as connection:
            connection.sendall(draw.randbytes(draw.randrange(300)))
    idle = [connect(host.address) for _ in range(host_module.MOST_SESSIONS + 20)]  # these say nothing
    closed = sum(_is_closed(connection) for connection in idle[-10:])
    assert closed == 10, "more than MOST_SESSIONS are let in"
    for connection in idle:
        connection.close()
    until = time.monotonic() + 10
    while True:
        try:
            welcomed(host).close()
            break
        except WireError:
            assert time.monotonic() < until, "the host does not serve any more"
            time.sleep(0.1)


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(5)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_addresses() -> None:
    assert place_of("tcp://node-1.example:7070") == ("node-1.example", 7070)
    assert place_of("[::1]:70") == ("::1", 70)
    assert name_of(place_of("tcp://[::1]:70")) == "tcp://[::1]:70"
    for wrong in ("tcp://node1", "node1:70000", "tcp://:7070", "tcp://a b:1", "http://a:1"):
        with pytest.raises(RequestError, match="is no address of a stage host; write tcp://HOST:PORT"):
            place_of(wrong)
    with listen(("127.0.0.1", 0)) as taken, pytest.raises(RequestError, match=r"cannot listen at tcp://127.0.0.1:\d+"):
        listen(taken.getsockname())
    with listen(("127.0.0.1", 0)) as free:
        place = free.getsockname()
    with pytest.raises(WireError, match="refused"):
        connect(place)
