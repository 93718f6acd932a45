"""Dialects: how a turn's events are written for a reader. The sidecar's own is the server-sent events of the WHATWG.

A dialect makes the chunks of a response body of a log's batches; it keeps nothing of them.
"""

from collections.abc import AsyncIterator

from session_sidecar.turns.events import CHUNK_BYTES, Event, EventLog


async def native(log: EventLog, after: int) -> AsyncIterator[bytes]:
    """The events as they are: `id:` is the number, `event:` the kind, `data:` one line."""
    async for batch in log.batches(after):
        if len(batch) == 1 and len(batch[0].data) > CHUNK_BYTES:
            # By itself, as it is: a large one is not copied for each of its readers.
            yield _head(batch[0])
            yield batch[0].data
            yield _TAIL
        else:
            yield b"".join(part for event in batch for part in (_head(event), event.data, _TAIL))


def _head(event: Event) -> bytes:
    return f"id: {event.number}\nevent: {event.kind}\ndata: ".encode()


_TAIL = b"\n\n"
