"""Mappings changed by hand, not by a turn: a thread forgotten, a whole resource erased, a session adopted."""

import asyncio
from collections.abc import Callable

import session_store
from session_sidecar.agent.processes.orphans import live_clis
from session_sidecar.agent.transcripts.files import is_session_id
from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.metadata import Metadata
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import (
    HeldElsewhere,
    InvalidRequest,
    SessionBusy,
    SessionTaken,
    ThreadBusy,
    ThreadDeleted,
    ThreadExists,
    TranscriptMissing,
)
from session_sidecar.replicas.peers import Peers
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.sessions.reading import Reading, Session
from session_sidecar.settings import Settings
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.turns import Turns
from session_store import SessionMap, ThreadKey

__all__ = ["Changes", "is_session_id"]

BATCH = 100


class Changes:
    """The mappings of this process, for changes while no turn is on the thread."""

    def __init__(
        self,
        *,
        session_map: SessionMap,
        tenancy: Tenancy,
        transcripts: Transcripts,
        history: History,
        reading: Reading,
        turns: Turns,
        peers: Peers | None,
        feed: Feed,
        settings: Settings,
    ) -> None:
        self._map = session_map
        self._tenancy = tenancy
        self._transcripts = transcripts
        self._history = history
        self._reading = reading
        self._turns = turns
        self._peers = peers
        self._feed = feed
        self._claude_config = settings.claude_config

    async def forget(
        self,
        key: ThreadKey,
        *,
        transcript: bool = False,
        force: bool = False,
        version: int | None = None,
        unless: Callable[[Metadata], bool] | None = None,
    ) -> bool:
        """Remove a thread's mapping, and its transcript if asked to; whether there was a mapping.

        Turns on the thread are stopped with `force`, the waiting ones too, and their processes are gone before anything
        is removed. With `version`, a mapping that has another one by now stays; and so does one of whose session
        `unless` holds, which is asked when nobody can change it any more. Raises ThreadBusy, and TranscriptsUnavailable
        before anything is removed.
        """
        if transcript:
            await self._transcripts.check()  # else the mapping would go, and the transcript be back with its volume
        async with self._turns.hold(key, stop=_DELETED if force else None) as afterwards:
            mapping = await self._map.get(key)
            if mapping is None:
                self._turns.forget(key)
                return False
            if version not in (None, mapping.version):
                return False
            if unless is not None and unless(*await self._history.outlines([mapping.sdk_session_id])):
                return False
            # The transcript goes first: after a crash between the two the mapping is still there, and whoever asks
            # again finds the rest by it. The other way round, nothing would say any more whose the transcript was.
            if transcript:
                await self._transcripts.delete(mapping.sdk_session_id)
                await self._tenancy.erase(mapping.sdk_session_id)
            removed = await self._map.remove(key, expected=mapping.sdk_session_id, version=mapping.version)
            self._turns.forget(key)
            if removed is not None:
                afterwards.callback(self._feed.tell, "deleted", key)
            return removed is not None

    async def forget_all(self, resource_id: str, *, transcripts: bool = False, force: bool = False) -> int:
        """Remove all mappings of a resource, as `forget` does each; how many there were.

        When it returns, all of them are gone, those that were added meanwhile too. Without `force` it raises ThreadBusy
        before anything is removed, or where it comes to a turn that has begun since then: what was removed until then
        stays removed, and asking again removes the rest.
        """
        busy = self._turns.busy(resource_id)
        if busy and not force:
            raise ThreadBusy(
                f"Turns are on {len(busy)} threads of this resource; nothing was removed. "
                "Wait for them, or send `force=true` to stop them.",
                retry_after=1,
            )
        count = 0
        for key in busy:  # some are about to make their mapping
            count += await self._forget_anywhere(key, transcript=transcripts, force=force)
        while rows := await self._map.page(resource_id, limit=BATCH, descending=False):
            for row in rows:
                count += await self._forget_anywhere(row.key, transcript=transcripts, force=force)
        return count

    async def _forget_anywhere(self, key: ThreadKey, *, transcript: bool, force: bool) -> bool:
        """`forget` by the replica that has the thread. Raises ThreadBusy, and HeldElsewhere where that does not."""
        try:
            return await self.forget(key, transcript=transcript, force=force)
        except HeldElsewhere as there:
            if not force:
                raise ThreadBusy(_BUSY_ELSEWHERE, retry_after=1) from None
            if self._peers is None or not await self._peers.forget(there, key, transcript=transcript, force=force):
                raise
            return True

    async def describe(self, key: ThreadKey, changes: dict[str, str | None]) -> Session:
        """Set a session's `title` or `tag`, or both: see `Transcripts.describe`. The session as it is then.

        Raises ThreadBusy, SessionNotFound, TranscriptMissing, SessionAmbiguous, InvalidRequest, NotSaved,
        TranscriptsUnavailable.
        """
        async with self._turns.hold(key) as afterwards:
            mapping = await self._reading.mapping(key)
            try:
                await self._transcripts.describe(mapping.sdk_session_id, changes)
            except ValueError as error:
                raise InvalidRequest("Nothing was changed.", [{"field": "tag", "message": str(error)}]) from None
            afterwards.callback(self._feed.tell, "titled", key)
        # Not while the thread is held: of a long one it is seconds.
        metadata = await self._history.metadata(mapping.sdk_session_id)
        return Session(mapping, running=False, metadata=metadata)

    async def adopt(self, key: ThreadKey, session_id: str) -> tuple[Session, bool]:
        """Map a thread to a session that exists; the session, and whether its mapping is new.

        Raises ThreadBusy, ThreadExists, TranscriptMissing, SessionTaken, SessionBusy, TranscriptsUnavailable.
        """
        async with self._turns.hold(key) as afterwards:
            mapping = await self._map.get(key)
            if mapping is not None and mapping.sdk_session_id == session_id:
                return Session(mapping, running=False), False
            if mapping is not None:
                raise ThreadExists("This thread has another session. Choose another `thread_id`, or delete this one.")
            await self._tenancy.bring(key, session_id)
            info = await self._transcripts.info(session_id)
            if info is None:
                raise TranscriptMissing(
                    "There is no transcript of this session that could be resumed. "
                    f"Put its .jsonl into {self._claude_config}/projects/, in the directory it comes from."
                )
            try:
                added = await self._map.add(key, session_id)
            except session_store.SessionMapped:
                raise SessionTaken("Fork that thread instead: the fork has a session of its own.") from None
            # Only now, as it is no stranger's CLI if the session is another thread's.
            if any(cli.session_id == session_id for cli in await asyncio.to_thread(live_clis, self._claude_config)):
                await self._map.remove(key, expected=session_id)
                afterwards.callback(self._feed.tell, "deleted", key)  # a list may have shown it
                raise SessionBusy("A CLI has this session open, and would lose its turns. Close it, then try again.")
            self._tenancy.settle(key, session_id, info.revision)
            afterwards.callback(self._feed.came_to_be, added)
            return Session(added, running=False), True


_BUSY_ELSEWHERE = "A turn runs on it. What came before it is removed. Wait, or send `force=true` to stop it."
_DELETED = ThreadDeleted("Its turns were stopped. Send the message again to begin the thread anew.")
