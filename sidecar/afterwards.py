"""What is seen to when a turn has its result, or will have none: is it saved, and what becomes of its mapping.

Each look at a disk has a deadline, as one that hangs must not keep the thread. None of this fails.
"""

import asyncio
import logging

from session_store import SessionMap, SessionMapping
from sidecar.agent import Transcripts
from sidecar.errors import NotSaved
from sidecar.told import told
from sidecar.turn import Turn

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0


class Afterwards:
    """For turns that still have the claim on their thread."""

    def __init__(self, sessions: SessionMap, transcripts: Transcripts) -> None:
        self._sessions = sessions
        self._transcripts = transcripts

    async def saved_size(self, turn: Turn) -> int:
        """How many bytes the transcript has that holds the turn; 0, and the turn has failed, where it does not."""
        if turn.session_id is None:
            return 0
        said = turn.last_said if turn.result and turn.result.get("num_turns") else None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                before = turn.settled.size if turn.settled else 0
                info = await self._transcripts.saved(turn.session_id, said, prompt_id=turn.id, size=before)
        except Exception as error:
            logger.warning("turn %s: its transcript cannot be read: %s", turn.id, told(error).detail)
            info = None
        if info is None and said is not None:
            turn.error = NotSaved(
                "The transcript does not hold this turn: its volume is full, read-only or gone. What was said is in "
                "this stream alone. Tell the operator; then send the message again."
            )
        return info.size if info else 0

    async def note_end(self, turn: Turn) -> SessionMapping | None:
        """Bump the mapping's version: its transcript has grown. The mapping then, if it is still the turn's."""
        try:
            if turn.session_id is not None:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    return await self._sessions.touch(turn.request.key, turn.session_id)
        except Exception:
            # The conversation is safe in the transcript; only the row's time and version stay as they were.
            logger.exception("turn %s: the mapping's version was not bumped", turn.id)
        return None

    async def forget_unbegun(self, turn: Turn) -> None:
        """Take back a mapping that this turn made, if the SDK never got as far as a transcript and nobody was told."""
        if turn.made is None or turn.session is not None:
            return
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                if await self._transcripts.info(turn.made) is None:
                    await self._sessions.remove(turn.request.key, expected=turn.made)
        except Exception:
            # The mapping stays; the next turn finds no transcript and starts it under the same session ID.
            logger.exception("the mapping of a turn that never began was not removed")
