"""Where stage hosts are: addresses as users write them, and sockets there."""

import re
import socket
from ipaddress import ip_address

from stageline.models.errors import RequestError, WireError

SCHEME = "tcp://"
_PLACE = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})")
_CONNECT_S = 5.0


def is_remote(device: str) -> bool:
    """Whether a device's name is the address of a stage host, such as `tcp://10.0.0.5:7070`."""
    return device.startswith(SCHEME)


def place_of(address: str) -> tuple[str, int]:
    """The host and port of `tcp://HOST:PORT`, or of HOST:PORT; IPv6 in brackets. RequestError if it is neither."""
    found = _PLACE.fullmatch(address.removeprefix(SCHEME))
    if found is None or int(found["port"]) > 65535:
        raise RequestError(
            f"{address!r} is no address of a stage host; write tcp://HOST:PORT, such as tcp://node1:7070"
        )
    return found["six"] or found["host"], int(found["port"])


def name_of(place: tuple[str, int]) -> str:
    """The address of a host and port."""
    host, port = place
    return f"{SCHEME}[{host}]:{port}" if ":" in host else f"{SCHEME}{host}:{port}"


def listen(place: tuple[str, int]) -> socket.socket:
    """A socket that listens there. RequestError if it cannot."""
    try:
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=64)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"cannot listen at {name_of(place)} ({why})") from error


def connect(place: tuple[str, int]) -> socket.socket:
    """A connection to there, for small messages that do not wait for each other. WireError if there is none."""
    try:
        connection = socket.create_connection(place, timeout=_CONNECT_S)
    except (OSError, UnicodeError) as error:
        late = isinstance(error, TimeoutError)
        raise WireError(
            f"no answer within {_CONNECT_S:g} s" if late else str(getattr(error, "strerror", error))
        ) from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host of this name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
