"""What belongs to another replica is forwarded to it: the one that has the thread, or had it last.

Nothing of the house knows of it but the exception handler here: whatever finds that a thread is elsewhere raises
HeldElsewhere, having changed nothing, and the request goes there as it was understood here. There it is not forwarded
again.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from session_sidecar.api.http import unless_gone
from session_sidecar.errors import HeldElsewhere
from session_sidecar.replicas.peers import Peers, cut_off
from session_sidecar.replicas.tenancy import Tenancy

WATCH_SECONDS = 5.0  # between two looks whether the replica that was asked still has the thread
_ASKED_WITH = ("accept", "idempotency-key", "last-event-id", "traceparent", "tracestate")
_ANSWERED_WITH = (
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "retry-after",
    "allow",
    "link",
    "x-vercel-ai-ui-message-stream",
)


class Forwarded(Response):
    """The answer of another replica, as it comes. Its reader leaves that replica's turn by leaving this."""

    def __init__(
        self,
        request: Request,
        there: HeldElsewhere,
        peers: Peers,
        tenancy: Tenancy,
        *,
        otherwise: Callable[[Request, HeldElsewhere], Response],
    ) -> None:
        """Forward `request`, whose call has noted what was `asked`; `otherwise` answers if that cannot be done."""
        self._request = request
        request.state.log["forwarded"] = True
        self._there = there
        self._peers = peers
        self._tenancy = tenancy
        self._otherwise = otherwise
        self._begun = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what the other replica says, until it has ended, its reader has gone, or it has lost the thread.

        Once it has begun, a connection that breaks is broken off here too, and the reader may rejoin.
        """
        try:
            await unless_gone(receive, self._pass_on(send))
        except HeldElsewhere as error:
            if not self._begun:  # else the body is left without its end: what was read is not all
                await self._otherwise(self._request, error)(scope, receive, send)

    async def _pass_on(self, send: Send) -> None:
        passing, watching = asyncio.ensure_future(self._answer(send)), asyncio.ensure_future(self._until_lost())
        try:
            await asyncio.wait((passing, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            passing.cancel()
            watching.cancel()
            await asyncio.wait((passing, watching))
        if passing.cancelled():
            raise cut_off(self._there, self._request.method)
        passing.result()

    async def _answer(self, send: Send) -> None:
        asked: BaseModel = self._request.state.asked
        plain = asked.model_dump(exclude_unset=True)
        path = self._request.scope["route"].path
        for name in self._request.path_params:
            path = path.replace(f"{{{name}:path}}", quote(plain.pop(name), safe=""))
        what: dict[str, Any] = {"params": plain}
        headers = {name: value for name, value in self._request.headers.items() if name in _ASKED_WITH}
        if self._request.method not in {"GET", "DELETE"}:
            what = {"content": json.dumps(plain)}
            headers["content-type"] = "application/json"
        headers["x-request-id"] = self._request.state.request_id
        async with self._peers.asked(self._there, self._request.method, path, headers=headers, **what) as answer:
            told = {name: answer.headers[name] for name in _ANSWERED_WITH if name in answer.headers}
            self._begun = True
            await send({"type": "http.response.start", "status": answer.status_code, "headers": Headers(told).raw})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _until_lost(self) -> None:
        """Wait until the other replica has been without the thread for a while, as what it says last takes a moment.

        Or until this one is about to end.
        """
        lost = 0
        while lost < 2:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._peers.leaving.wait()
                return
            now = None
            with contextlib.suppress(Exception):  # the database does not tell
                now = await self._tenancy.elsewhere(self._there.key)
                lost = 0 if now is not None and now.live and now.url == self._there.url else lost + 1
