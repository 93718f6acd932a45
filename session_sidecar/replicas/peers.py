"""The other replicas, asked over HTTP for what is theirs to answer: once, and with a secret that all of them have."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx2

from session_sidecar.errors import HeldElsewhere
from session_store import ThreadKey

FORWARDED = "X-Sidecar-Forwarded"
"""The header that says that a replica asks, by the secret; what has it is not forwarded again."""

MISSED_PINGS = 4  # after which another replica is taken for gone
_CONNECT_SECONDS = 2.0
_CALL_SECONDS = 30.0  # for a change that is answered once: turns are stopped before it


class Peers:
    """Calls to other replicas. Use it as a context."""

    def __init__(self, secret: str, *, ping_seconds: float) -> None:
        """`ping_seconds` is how often the others say that they are there, on a stream."""
        self._silent_seconds = MISSED_PINGS * ping_seconds
        # How long a turn is silent is its own affair; whether its replica lives, its lease tells.
        timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        self.leaving = asyncio.Event()
        """Set when nothing that others say is waited for any more."""
        self._http = httpx2.AsyncClient(headers={FORWARDED: secret}, timeout=timeout, limits=limits, trust_env=False)

    async def __aenter__(self) -> "Peers":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def hang_up(self) -> None:
        """Break off what is passed on: this replica is about to end, and whoever reads it may rejoin by another."""
        self.leaving.set()

    @contextlib.asynccontextmanager
    async def asked(
        self, there: HeldElsewhere, method: str, path: str, *, headers: Mapping[str, str], **what: Any
    ) -> AsyncIterator[httpx2.Response]:
        """The answer of the replica that has a thread, as it comes; `what` is the body or the query.

        Raises HeldElsewhere if it cannot be reached or breaks off, also out of the block that reads its answer.
        """
        if there.url is None:
            raise there.again()
        try:
            asking = self._http.build_request(method, there.url.rstrip("/") + path, headers=headers, **what)
            answer = await self._http.send(asking, stream=True)
            try:
                yield answer
            finally:
                await answer.aclose()
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise there.again() from None
        except httpx2.HTTPError:
            raise cut_off(there, method) from None

    async def events(self, url: str, after: str | None) -> AsyncGenerator[httpx2.ServerSentEvent, None]:
        """What happens to the threads that another replica has, from behind an event of its feed, until that ends.

        Raises HTTPError if it cannot be reached, breaks off, or is silent for too long.
        """
        headers = {} if after is None else {"Last-Event-ID": after}
        timeout = httpx2.Timeout(self._silent_seconds, connect=_CONNECT_SECONDS)
        async with self._http.sse(url.rstrip("/") + "/v1/events", headers=headers, timeout=timeout) as source:
            source.response.raise_for_status()
            async for event in source:
                yield event

    async def forget(self, there: HeldElsewhere, key: ThreadKey, *, transcript: bool, force: bool) -> bool:
        """Have the replica that has a thread delete it; whether it has. Raises HeldElsewhere if it cannot be asked."""
        asked = {
            "thread_id": key.thread_id,
            "resource_id": key.resource_id,
            "transcript": "delete" if transcript else "keep",
            "force": force,
        }
        async with self.asked(
            there, "DELETE", "/v1/session", headers={}, params=asked, timeout=_CALL_SECONDS
        ) as answer:
            return answer.is_success


def cut_off(there: HeldElsewhere, method: str) -> HeldElsewhere:
    """What to raise where a replica was asked and has not answered: only what can be asked twice may be asked again."""
    return there.again() if method in {"GET", "DELETE"} else there.broken_off()
