"""What is known of sessions: their mappings, whether a turn runs, and what the SDK's transcripts tell of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from session_sidecar.agent.transcripts.reading.chain import Glimpse, TranscriptMessage
from session_sidecar.agent.transcripts.reading.history import Asked, History, Page, Writer
from session_sidecar.agent.transcripts.reading.metadata import Metadata
from session_sidecar.errors import SessionNotFound, TranscriptMissing
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.sessions.family import Branch, family
from session_sidecar.turns.turns import Turns
from session_store import Cursor, SessionMap, SessionMapping, ThreadKey

__all__ = ["Asked", "Glimpse", "Listing", "Metadata", "Page", "Reading", "Session", "TranscriptMessage"]

MOST_SEARCHED = 1000


@dataclass(frozen=True, slots=True)
class Session:
    """A mapping, whether a turn runs on its thread, and what its transcript tells where that was asked for."""

    mapping: SessionMapping
    running: bool
    metadata: Metadata | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """Which mappings: those of a resource, or all; `text` is looked for in titles and first prompts, casefolded."""

    resource_id: str | None
    limit: int
    after: Cursor | None = None
    descending: bool = True
    thread_id_prefix: str | None = None
    parent_thread_id: str | None = None
    text: str | None = None
    metadata: bool = False


class Reading:
    """Nothing that is asked here changes anything."""

    def __init__(self, session_map: SessionMap, tenancy: Tenancy, history: History, turns: Turns) -> None:
        self._map = session_map
        self._tenancy = tenancy
        self._history = history
        self._turns = turns

    async def mapping(self, key: ThreadKey) -> SessionMapping:
        """The mapping of a thread. Raises SessionNotFound."""
        mapping = await self._map.get(key)
        if mapping is None:
            raise SessionNotFound
        return mapping

    async def session(self, key: ThreadKey, *, metadata: bool) -> Session:
        """A thread's session; without `metadata` no transcript is touched. Raises SessionNotFound."""
        mapping = await self.mapping(key)
        (session,) = await self._sessions([mapping])
        if not metadata:
            return session
        await self._tenancy.look(mapping)
        return replace(session, metadata=await self._history.metadata(mapping.sdk_session_id))

    async def page(self, listing: Listing) -> tuple[list[Session], Cursor | None]:
        """A page of sessions, and where the next one begins, if there is one.

        With a text, those whose title or first prompt holds it. These are read from the heads and tails of the
        transcripts, of up to `MOST_SEARCHED` sessions a call: a page may then hold less than asked for, or nothing,
        while there are more to look through.
        """
        if listing.text is not None:
            return await self._search(listing, listing.text)
        rows, more = await self._rows(listing, listing.after, listing.limit)
        outlines = await self.outlines(rows) if listing.metadata else [None] * len(rows)
        return await self._sessions(rows, outlines), rows[-1].cursor if more else None

    async def messages(self, key: ThreadKey, asked: Asked, write: Writer) -> Page:
        """A page of a thread's conversation, each message as `write` (a function of a module) has it.

        Raises SessionNotFound, TranscriptMissing, SessionAmbiguous, MessageNotFound.
        """
        mapping = await self.mapping(key)
        await self._tenancy.look(mapping)
        try:
            return await self._history.messages(mapping.sdk_session_id, asked, write)
        except TranscriptMissing:
            if not await self._turns.running([key]):
                raise
            return Page([], None)  # its first turn has only just begun

    async def family(self, key: ThreadKey) -> tuple[Branch, bool]:
        """The tree of forks that a thread is part of, and whether it is larger than shown. Raises SessionNotFound."""
        root, truncated = await family(self._map, await self.mapping(key))
        mapped = [(branch, branch.mapping) for branch in root if branch.mapping is not None]
        running = await self._turns.running(mapping.key for _, mapping in mapped)
        outlines = await self.outlines([mapping for _, mapping in mapped])
        for (branch, mapping), outline in zip(mapped, outlines, strict=True):
            branch.running, branch.title = mapping.key in running, outline.title
        await self._find_points(root, None)
        return root, truncated

    async def _find_points(self, branch: Branch, parent: Branch | None) -> None:
        """Find the messages that threads were forked after: in the fork itself, should the parent be gone."""
        point = branch.mapping.parent_message_id if branch.mapping else None
        for mapping in (branch.mapping, parent.mapping if parent else None):
            if mapping is not None and point is not None and branch.point is None:
                await self._tenancy.look(mapping)
                branch.point = await self._history.find(mapping.sdk_session_id, point)
        for child in branch.children:
            await self._find_points(child, branch)

    async def _sessions(
        self, rows: list[SessionMapping], outlines: Iterable[Metadata | None] = (None,)
    ) -> list[Session]:
        running = await self._turns.running(row.key for row in rows)
        return [Session(row, row.key in running, outline) for row, outline in zip(rows, outlines, strict=True)]

    async def _rows(self, listing: Listing, after: Cursor | None, limit: int) -> tuple[list[SessionMapping], bool]:
        """Some rows of the list, and whether there are more."""
        # One more than asked for tells whether there is a next page.
        rows = await self._map.page(
            listing.resource_id,
            limit=limit + 1,
            after=after,
            descending=listing.descending,
            thread_id_prefix=listing.thread_id_prefix,
            parent_thread_id=listing.parent_thread_id,
        )
        return rows[:limit], len(rows) > limit

    async def _search(self, listing: Listing, text: str) -> tuple[list[Session], Cursor | None]:
        found: list[tuple[SessionMapping, Metadata]] = []
        position, more, left = listing.after, True, MOST_SEARCHED
        while more and left and len(found) < listing.limit:
            rows, more = await self._rows(listing, position, min(left, 100))
            left -= len(rows)
            for row, outline in zip(rows, await self.outlines(rows), strict=True):
                if len(found) == listing.limit:
                    more = True
                    break
                position = row.cursor
                if text in f"{outline.title or ''}\n{outline.first_prompt or ''}".casefold():
                    found.append((row, outline))
        outlines = [outline if listing.metadata else None for _, outline in found]
        return await self._sessions([row for row, _ in found], outlines), position if more else None

    async def outlines(self, rows: list[SessionMapping]) -> list[Metadata]:
        """What can be told of these sessions without reading all of them. Raises KeyMissing, SealBroken."""
        stored = await self._tenancy.outlines(rows)
        return await self._history.outlines([row.sdk_session_id for row in rows]) if stored is None else stored
