"""Who may call: what is known of a caller before anything of the call is looked at.

A page in a person's browser can send requests to a server on the same machine: under a name of its own that resolves
to 127.0.0.1, or from its own origin. So a call must name a host that is served, and a page be of an origin that may
call. Without tokens whoever reaches the loopback address is the operator, and only there is anybody answered, however
the server was started; with tokens everybody says who they are.
"""

import contextlib
import functools
import hmac
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import Scope

from session_sidecar.api.access.tokens import ALL, Tokens
from session_sidecar.errors import (
    ForbiddenHost,
    ForbiddenOrigin,
    InvalidRequest,
    ReadOnlyToken,
    SessionNotFound,
    Unauthorized,
    UnrestrictedOnly,
)
from session_sidecar.replicas.peers import FORWARDED
from session_sidecar.settings import LOOPBACK, Settings

PROBES = ("/healthz", "/readyz")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose threads a caller may touch, and whether only to read them. By default it is whoever reaches loopback."""

    resources: frozenset[str] = frozenset({ALL})
    reads_only: bool = False
    scrapes: bool = False  # it may read /metrics
    name: str | None = None  # of the token

    @property
    def is_unrestricted(self) -> bool:
        """Whether it may touch everybody's."""
        return ALL in self.resources

    def check_change(self) -> None:
        """Raise ReadOnlyToken if it may only read."""
        if self.reads_only:
            raise ReadOnlyToken("It can list and read. Ask the operator for one that may change something.")

    def check_unrestricted(self) -> None:
        """Raise UnrestrictedOnly if it is somebody's own."""
        if not self.is_unrestricted:
            raise UnrestrictedOnly("It is not about the resources of this token. The operator's backend may call it.")

    def check_metrics(self) -> None:
        """Raise UnrestrictedOnly if it may not read what is measured."""
        if not self.scrapes and not self.is_unrestricted:
            raise UnrestrictedOnly("Metrics are the operator's: `session-sidecar token new --metrics` makes a token.")

    def check_resource(self, resource_id: str) -> None:
        """Raise SessionNotFound for a resource of others: it is as if it had no thread."""
        if not self.is_unrestricted and resource_id not in self.resources:
            raise SessionNotFound

    def the_resource(self) -> str | None:
        """Whose threads a list is of that names nobody; None for everybody's. Raises InvalidRequest."""
        if self.is_unrestricted:
            return None
        if len(self.resources) != 1:
            message = "is needed, as the token is for several"
            raise InvalidRequest("Nothing was listed. See `errors`.", [{"field": "resource_id", "message": message}])
        return next(iter(self.resources))


class Access:
    """What is decided of a caller: by the address, the Host and the Origin (`admit`), and by the token (`caller`)."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where there is a tokens file that cannot be used."""
        self._tokens = Tokens(settings.tokens_file) if settings.tokens_file is not None else None
        self._hosts = LOOPBACK | settings.served_hosts
        self._secret = settings.replica_secret
        self.origins = settings.allowed_origins

    @property
    def asks(self) -> bool:
        """Whether callers have to show a token."""
        return self._tokens is not None

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Take notice of changed tokens, for as long as the block lasts."""
        async with contextlib.AsyncExitStack() as stack:
            if self._tokens is not None:
                await stack.enter_async_context(self._tokens.watching())
            yield

    def is_replica(self, headers: Headers) -> bool:
        """Whether another replica forwards what it has admitted. Raises Unauthorized where the secret is another."""
        shown = headers.get(FORWARDED)
        if shown is None:
            return False
        if self._secret is None or not hmac.compare_digest(shown.encode(), self._secret.encode()):
            raise Unauthorized("This is no replica's secret. All replicas need the same SIDECAR_REPLICA_SECRET.")
        return True

    def admit(self, scope: Scope) -> None:
        """Return if this caller may call at all. Raises ForbiddenHost, ForbiddenOrigin, Unauthorized."""
        headers = Headers(scope=scope)
        if self.is_replica(headers):
            return
        server: Any = scope.get("server")
        if not self.asks and not _is_loopback(server and tuple(server)):
            raise ForbiddenHost(
                "This server answers on loopback only, as it does not check who calls. Proxy to it there, or give it "
                "tokens (SIDECAR_TOKENS_FILE)."
            )
        # A probe names the machine by whatever address it has, and learns only that it is alive.
        if get_route_path(scope) not in PROBES and _hostname("//" + headers.get("host", "")) not in self._hosts:
            raise ForbiddenHost("The Host header names none of this server's names; SIDECAR_HOSTS adds some.")
        origin = headers.get("origin")
        # The page `/ui` is of this server's own origin, under whichever of its names; its scheme may be a proxy's.
        own = origin is not None and origin.partition("://")[2] == headers.get("host")
        if origin is not None and not own and origin not in self.origins and _hostname(origin) not in LOOPBACK:
            raise ForbiddenOrigin(
                "Browsers may call only from this server's own origin and those that SIDECAR_ORIGINS names. Proxy "
                "through your backend, or add this one."
            )

    def caller(self, headers: Headers) -> Caller:
        """Who calls, by their token. Raises Unauthorized."""
        if self._tokens is None or self.is_replica(headers):  # which knows whose the call is
            return Caller()
        scheme, _, text = headers.get("authorization", "").partition(" ")
        token = self._tokens.find(text.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            raise Unauthorized("Send `Authorization: Bearer` with a token that is known and has not expired.")
        return Caller(token.resources, token.read, token.metrics, token.name)


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
