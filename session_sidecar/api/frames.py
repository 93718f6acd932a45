"""Dialects: how a turn's events are written for a reader. The sidecar's own is the server-sent events of the WHATWG.

A dialect makes the chunks of a response body of what a log gives it; it keeps nothing of them.
"""

from collections.abc import AsyncIterator

from session_sidecar.turns.events import CHUNK_BYTES, EventLog


async def native(log: EventLog, after: int) -> AsyncIterator[bytes]:
    """The events as they are: `id:` is the number, `event:` the kind, `data:` one line."""
    while events := await log.after(after):
        after, kind, data = events[-1]
        if len(data) > CHUNK_BYTES:
            # By itself, as it is: a large one is not copied for each of its readers.
            yield f"id: {after}\nevent: {kind}\ndata: ".encode()
            yield data
            yield b"\n\n"
        else:
            yield b"".join([b"id: %d\nevent: %b\ndata: %b\n\n" % (n, kind.encode(), data) for n, kind, data in events])
