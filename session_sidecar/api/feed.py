"""`/v1/events`: what happens to threads, for whoever shows a list of them."""

import contextlib
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from session_sidecar.api.frames import FRAME, Position
from session_sidecar.api.http import Incoming
from session_sidecar.api.models.feed import EventsQuery
from session_sidecar.api.streams import in_pieces, last_event_id, stream
from session_sidecar.turns.feed import Feed


async def follow_events(call: Incoming[EventsQuery]) -> Response:
    """`GET /v1/events`: what happens to a resource's threads from now on; to everybody's where none is named.

    IDs and words, never what was said. The first event is `reset`, at which the list is read anew: unless
    `Last-Event-ID` names an event of this sidecar after which all are still held. The stream has no end of its own.
    """
    is_replica = call.services.access.is_replica(call.request.headers)
    return _Followed(call, last_event_id(call.request), own_only=is_replica)


class _Followed(Response):
    """The feed as one reader sees it, until the reader goes, takes nothing, or the sidecar shuts down."""

    def __init__(self, call: Incoming[EventsQuery], after: Position | None, *, own_only: bool) -> None:
        self._frames = _frames(call.services.feed, call.asked.resource_id, after, own_only=own_only)
        self._settings = call.services.settings
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one reader."""
        with contextlib.suppress(TimeoutError):  # it may come back, and goes on where it was
            await stream(self._frames, self._settings)(scope, receive, in_pieces(send, self._settings.send_seconds))


async def _frames(
    feed: Feed, resource_id: str | None, after: Position | None, *, own_only: bool
) -> AsyncIterator[bytes]:
    name = feed.id.encode()
    with feed.reader(resource_id, after, own_only=own_only) as reader:
        while events := await reader.take():
            yield b"".join([FRAME % (name, event.number, event.kind.encode(), event.line) for event in events])
