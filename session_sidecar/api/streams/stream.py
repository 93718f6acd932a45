"""Streams of server-sent events: their headers, their pings, and readers that take nothing.

sse-starlette does the same in more layers, with a task group and a deadline for each frame: about a tenth of what the
sidecar does for a warm turn. Its watch for a shutdown is not needed, as turns and the feed end when that is asked for.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from session_sidecar.api.streams.frames import Position, position
from session_sidecar.errors import InvalidRequest
from session_sidecar.settings import Settings
from session_sidecar.turns.events import CHUNK_BYTES

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store, no-transform",
    "connection": "keep-alive",
    "x-accel-buffering": "no",
}
_PING = b": ping\n\n"


class Stream:
    """One reader of a stream, from its status line to its end."""

    def __init__(
        self, frames: AsyncGenerator[bytes], settings: Settings, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`headers` are those that it has beside the ones of all streams."""
        self._frames = frames
        self._headers = [(name.encode(), value.encode()) for name, value in {**_HEADERS, **headers}.items()]
        self._ping_seconds = settings.ping_seconds
        self._send_seconds = settings.send_seconds
        self._one = asyncio.Lock()  # or a ping would go out in the middle of an event
        self._sending_since: float | None = None

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all there is, until it ends, its reader has gone, or nothing is taken for too long."""
        if scope["method"] == "HEAD":
            await self._begin(send)
            await send({"type": "http.response.body", "body": b""})
            return
        tasks = [
            asyncio.create_task(work, name=name)
            for work, name in (
                (self._write(send), "writing to a reader"),
                (self._until_gone(receive), "a reader who may leave"),
                (self._ping(send), "pinging a reader"),
                (self._until_stalled(), "a reader who may take nothing"),
            )
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._frames):
            await self._begin(send)
            async for frame in self._frames:
                async with self._one:
                    await self._send(send, frame)
        await send({"type": "http.response.body", "body": b""})

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})

    async def _send(self, send: Send, frame: bytes) -> None:
        """Send a large event cut up: what the server holds for a slow reader is a piece of it, not all."""
        now = asyncio.get_running_loop().time
        for start in range(0, len(frame), CHUNK_BYTES):
            piece = frame if len(frame) <= CHUNK_BYTES else frame[start : start + CHUNK_BYTES]
            self._sending_since = now()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        self._sending_since = None

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._ping_seconds)
            async with self._one:
                await self._send(send, _PING)

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _until_stalled(self) -> None:
        """Wait until a piece was not taken for so long that its reader may be dead. It may rejoin."""
        now = asyncio.get_running_loop().time
        left = self._send_seconds
        while left > 0:
            await asyncio.sleep(left)
            since = self._sending_since
            left = self._send_seconds - (now() - since if since is not None else 0)


def last_event_id(request: Request) -> Position | None:
    """Behind which event the reader goes on, if he says so. Raises InvalidRequest."""
    text = request.headers.get("last-event-id")
    try:
        return position(text) if text else None
    except ValueError as error:
        raise InvalidRequest("See `errors`.", [{"field": "Last-Event-ID", "message": str(error)}]) from None
