"""Sealing anew, with the first key, what is stored under another or under none. It can be broken off at any moment."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field

from session_sidecar.errors import KeyMissing, SealBroken
from session_sidecar.replicas.archive.chunks import Chunk, Chunks, Position, Row
from session_sidecar.replicas.archive.outlines import place_of
from session_sidecar.replicas.archive.sealing import Keyring, Seal

_BATCH_ROWS = 16  # of 256 KiB at most each


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rotation has come, in rows. What was written meanwhile is in none of the numbers."""

    done: int
    of: int
    unreadable: int = 0  # rows that do not open: they are left as they are
    why: Mapping[str, str] = field(default_factory=dict, compare=False)  # by session, why some of it does not open


async def rotate(chunks: Chunks, keyring: Keyring) -> AsyncGenerator[Progress, None]:
    """Seal all rows with the first key, a few at a time; after each time, how far it is.

    Whoever stops, and begins again later, goes on where it was. What a turn writes meanwhile is left to the turn. Old
    keys may be taken out of the setting once `of` is 0 at the start. What does not open, as its key is not in the ring
    or was deleted, or as it was altered, is counted, and left as it is. Raises ValueError without keys.
    """
    first = keyring.first
    if first is None:
        raise ValueError("there is no key to seal with")
    of = await chunks.count_sealed_otherwise(first)
    done, unreadable, why = 0, 0, dict[str, str]()
    yield Progress(0, of)
    after: Position | None = None
    while rows := await chunks.sealed_otherwise(first, after=after, limit=_BATCH_ROWS):
        salts = await chunks.salts({row.resource_id for _, row in rows})
        for after, row in rows:  # noqa: B007 - where the next batch begins
            salt = salts.get(row.resource_id)
            if salt is None and row.key_id is None:
                salt = salts[row.resource_id] = await chunks.salt(row.resource_id)
            try:
                done += await _reseal(chunks, row, first, keyring.seal_of(row.resource_id, salt))
            except (KeyMissing, SealBroken) as error:
                unreadable += 1
                why[row.session_id] = str(error.detail)
        yield Progress(done, of, unreadable, why)


async def _reseal(chunks: Chunks, row: Row, key_id: str, seal: Seal) -> bool:
    if (head := row.head) is None:
        data = seal.open(place_of(row.session_id), row.key_id, row.data)
        return await chunks.reseal(row, key_id, b"", seal.seal(place_of(row.session_id), data))
    data = seal.bytes_of(row.session_id, Chunk(head, row.data))
    sealed = seal.chunk(row.session_id, head.path, head.seq, head.offset, data)
    return await chunks.reseal(row, key_id, sealed.head.mac, sealed.data)
