"""Who may call: what is known of a caller before anything of the call is looked at.

A page in a person's browser can send requests to a server on the same machine: under a name of its own that resolves
to 127.0.0.1, or from its own origin. Neither is a caller of ours. Nobody is asked who they are, so whoever reaches the
loopback address is the operator; and only there is anybody answered, however the server was started.
"""

import functools
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from session_sidecar.errors import ForbiddenHost, ForbiddenOrigin
from session_sidecar.settings import LOOPBACK


def admit(scope: Scope) -> None:
    """Return if this caller may call at all. Raises ForbiddenHost, ForbiddenOrigin."""
    headers = Headers(scope=scope)
    server: Any = scope.get("server")
    if not _is_loopback(server and tuple(server)):
        raise ForbiddenHost("This server answers on loopback only, as it does not check who calls. Proxy to it there.")
    if _hostname("//" + headers.get("host", "")) not in LOOPBACK:
        raise ForbiddenHost("The Host header must name the address that this server listens on.")
    origin = headers.get("origin")
    if origin is not None and _hostname(origin) not in LOOPBACK:
        raise ForbiddenOrigin("Browsers may call only from this server's own origin. Proxy through your backend.")


@functools.lru_cache(maxsize=16)
def _is_loopback(server: tuple[str, int | None] | None) -> bool:
    """Whether a connection came in on this machine: `server` is the address that it came to, as ASGI has it."""
    if server is None or server[1] is None:
        return True  # a Unix socket, or no network at all
    try:
        return ipaddress.ip_address(server[0]).is_loopback
    except ValueError:
        return server[0] in LOOPBACK  # a test client's name for it


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
