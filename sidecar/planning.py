"""Which session a turn is for: looked up, decided and committed before a process is given the prompt."""

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from session_store import SessionMap, SessionMapping, ThreadKey
from sidecar.agent import Launch, Transcripts
from sidecar.errors import MessageNotFound, SessionMissing, SessionNotFound, ThreadExists, UnsafeForkPoint
from sidecar.threads import Threads
from sidecar.turn import Outcome, Settled, Turn


@dataclass(frozen=True, slots=True)
class Plan:
    """What a turn launches, and what it has done to the thread's mapping."""

    launch: Launch
    outcome: Outcome
    replaced: str | None = None
    version: int = 0  # of the mapping, for a session that is resumed
    size: int = 0  # of its transcript, in bytes


class Planner:
    """Decides for one thread at a time; whoever asks has the claim on it."""

    def __init__(
        self,
        sessions: SessionMap,
        transcripts: Transcripts,
        threads: Threads,
        settled: Callable[[ThreadKey], int | None],
    ) -> None:
        """`settled` tells where the last turn ended on a thread whose process is at work in the background."""
        self._sessions = sessions
        self._transcripts = transcripts
        self._threads = threads
        self._settled = settled

    async def plan(self, turn: Turn, new_id: Callable[[], str]) -> Plan:
        """Decide which session `turn` is for and commit the mapping.

        A thread without a session gets one under the ID that `new_id` gives: a process may wait for it already.

        Raises SessionNotFound, SessionMissing, ThreadExists, MessageNotFound, UnsafeForkPoint, TranscriptsUnavailable.
        """
        request = turn.request
        if request.fork_of is not None:
            parent, point = await self.fork_point(request.fork_of, request.key, request.at_message_id)
            turn.made = make_id()
            turn.settle(Settled(turn.made, 0))
            await self._sessions.add(request.key, turn.made, parent_thread_id=parent.thread_id, parent_message_id=point)
            return Plan(Launch(turn.made, parent.sdk_session_id, point), "forked")
        mapping = await self._sessions.get(request.key)
        if mapping is None:
            await self._transcripts.check()
            turn.made = new_id()
            turn.settle(Settled(turn.made, 0))
            await self._sessions.add(request.key, turn.made)
            return Plan(Launch(turn.made), "started")
        if info := await self._transcripts.info(mapping.sdk_session_id):
            size = self._settled(request.key)
            turn.settle(Settled(mapping.sdk_session_id, info.size if size is None else size))
            launch = Launch(mapping.sdk_session_id, mapping.sdk_session_id)
            return Plan(launch, "resumed", version=mapping.version, size=info.size)
        if request.if_missing == "fail":
            raise SessionMissing("The mapping is untouched. Restore the transcript, or send `if_missing: restart`.")
        return await self._restart(turn, mapping)

    async def fork_point(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> tuple[SessionMapping, str]:
        """The parent of a fork under `key`, and the message to cut it after: never in the middle of a running turn.

        Raises SessionNotFound, ThreadExists, SessionMissing, MessageNotFound, UnsafeForkPoint, TranscriptsUnavailable.
        """
        await self._transcripts.check()
        await self._parent(parent_key)
        if await self._sessions.get(key) is not None:
            raise ThreadExists("Choose another `thread_id`, or delete this one first.")
        settled = await self._settled_end(parent_key)
        parent = await self._parent(parent_key)
        if settled.size == 0 or settled.session_id != parent.sdk_session_id:
            raise UnsafeForkPoint("This session has no completed turn yet. Fork it when its first one has ended.")
        return parent, await self._transcripts.fork_point(parent.sdk_session_id, at, size=settled.size)

    async def _parent(self, key: ThreadKey) -> SessionMapping:
        parent = await self._sessions.get(key)
        if parent is None:
            raise SessionNotFound("This resource has no thread `from_thread_id` to fork.")
        return parent

    async def _settled_end(self, key: ThreadKey) -> Settled:
        """Where the last turn that has ended on a thread ended in its transcript, whatever begins or runs meanwhile."""
        while (running := self._threads.running(key)) is not None:
            await running.planned.wait()  # or it has failed, and another may run
            if running.settled is not None:
                return running.settled
        async with self._threads.pause(key):
            parent = await self._parent(key)
            size = self._settled(key)
            if size is None:
                info = await self._transcripts.info(parent.sdk_session_id)
                if info is None:
                    raise SessionMissing("Its transcript is not there. Fork another thread, or start anew.")
                size = info.size
            return Settled(parent.sdk_session_id, size)

    async def _restart(self, turn: Turn, mapping: SessionMapping) -> Plan:
        """Begin again where the transcript is gone. A session that never had a completed turn keeps its ID."""
        if mapping.version > 0:
            new = make_id()
            turn.settle(Settled(new, 0))
            if await self._sessions.replace(mapping.key, new, expected=mapping.sdk_session_id) is None:
                raise SessionNotFound("The thread was deleted or changed meanwhile. Send the message again.")
            return Plan(Launch(new), "restarted", replaced=mapping.sdk_session_id)
        turn.settle(Settled(mapping.sdk_session_id, 0))
        # The CLI takes no session ID whose file exists, and a crash can leave one that has no message in it yet.
        await self._transcripts.set_aside(mapping.sdk_session_id)
        if mapping.parent_thread_id is not None:
            # A fork that a crash cut off before it had a transcript. What it was to hold is still in its parent.
            parent = await self._sessions.get(ThreadKey(mapping.parent_thread_id, mapping.resource_id))
            with contextlib.suppress(SessionMissing, MessageNotFound):
                if parent is not None:
                    point = await self._transcripts.fork_point(parent.sdk_session_id, mapping.parent_message_id)
                    return Plan(Launch(mapping.sdk_session_id, parent.sdk_session_id, point), "forked")
        return Plan(Launch(mapping.sdk_session_id), "restarted")


def make_id() -> str:
    """A session ID that nobody has."""
    return str(uuid.uuid4())
