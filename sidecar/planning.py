"""Which session a turn is for: looked up, decided and committed before a process is given the prompt."""

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from session_store import SessionMap, SessionMapping, ThreadKey
from sidecar.agent import Launch, Transcripts
from sidecar.errors import MessageNotFound, SessionMissing, SessionNotFound, ThreadExists
from sidecar.turn import Outcome, Turn


@dataclass(frozen=True, slots=True)
class Plan:
    """What a turn launches, and what it has done to the thread's mapping."""

    launch: Launch
    outcome: Outcome
    made: bool = False  # the mapping is this turn's
    replaced: str | None = None
    version: int = 0  # of the mapping, for a session that is resumed


class Planner:
    """Decides for one thread at a time; whoever asks has the claim on it."""

    def __init__(self, sessions: SessionMap, transcripts: Transcripts) -> None:
        self._sessions = sessions
        self._transcripts = transcripts

    async def plan(self, turn: Turn, parent_turn: Turn | None, new_id: Callable[[], str]) -> Plan:
        """Decide which session `turn` is for and commit the mapping. `parent_turn` runs on the thread it forks, if any.

        A thread without a session gets one under the ID that `new_id` gives: a process may wait for it already.

        Raises SessionNotFound, SessionMissing, ThreadExists, MessageNotFound, UnsafeForkPoint, TranscriptsUnavailable.
        """
        request = turn.request
        if request.fork_of is not None:
            parent, point = await self.fork_point(request.fork_of, request.key, request.at_message_id, parent_turn)
            new = await self._sessions.add(
                request.key, make_id(), parent_thread_id=parent.thread_id, parent_message_id=point
            )
            return Plan(Launch(new.sdk_session_id, parent.sdk_session_id, point), "forked", made=True)
        mapping = await self._sessions.get(request.key)
        if mapping is None:
            await self._transcripts.check()
            new = await self._sessions.add(request.key, new_id())
            return Plan(Launch(new.sdk_session_id), "started", made=True)
        if info := await self._transcripts.info(mapping.sdk_session_id):
            turn.transcript_size = info.size
            launch = Launch(mapping.sdk_session_id, mapping.sdk_session_id)
            return Plan(launch, "resumed", version=mapping.version)
        if request.if_missing == "fail":
            raise SessionMissing("The mapping is untouched. Restore the transcript, or send `if_missing: restart`.")
        return await self._restart(mapping)

    async def fork_point(
        self, parent_key: ThreadKey, key: ThreadKey, at: str | None, parent_turn: Turn | None
    ) -> tuple[SessionMapping, str]:
        """The parent of a fork under `key`, and the message to cut it after: never in the middle of a running turn.

        Raises SessionNotFound, ThreadExists, SessionMissing, MessageNotFound, UnsafeForkPoint, TranscriptsUnavailable.
        """
        await self._transcripts.check()
        parent = await self._sessions.get(parent_key)
        if parent is None:
            raise SessionNotFound("This resource has no thread `from_thread_id` to fork.")
        if await self._sessions.get(key) is not None:
            raise ThreadExists("Choose another `thread_id`, or delete this one first.")
        return parent, await self._cut(parent, at, parent_turn)

    async def _cut(self, parent: SessionMapping, at: str | None, parent_turn: Turn | None) -> str:
        size = parent_turn.transcript_size if parent_turn else None
        return await self._transcripts.fork_point(parent.sdk_session_id, at, size=size)

    async def _restart(self, mapping: SessionMapping) -> Plan:
        """Begin again where the transcript is gone. A session that never had a completed turn keeps its ID."""
        if mapping.version > 0:
            new = make_id()
            if await self._sessions.replace(mapping.key, new, expected=mapping.sdk_session_id) is None:
                raise SessionNotFound("The thread was deleted or changed meanwhile. Send the message again.")
            return Plan(Launch(new), "restarted", replaced=mapping.sdk_session_id)
        # The CLI takes no session ID whose file exists, and a crash can leave one that has no message in it yet.
        await self._transcripts.set_aside(mapping.sdk_session_id)
        if mapping.parent_thread_id is not None:
            # A fork that a crash cut off before it had a transcript. What it was to hold is still in its parent.
            parent = await self._sessions.get(ThreadKey(mapping.parent_thread_id, mapping.resource_id))
            with contextlib.suppress(SessionMissing, MessageNotFound):
                if parent is not None:
                    point = await self._cut(parent, mapping.parent_message_id, None)
                    return Plan(Launch(mapping.sdk_session_id, parent.sdk_session_id, point), "forked")
        return Plan(Launch(mapping.sdk_session_id), "restarted")


def make_id() -> str:
    """A session ID that nobody has."""
    return str(uuid.uuid4())
