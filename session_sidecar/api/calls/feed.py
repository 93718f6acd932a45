"""`/v1/events`: what happens to threads, for whoever shows a list of them."""

import contextlib
from collections.abc import AsyncGenerator, Iterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from session_sidecar.api.http import Incoming
from session_sidecar.api.models.feed import EventsQuery
from session_sidecar.api.streams.frames import FRAME, Position
from session_sidecar.api.streams.stream import Stream, last_event_id
from session_sidecar.errors import SessionNotFound, Unauthorized, UnrestrictedOnly
from session_sidecar.turns.events import CHUNK_BYTES


async def follow_events(call: Incoming[EventsQuery]) -> Response:
    """`GET /v1/events`: what happens to a resource's threads from now on; to everybody's where none is named.

    IDs and words, never what was said. The first event is `reset`, at which the list is read anew: unless
    `Last-Event-ID` names an event of this sidecar after which all are still held. The stream has no end of its own.
    """
    return _Followed(call, last_event_id(call.request))


class _Followed(Response):
    """The feed as one reader sees it, until the reader goes, takes nothing, or the sidecar shuts down."""

    def __init__(self, call: Incoming[EventsQuery], after: Position | None) -> None:
        self._frames = _frames(call, after)
        self._settings = call.services.settings
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one reader."""
        await Stream(self._frames, self._settings).serve(scope, receive, send)


async def _frames(call: Incoming[EventsQuery], after: Position | None) -> AsyncGenerator[bytes]:
    feed, is_replica = call.services.feed, call.services.access.is_replica(call.request.headers)
    name = feed.id.encode()
    with feed.reader(call.asked.resource_id, after, own_only=is_replica) as reader:
        while events := await reader.take():
            for piece in _pieces([FRAME % (name, event.number, event.kind.encode(), event.line) for event in events]):
                if not _may_still_read(call):
                    return
                yield piece


def _pieces(frames: list[bytes]) -> Iterator[bytes]:
    """Some frames at a time: what is held for a slow reader is a piece of them, and it may be refused the rest."""
    piece, size = [], 0
    for frame in frames:
        piece.append(frame)
        size += len(frame)
        if size >= CHUNK_BYTES:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)


def _may_still_read(call: Incoming[EventsQuery]) -> bool:
    """Whether the token is still good, and for this: nobody is told anything on one that was taken away meanwhile."""
    with contextlib.suppress(Unauthorized, UnrestrictedOnly, SessionNotFound):
        caller = call.services.access.caller(call.request.headers)
        if call.asked.resource_id is None:
            caller.check_unrestricted()
        else:
            caller.check_resource(call.asked.resource_id)
        return True
    return False
