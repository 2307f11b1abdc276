"""Stages outside of this process as devices: connections, values that are still on their way, engines by proxy."""

import secrets
from collections.abc import Sequence

from stageline.models.errors import EngineError, RequestError, WireError
from stageline.runtime.cluster.addresses import connect, is_remote, place_of
from stageline.runtime.cluster.children import Child
from stageline.runtime.cluster.elsewhere import Elsewhere
from stageline.runtime.cluster.handshake import greet, read_key
from stageline.runtime.devices.remote.device import Hosts, RemoteDevice

__all__ = ["RemoteDevice", "open_outside"]


def open_outside(
    stages: Sequence[tuple[int, str, tuple[int, ...]]], elsewhere: Elsewhere | None, cores: tuple[int, ...]
) -> list[RemoteDevice]:
    """A device for each (stage, name of its device, its cores): a host's, or this machine's in a process of its own.
    All are of one epoch; if one is lost, all are. `cores` may feed them.

    RequestError without a key, EngineError for a host that is not there or refuses.
    """
    unreached = next((name for _, name, _ in stages if is_remote(name)), None)
    if elsewhere is None or (unreached is not None and elsewhere.key_file is None):
        raise RequestError(f"{unreached} needs a key; give the file that its host has as key_file")
    key = b"" if elsewhere.key_file is None else read_key(elsewhere.key_file)
    hosts, own_key = Hosts(), secrets.token_bytes(32)
    children: dict[int, Child] = {}
    try:
        for stage, name, own in stages:  # all at a time
            if not is_remote(name):
                assert elsewhere.isolated is not None
                children[stage] = Child(elsewhere.isolated, name, own if name == "cpu" else (), own_key)
        for stage, name, _ in stages:
            child = children.get(stage)
            called = name if child is None else child.name
            try:
                place, its_key = (place_of(name), key) if child is None else (child.address(), own_key)
                wire = greet(connect(place), its_key, elsewhere.epoch)
                hosts.devices.append(RemoteDevice(hosts, wire, stage, called, cores, child))
            except WireError as error:
                start = "; start one there: stageline stage BUNDLE" if child is None else ""
                raise EngineError(f"stage {stage}: no host at {called} ({error}){start}") from error
    except BaseException:
        for device in hosts.devices:
            device.close()
        for child in children.values():
            child.close()
        raise
    return hosts.devices
