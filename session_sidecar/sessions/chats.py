"""Chats: conversations that branch under one name, as clients have them that know only one ID.

The threads of a chat are the one of its name, its family of forks, and those that were begun for it by `begin`: these
are called after it, with a `~` and eight digits.
"""

import functools
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from session_sidecar.agent.transcripts.reading.conversations import AskedExchanges, Conversations
from session_sidecar.agent.transcripts.reading.exchanges import Exchange, Known
from session_sidecar.agent.transcripts.reading.history import Page
from session_sidecar.errors import (
    InvalidRequest,
    SessionAmbiguous,
    SessionNotFound,
    SidecarError,
    TranscriptMissing,
)
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.sessions.family import MOST, family
from session_sidecar.sessions.heads import Place, Thread, decide, go_on
from session_sidecar.turns.replay.keys import digest
from session_sidecar.turns.turn import Turn, TurnRequest
from session_sidecar.turns.turns import Turns
from session_store import SessionMap, SessionMapping, ThreadKey

__all__ = ["AskedExchanges", "Chats", "Exchange", "Parents"]

_BRANCH = re.compile(r"~[0-9a-f]{8}")
BRANCH_CHARS = 9
MOST_LOOKED_AT = 100
"""For a message's place among the threads of a chat, so many transcripts are read: of those that were used last."""
Scope = Literal["latest", "this"]
"""Of which threads: all of a chat, the one used last first; or the one of its name alone."""
MAX_CHARS = 256


@dataclass(frozen=True, slots=True)
class Parents:
    """What a client knows of what was said before a message: the names of the exchanges, the nearest first.

    `thread_id` is the thread that the nearest one was part of, if the client has kept that; `answered` is whether it
    has seen an answer at all.
    """

    names: Sequence[str] = ()
    thread_id: str | None = None
    answered: bool = False


