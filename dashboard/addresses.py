"""Addresses of services that a page may make this server fetch: this machine's, and those that its owner allowed."""

import urllib.request
from collections.abc import Collection
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from stageline.models.errors import StagelineError


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
"""What fetches them: it follows no redirect, which could lead where `service_address` would not, and uses no proxy."""


def is_here(address: str) -> bool:
    """Whether an address that `service_address` returned is this machine's."""
    host = urlsplit(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def service_address(typed: str, allowed: Collection[str] = ()) -> str:
    """`typed` as scheme://host:port, where http:// may be left out: 127.0.0.1:8123 -> http://127.0.0.1:8123.

    StagelineError if it is no such address, or is neither this machine's nor among `allowed`, addresses returned by
    this function: who sees a page must not reach through it what only this machine can reach. Paths are refused, too.
    """
    found = _address(typed)
    if not is_here(found) and found not in allowed:
        raise StagelineError(
            f"{found} is not on this machine, and the dashboard was not allowed to read it; start it with "
            f"stageline dashboard --service {found}"
        )
    return found


def allowed_address(typed: str) -> str:
    """An address of `--service` in the same form. StagelineError if it is none."""
    return _address(typed)


def _address(typed: str) -> str:
    text = typed.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    else:
        if parts.scheme not in ("http", "https") or parts.username or parts.path.strip("/") or parts.query:
            host = None
    if not host or any(letter.isspace() for letter in text):
        raise StagelineError(f"{typed!r} is no address of a service; give one like http://127.0.0.1:8000")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")
