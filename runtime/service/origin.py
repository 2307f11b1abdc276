"""Which names a service may be called by, and which pages may call it: what keeps other sites' pages out.

A page can make its own name mean 127.0.0.1 (DNS rebinding), and a browser then lets it read what a service on this
machine answers. Its requests bear that name as Host, so only known names are answered. An address cannot be made to
mean another, so addresses are.
"""

from collections.abc import Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from stageline.runtime.service.errors import ApiError
from stageline.runtime.service.limits import refuse, route_of
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_LOCAL = ("localhost",)
_PROBES = frozenset({"/health", "/health/live", "/health/ready"})


class HostMiddleware:
    """Passes on requests whose Host and Origin are known."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str], origins: Collection[str]) -> None:
        """`allowed_hosts`: names beside localhost, `*.NAME` for all below it, `*` for any. `origins`: what else pages
        may come from, such as https://example.com; `*` for anywhere."""
        self._app, self._origins = app, frozenset(origins)
        self._hosts = tuple(host.lower() for host in (*_LOCAL, *allowed_hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 421 or 403, or pass the request on."""
        if scope["type"] != "http" or route_of(scope) in _PROBES:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._knows(host):
            message = f"this service is not called {_short(host)}; start it with --allowed-hosts to allow that name"
            return await refuse(ApiError(421, message, code="unknown_host"), scope, receive, send)
        if origin is not None and not self._may_ask(origin):
            message = f"pages of {_short(origin)} may not use this service; --cors-origins allows them"
            return await refuse(ApiError(403, message, code="unknown_origin"), scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None:
            return False
        if _is_address(name):
            return True
        return any(
            allowed in ("*", name) or (allowed.startswith("*.") and name.endswith(allowed[1:]))
            for allowed in self._hosts
        )

    def _may_ask(self, origin: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        try:
            return self._knows(urlsplit(origin).netloc)
        except ValueError:
            return False


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _short(text: str) -> str:
    return repr(text[:100])