class Chats:
    """What chats say, and where their messages go."""

    def __init__(self, session_map: SessionMap, tenancy: Tenancy, conversations: Conversations, turns: Turns) -> None:
        self._map = session_map
        self._tenancy = tenancy
        self._conversations = conversations
        self._turns = turns

    async def begin(self, request: TurnRequest, parents: Parents, *, branch: Scope) -> Turn:
        """Begin a turn of the chat `request.key`: on the thread that ends with the parent, or as a branch of it.

        What two clients do at once to the same parent never puts a message behind one that its person has not seen.
        Raises MessageNotFound, ThreadBusy, InvalidRequest, HeldElsewhere, and what `Turns.begin` does; the turn may end
        with ThreadMoved.
        """
        # A retry is known by what was asked for, wherever the first attempt was put.
        request = replace(request, asked=digest(request))
        place = self._turns.begun(request)
        if place is None:
            self._turns.admit(request.key.resource_id)
            try:
                found = await self._place(request, parents, branch)
            except SidecarError:
                if (place := self._turns.begun(request)) is None:
                    raise
            else:
                place = self._turns.begun(request) or found  # another attempt may have come first meanwhile
        return self._turns.begin(place)

    async def running(self, key: ThreadKey, *, branch: Scope) -> Turn | None:
        """The turn that runs in a chat: of several, the one that was asked for last. Raises HeldElsewhere."""
        return await self._running(await self._threads(key, branch))

    async def page(
        self,
        key: ThreadKey,
        asked: AskedExchanges,
        write: Callable[[str, Exchange], str],
        *,
        branch: Scope,
    ) -> tuple[SessionMapping, Page, Turn | None]:
        """A page of the branch of a chat that was used last, or of the thread of its name alone.

        Each exchange is as `write` (a function of a module) has it, which is told the thread. With the turn that runs
        there: what belongs to it is not part of the page. Raises SessionNotFound, TranscriptMissing, SessionAmbiguous,
        MessageNotFound, HeldElsewhere.
        """
        rows = await self._threads(key, branch)
        if not rows:
            raise SessionNotFound
        turn = await self._running(rows)
        row = next((row for row in rows if turn and row.key == turn.request.key), None)
        row = row or max(rows, key=lambda row: row.updated_at)
        await self._tenancy.look(row)
        if turn is not None:
            await turn.planned.wait()  # before that it may be writing, and nobody knows from where on
        settled = turn.settled if turn else None
        if settled is not None and settled.session_id == row.sdk_session_id:
            asked = replace(asked, size=settled.revision)
        try:
            writer = functools.partial(write, row.thread_id)
            page = await self._conversations.page(row.sdk_session_id, asked, writer)
        except TranscriptMissing:
            if turn is None:
                raise
            page = Page([], None)  # its first turn has only just begun
        if await self._running(rows) is not turn:  # one has ended or begun meanwhile
            return await self.page(key, replace(asked, size=None), write, branch=branch)
        return row, page, turn

    async def _running(self, rows: Sequence[SessionMapping]) -> Turn | None:
        running = await self._turns.running(row.key for row in rows)
        turns = [await self._turns.rejoin(key, None) for key in running]
        under_way = [turn for turn in turns if turn is not None and not turn.ended.is_set()]
        return max(under_way, key=lambda turn: turn.times["asked"], default=None)

    async def _threads(self, key: ThreadKey, branch: Scope) -> list[SessionMapping]:
        """The threads of a chat."""
        own = await self._map.get(key)
        if branch == "this":
            return [own] if own is not None else []
        rows: dict[ThreadKey, SessionMapping] = {}
        if own is not None:
            root, _ = await family(self._map, own)
            rows = {branch.mapping.key: branch.mapping for branch in root if branch.mapping is not None}
        begins = f"{key.thread_id}~"
        if len(begins) < MAX_CHARS:
            named = await self._map.page(key.resource_id, limit=MOST, thread_id_prefix=begins)
            rows |= {row.key: row for row in named if _is_of(row.thread_id, key.thread_id)}
        return list(rows.values())

    async def _place(self, request: TurnRequest, parents: Parents, branch: Scope) -> TurnRequest:
        chat = request.key
        found: list[Thread] = []
        async for thread in self._known(chat, parents, branch):
            found.append(thread)
            if parents.names and (place := go_on([thread], parents.names[0])):
                return _placed(request, place)
        place = decide(
            chat.thread_id,
            found,
            parents.names,
            answered=parents.answered,
            strategy=request.multitask_strategy,
        )
        return _placed(request, place)

    async def _known(self, chat: ThreadKey, parents: Parents, branch: Scope) -> AsyncIterator[Thread]:
        """The threads of a chat: the one that its client names, its own, and then those that were used last."""
        looked: set[ThreadKey] = set()
        named = (chat.thread_id,) if branch == "this" else (parents.thread_id, chat.thread_id)
        for name in named:  # mostly it is one of these, and nothing has to be searched
            key = ThreadKey(name, chat.resource_id) if name is not None and _is_of(name, chat.thread_id) else None
            if key is not None and key not in looked and (row := await self._map.get(key)) is not None:
                looked.add(key)
                yield await self._look(row, parents.names)
        rows = await self._threads(chat, branch)
        for row in sorted(rows, key=lambda row: row.updated_at, reverse=True)[:MOST_LOOKED_AT]:
            if row.key not in looked:
                yield await self._look(row, parents.names)

    async def _look(self, row: SessionMapping, names: Sequence[str]) -> Thread:
        """What there is of a thread. Raises HeldElsewhere where another replica has it, which knows more."""
        running = await self._running([row])
        size: int | None = await self._tenancy.look(row)
        if running is not None:
            settled = running.settled
            size = settled.revision if settled and settled.session_id == row.sdk_session_id else size
        try:
            known: list[Known] | None = await self._conversations.known(row.sdk_session_id, names, size=size)
        except (TranscriptMissing, SessionAmbiguous):
            known = None
        thread = Thread(row.thread_id, known or (), lost=known is None and running is None)
        if running is None:
            return thread
        return replace(thread, running=thread.head if running.origin == "background" else running.id)


def _is_of(thread_id: str, chat: str) -> bool:
    """Whether a thread is called after a chat, or is its own."""
    return thread_id == chat or (thread_id.startswith(chat) and bool(_BRANCH.fullmatch(thread_id, len(chat))))


def _placed(request: TurnRequest, place: Place) -> TurnRequest:
    chat, thread = request.key, ThreadKey(place.thread_id, request.key.resource_id)
    if not place.is_branch:
        return replace(request, key=thread, after_turn=place.after_turn)
    if len(chat.thread_id) + BRANCH_CHARS > MAX_CHARS:
        message = f"is too long to branch from: {MAX_CHARS - BRANCH_CHARS} characters leave room for a branch's name"
        raise InvalidRequest("Nothing was started. See `errors`.", [{"field": "id", "message": message}])
    branch = replace(request, key=ThreadKey(f"{chat.thread_id}~{secrets.token_hex(4)}", chat.resource_id))
    return branch if place.at is None else replace(branch, fork_of=thread, at_message_id=place.at)
