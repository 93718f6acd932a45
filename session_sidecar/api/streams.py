"""Streams of server-sent events: their headers, their pings, and readers that take nothing."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Message, Send

from session_sidecar.api.frames import Position, position
from session_sidecar.errors import InvalidRequest
from session_sidecar.settings import Settings
from session_sidecar.turns.events import CHUNK_BYTES


def stream(
    frames: AsyncIterator[bytes],
    settings: Settings,
    *,
    grace_seconds: float,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> EventSourceResponse:
    """What is answered with a stream. At a shutdown it may go on to its end for so many seconds."""
    return EventSourceResponse(
        frames,
        sep="\n",
        headers={"Cache-Control": "no-store, no-transform", **headers},
        ping=settings.ping_seconds,
        ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
        shutdown_grace_period=grace_seconds,
    )


def in_pieces(send: Send, seconds: float) -> Send:
    """`send`, with a large event cut up: what the server holds for a slow reader is a piece of it, not all.

    Raises TimeoutError where a piece is not taken within so many seconds.
    """
    one = asyncio.Lock()  # or a ping would go out in the middle of an event

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        last = max(len(body) - 1, 0) // CHUNK_BYTES * CHUNK_BYTES
        async with one:
            for start in range(0, last, CHUNK_BYTES):
                async with asyncio.timeout(seconds):
                    await send({**message, "body": body[start : start + CHUNK_BYTES], "more_body": True})
            async with asyncio.timeout(seconds):
                await send({**message, "body": body[last:]} if last else message)

    return send_pieces


def last_event_id(request: Request) -> Position | None:
    """Behind which event the reader goes on, if he says so. Raises InvalidRequest."""
    text = request.headers.get("last-event-id")
    try:
        return position(text) if text else None
    except ValueError as error:
        raise InvalidRequest("See `errors`.", [{"field": "Last-Event-ID", "message": str(error)}]) from None
