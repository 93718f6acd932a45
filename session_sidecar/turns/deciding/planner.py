"""What there is for a turn is looked at, and what its plan says is done, all before a process is given the prompt."""

import contextlib
from collections.abc import Callable

from session_sidecar.agent.transcripts import NOTHING, Revision
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import (
    MessageNotFound,
    SessionNotFound,
    ThreadExists,
    ThreadMoved,
    TranscriptMissing,
    UnsafeForkPoint,
)
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.deciding.plan import Branching, Plan, Seen
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.turn import Settled, TurnRequest
from session_store import SessionMap, SessionMapping, ThreadKey, ThreadMapped


class Planner:
    """Looks and commits for one thread at a time; whoever asks has the claim on it."""

    def __init__(
        self,
        session_map: SessionMap,
        tenancy: Tenancy,
        transcripts: Transcripts,
        exclusion: Exclusion,
        settled: Callable[[ThreadKey], Revision | None],
        *,
        feed: Feed,
    ) -> None:
        """`settled` tells where the last turn ended on a thread whose process is at work in the background."""
        self._map = session_map
        self._tenancy = tenancy
        self._transcripts = transcripts
        self._exclusion = exclusion
        self._settled = settled
        self._feed = feed

    async def look(self, request: TurnRequest) -> Seen:
        """What there is for a turn, whose thread this replica has from here on; nothing else is changed.

        Raises HeldElsewhere, SessionNotFound, ThreadExists, ThreadMoved, TranscriptMissing, SessionAmbiguous,
        MessageNotFound, UnsafeForkPoint and TranscriptsUnavailable.
        """
        key = request.key
        if request.fork_of is not None:
            parent, point = await self.fork_point(request.fork_of, key, request.at_message_id)
            return Seen(branching=await self._branching(parent, point))
        mapping = await self._tenancy.enter(key)
        if request.after_turn is not None:
            await self._check_head(mapping, request.after_turn)
        if mapping is None:
            await self._transcripts.check()
            return Seen()
        info = await self._transcripts.info(mapping.sdk_session_id)
        restarts = info is None and mapping.version == 0 and request.if_missing == "restart"
        if restarts and mapping.parent_thread_id is not None:
            return Seen(mapping, branching=await self._branching_again(mapping, mapping.parent_thread_id))
        return Seen(mapping, info, self._settled(key))

    async def _check_head(self, mapping: SessionMapping | None, after_turn: str) -> None:
        """Raise ThreadMoved if the thread's last turn is another one than its person has seen."""
        last = await self._transcripts.head(mapping.sdk_session_id) if mapping is not None else None
        if (last or "") != after_turn:
            raise ThreadMoved("Nothing was started. Load the chat again, and send the message once more.")

    async def commit(self, key: ThreadKey, plan: Plan) -> None:
        """Change what the plan says.

        Raises ThreadMapped where another replica was first, ThreadExists where it was with the thread of a fork;
        SessionNotFound, NotSaved, TranscriptsUnavailable.
        """
        session_id = plan.launch.session_id
        if plan.change == "add":
            try:
                at = plan.copied.message_id if plan.copied else plan.launch.at
                added = await self._map.add(
                    key, session_id, parent_thread_id=plan.parent_thread_id, parent_message_id=at
                )
            except ThreadMapped:
                if plan.outcome == "forked":
                    raise ThreadExists("Choose another `thread_id`, or delete this one first.") from None
                raise
            self._feed.came_to_be(added)
        elif plan.change == "replace":
            if await self._map.replace(key, session_id, expected=plan.replaced or "") is None:
                raise SessionNotFound("The thread was deleted or changed meanwhile. Send the message again.")
        elif plan.change == "aside":
            await self._transcripts.set_aside(session_id)

    async def make_whole(self, plan: Plan) -> Settled:
        """See that a CLI that is about to go on from the plan's session finds all of the conversation; where it ends.

        No process may have it. A fork's parent is left as it is, as others may be writing to that: what is mended is
        a copy. Raises TranscriptMissing, SessionAmbiguous, MessageNotFound, NotSaved, TranscriptsUnavailable.
        """
        session_id = plan.launch.session_id
        if plan.outcome == "resumed":
            await self._transcripts.relink(session_id)
        if plan.copied is None:
            return plan.settled
        await self._transcripts.fork(plan.copied.session_id, plan.copied.message_id, session_id)
        copy = await self._transcripts.info(session_id)
        return Settled(session_id, copy.revision if copy else NOTHING)

    async def _branching_again(self, mapping: SessionMapping, parent_thread_id: str) -> Branching | None:
        """Where a fork began that a crash cut off before it had a transcript: what it was to hold is in its parent."""
        parent = await self._map.get(ThreadKey(parent_thread_id, mapping.resource_id))
        if parent is not None:
            await self._tenancy.look(parent)
            with contextlib.suppress(TranscriptMissing, MessageNotFound):
                point = await self._transcripts.fork_point(parent.sdk_session_id, mapping.parent_message_id)
                return await self._branching(parent, point)
        return None

    async def _branching(self, parent: SessionMapping, point: str) -> Branching:
        session_id = parent.sdk_session_id
        title = await self._transcripts.fork_title(session_id)
        torn = not await self._transcripts.is_whole(session_id)
        return Branching(parent.thread_id, session_id, point, title, torn)

    async def fork_point(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> tuple[SessionMapping, str]:
        """The parent of a fork under `key`, and the message to cut it after: never in the middle of a running turn.

        Raises SessionNotFound, ThreadExists, TranscriptMissing, MessageNotFound, UnsafeForkPoint and
        TranscriptsUnavailable.
        """
        await self._transcripts.check()
        await self._parent(parent_key)
        if await self._map.get(key) is not None:
            raise ThreadExists("Choose another `thread_id`, or delete this one first.")
        settled = await self._settled_end(parent_key)
        parent = await self._parent(parent_key)
        if settled.revision == NOTHING or settled.session_id != parent.sdk_session_id:
            raise UnsafeForkPoint("This session has no completed turn yet. Fork it when its first one has ended.")
        return parent, await self._transcripts.fork_point(parent.sdk_session_id, at, end=settled.revision)

    async def _parent(self, key: ThreadKey) -> SessionMapping:
        parent = await self._map.get(key)
        if parent is None:
            raise SessionNotFound
        return parent

    async def _settled_end(self, key: ThreadKey) -> Settled:
        """Where the last turn that has ended on a thread ended in its transcript, whatever begins or runs meanwhile."""
        while (running := self._exclusion.running(key)) is not None:
            await running.planned.wait()  # or it has failed, and another may run
            if running.settled is not None:
                return running.settled
        async with self._exclusion.pause(key):
            parent = await self._parent(key)
            stored = await self._tenancy.look(parent)
            revision = self._settled(key)
            if revision is None:
                revision = stored
            if revision is None:
                info = await self._transcripts.info(parent.sdk_session_id)
                if info is None:
                    raise TranscriptMissing("Its transcript is not there. Fork another thread, or start anew.")
                revision = info.revision
            return Settled(parent.sdk_session_id, revision)
