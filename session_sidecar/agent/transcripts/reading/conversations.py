"""Conversations for who shows them as exchanges: pages that split none, and which exchanges there are."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.reading.exchanges import Exchange, Known, all_exchanges, last_exchanges
from session_sidecar.agent.transcripts.reading.history import MOST_PAGE_CHARS, Page
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import MessageNotFound, TranscriptMissing

ExchangeWriter = Callable[[Exchange], str]
"""How an exchange is to be given: a function of a module, as it may be called in another process."""


@dataclass(frozen=True, slots=True)
class AskedExchanges:
    """Which exchanges of a conversation: the last `limit`, or those before one, by its name.

    What lies beyond the first `size` bytes of the transcript is left out.
    """

    limit: int
    before: str | None = None
    size: int | None = None


class Conversations:
    """The transcripts below one CLI config directory, as exchanges."""

    def __init__(self, claude_config: Path, readers: Readers) -> None:
        self._projects = claude_config / "projects"
        self._transcripts = Transcripts(claude_config, readers)
        self._readers = readers

    async def page(self, session_id: str, asked: AskedExchanges, write: ExchangeWriter) -> Page:
        """A page of the conversation that splits no exchange, from its end; shorter where these are very large.

        What came before a compaction is part of it. Raises TranscriptMissing, SessionAmbiguous, and MessageNotFound
        where there is no exchange `before`.
        """
        await self._transcripts.check()
        page, path = await self._readers.short(self._last_page, session_id, asked, write)
        return page if page is not None else await self._readers.whole(_page, [path], asked, write)

    async def known(self, session_id: str, wanted: Iterable[str], *, size: int | None = None) -> list[Known]:
        """The exchanges of a conversation: the last ones that tell whether one is among them of the `wanted` names.

        All of them, where none is. Raises TranscriptMissing, SessionAmbiguous.
        """
        await self._transcripts.check()
        known, path = await self._readers.short(self._known_at_the_end, session_id, frozenset(wanted), size)
        return known if known is not None else await self._readers.whole(_all_known, [path], size)

    def _last_page(self, session_id: str, asked: AskedExchanges, write: ExchangeWriter) -> tuple[Page | None, Path]:
        """The last page, where the end of the file tells it; and the file."""
        path = self._file(session_id)
        if asked.before is None:
            found, complete = last_exchanges(path, asked.limit, size=asked.size)
            if complete or len(found) >= asked.limit:
                return _page_of(found, asked, write, more=not complete), path
        return None, path

    def _known_at_the_end(
        self, session_id: str, wanted: frozenset[str], size: int | None
    ) -> tuple[list[Known] | None, Path]:
        path = self._file(session_id)
        found, complete = last_exchanges(path, 1, size=size)
        known = _known(found)
        return known if complete or any(one.asked and one.name in wanted for one in known) else None, path

    def _file(self, session_id: str) -> Path:
        path = files.find(self._projects, session_id)
        if path is None:
            raise TranscriptMissing(_GONE)
        return path


def _page(files: Sequence[Path], asked: AskedExchanges, write: ExchangeWriter) -> Page:
    return _page_of(all_exchanges(files, asked.size), asked, write)


def _page_of(found: list[Exchange], asked: AskedExchanges, write: ExchangeWriter, *, more: bool = False) -> Page:
    """The last page of `found`, before which there are `more`, or the one before what was asked for."""
    if asked.before is not None:
        at = next((i for i, one in enumerate(found) if one.name == asked.before), None)
        if at is None:
            raise MessageNotFound("`before` must be taken from the `Link` header of the page after it.")
        found = found[:at]
    written: list[str] = []
    size = 0
    for one in reversed(found[-asked.limit :]):
        written.append(write(one))
        size += len(written[-1])
        if size > MOST_PAGE_CHARS:
            break
    first = found[len(found) - len(written)].name if written and (more or len(found) > len(written)) else None
    return Page(written[::-1], first)


def _all_known(files: Sequence[Path], size: int | None) -> list[Known]:
    return _known(all_exchanges(files, size))


def _known(found: Iterable[Exchange]) -> list[Known]:
    return [Known(one.name, one.end, asked=one.prompt is not None) for one in found]


_GONE = "Its transcript is not there, so neither are its messages."
