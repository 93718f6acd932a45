"""What lists show of a session, stored with its chunks: so a list needs no files."""

import asyncio
from collections.abc import Sequence

from pydantic import TypeAdapter

from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.metadata import Metadata
from session_sidecar.replicas.archive.chunks import Chunks, SealedOutline
from session_sidecar.replicas.archive.sealing import Keyring, Place, Seal

_METADATA = TypeAdapter(Metadata)


class Outlines:
    """The outlines of sessions: made of their files at the end of a turn, and read without them."""

    def __init__(self, chunks: Chunks, keyring: Keyring, history: History) -> None:
        self._chunks = chunks
        self._keyring = keyring
        self._history = history

    async def sealed(self, session_id: str, resource_id: str, seal: Seal) -> SealedOutline:
        """The outline of a session whose files are here, to be stored."""
        outline = await asyncio.to_thread(self._history.outline, session_id)
        data = seal.seal(place_of(session_id), _METADATA.dump_json(outline))
        return SealedOutline(resource_id, seal.key_id, data)

    async def read(self, session_ids: Sequence[str]) -> list[Metadata]:
        """The outlines of a page of sessions, in two queries; "missing" for those that have none stored.

        Raises KeyMissing, SealBroken.
        """
        found = await self._chunks.outlines(session_ids)
        resources = {outline.resource_id for outline in found.values() if outline.key_id is not None}
        salts = await self._chunks.salts(resources) if resources else {}
        seals = {name: self._keyring.seal_of(name, salts.get(name)) for name in {o.resource_id for o in found.values()}}
        return [
            _METADATA.validate_json(seals[outline.resource_id].open(place_of(name), outline.key_id, outline.data))
            if (outline := found.get(name)) is not None
            else Metadata()
            for name in session_ids
        ]


def place_of(session_id: str) -> Place:
    """Where an outline belongs."""
    return session_id, None, 0, 0
