"""What was written here and is not stored yet: the files have it, and are only given up when all of it is stored."""

import logging
import time
from collections.abc import Iterator
from typing import Literal

from session_sidecar.agent.transcripts import Revision
from session_sidecar.errors import SidecarError, TranscriptMissing, public_error
from session_sidecar.replicas.archive.sync import Archive
from session_store import ThreadKey
from session_store.leases import LeaseLost, Leases

logger = logging.getLogger(__name__)

Outcome = Literal["stored", "late", "refused", "gone"]


class Outbox:
    """Stores sessions under the leases on their threads, and takes their files away where they are not to stay."""

    def __init__(self, archive: Archive, leases: Leases, *, keeps_files: bool) -> None:
        """`keeps_files`: what is stored stays here too, for the next turn. Else only while a thread is in use."""
        self.archive = archive
        self.keeps_files = keeps_files
        self._leases = leases
        self._ends: dict[ThreadKey, tuple[str, Revision | None]] = {}  # of turns that are not stored yet
        self._used: dict[str, tuple[ThreadKey, float]] = {}  # sessions whose files may be here, and since when

    def ended(self, key: ThreadKey, session_id: str, settled: Revision | None) -> None:
        """Note where a turn has ended: the next push stores that too."""
        self._ends[key] = session_id, settled

    async def push(self, key: ThreadKey, session_id: str, *, outline: bool = False) -> Outcome:
        """Store what there is of a session, with the end of its last turn; what became of it. Never fails.

        With `outline`, what lists show of it is stored anew, if anything is new.
        """
        self.use(session_id, key)
        end = self._ends.get(key)
        settled = end[1] if end is not None and end[0] == session_id else None
        try:
            fence = self._leases.fence(key)
            await self.archive.push(session_id, key, fence, settled=settled, outline=outline)
        except LeaseLost:
            logger.error("session %s: what was written is refused, as another replica has the thread", session_id)  # noqa: TRY400
            self._ends.pop(key, None)
            return "refused"
        except TranscriptMissing:
            logger.error("session %s: what was not stored of its transcript is gone from this machine", session_id)  # noqa: TRY400
            self._ends.pop(key, None)
            return "gone"  # there is nothing to wait for: whoever has the thread next goes on from what is stored
        except Exception as error:
            logger.warning("session %s is not stored yet: %s", session_id, public_error(error).detail)
            return "late"
        if self._ends.get(key) is end:
            self._ends.pop(key, None)
        return "stored"

    def use(self, session_id: str, key: ThreadKey) -> None:
        """Note that the files of a session may be here."""
        if not self.keeps_files:
            self._used.pop(session_id, None)
            self._used[session_id] = key, time.monotonic()  # the most recently used comes last

    def unused(self, seconds: float) -> Iterator[tuple[str, ThreadKey]]:
        """The sessions whose files are to go, as nobody has asked for them for so long."""
        for session_id, (key, used) in list(self._used.items()):
            if time.monotonic() - used < seconds:
                return
            yield session_id, key

    async def forget(self, session_id: str) -> bool:
        """Take the files of a session away, if all of it is stored; whether it was. Nobody may be about to use them."""
        try:
            gone = await self.archive.forget(session_id)
        except SidecarError as error:
            logger.warning("session %s stays here for now: %s", session_id, error.detail)
            return False
        if gone:
            self._used.pop(session_id, None)
        return gone
