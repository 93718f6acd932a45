"""`/v1/session` and `/v1/sessions`: the mappings, and what is known of their sessions."""

import dataclasses
import itertools
import json
from datetime import datetime
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from session_store import Cursor, SessionMap, SessionMapping, ThreadKey
from sidecar.agent.history import History, Metadata
from sidecar.api.http import body, query
from sidecar.api.readers import for_a_reader
from sidecar.api.schemas import ListQuery, SessionPatch, SessionQuery, encode
from sidecar.errors import InvalidRequest, SessionNotFound
from sidecar.reading import Readers
from sidecar.settings import Settings
from sidecar.turns import Turns

MOST_SEARCHED = 1000


class Json(JSONResponse):
    """JSON that can say whatever a transcript holds: half an emoji is no UTF-8, but can be escaped."""

    def render(self, content: Any) -> bytes:
        """The body, in ASCII."""
        return json.dumps(content, separators=(",", ":")).encode()


@for_a_reader
async def list_sessions(request: Request) -> Response:
    """`GET /v1/sessions`: one page of a resource's mappings, newest first; of all resources' where none is named.

    With `q`, those whose title or first prompt holds it. These are read from the heads and tails of the transcripts, of
    up to `MOST_SEARCHED` sessions a call: a page may then hold less than asked for, or nothing, while `has_more` says
    that there are more to look through.
    """
    asked = query(request, ListQuery)
    found: list[tuple[SessionMapping, Metadata | None]]
    if asked.q is not None:
        found, position = await _search(request, asked, asked.q.casefold())
    else:
        rows, more = await _rows(request, asked, asked.after, asked.limit)
        outlines = await _outlines(request, rows) if asked.include else []
        found = list(itertools.zip_longest(rows, outlines))
        position = rows[-1].cursor if more else None
    data = []
    for row, outline in found:
        session = session_object(row, running=is_running(request, row))
        if asked.include and outline is not None:
            session["metadata"] = dataclasses.asdict(outline)
        data.append(session)
    after = encode(position) if position else None
    return Json({"object": "list", "data": data, "has_more": after is not None, "next": after})


@for_a_reader
async def get_session(request: Request) -> Response:
    """`GET /v1/session`: one mapping, with what the SDK's transcript tells of it unless `metadata=false`."""
    asked = query(request, SessionQuery)
    mapping = await mapped(request, asked.key)
    session = session_object(mapping, running=is_running(request, mapping))
    if asked.metadata:
        session["metadata"] = dataclasses.asdict(await history(request).metadata(mapping.sdk_session_id))
    return Json(session)


async def update_session(request: Request) -> Response:
    """`PATCH /v1/session`: set title or tag. They are the SDK's to keep; no process may have the session meanwhile."""
    asked = await body(request, SessionPatch)
    async with cast("Turns", request.state.turns).hold(asked.key):
        mapping = await mapped(request, asked.key)
        try:
            await history(request).describe(mapping.sdk_session_id, asked.changes)
        except ValueError as error:
            raise InvalidRequest("Nothing was changed.", [{"field": "tag", "message": str(error)}]) from None
        (outline,) = await _outlines(request, [mapping])
    return Json(session_object(mapping, running=False) | {"metadata": dataclasses.asdict(outline)})


def session_object(mapping: SessionMapping, *, running: bool) -> dict[str, Any]:
    """A mapping as callers see it."""
    return {
        "object": "session",
        "thread_id": mapping.thread_id,
        "resource_id": mapping.resource_id,
        "sdk_session_id": mapping.sdk_session_id,
        "parent_thread_id": mapping.parent_thread_id,
        "parent_message_id": mapping.parent_message_id,
        "status": "running" if running else "idle",
        "created_at": rfc3339(mapping.created_at),
        "updated_at": rfc3339(mapping.updated_at),
    }


def rfc3339(moment: datetime) -> str:
    """A time as callers see it."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def is_running(request: Request, mapping: SessionMapping) -> bool:
    """Whether a turn runs on the thread."""
    return cast("Turns", request.state.turns).threads.running(mapping.key) is not None


async def mapped(request: Request, key: ThreadKey) -> SessionMapping:
    """The mapping of a thread. Raises SessionNotFound."""
    mapping = await _sessions(request).get(key)
    if mapping is None:
        raise SessionNotFound("There is no such thread of this resource.")
    return mapping


def history(request: Request) -> History:
    """The transcripts, for reading."""
    return History(cast("Settings", request.state.settings).claude_config, cast("Readers", request.state.readers))


async def _rows(
    request: Request, asked: ListQuery, after: Cursor | None, limit: int
) -> tuple[list[SessionMapping], bool]:
    """Some rows of the list, and whether there are more."""
    # One more than asked for tells whether there is a next page.
    rows = await _sessions(request).page(
        asked.resource_id,
        limit=limit + 1,
        after=after,
        descending=asked.order == "desc",
        thread_id_prefix=asked.thread_id_prefix,
        parent_thread_id=asked.parent_thread_id,
    )
    return rows[:limit], len(rows) > limit


async def _search(
    request: Request, asked: ListQuery, text: str
) -> tuple[list[tuple[SessionMapping, Metadata | None]], Cursor | None]:
    """The rows that match, and where to go on, if there is anything left to look through."""
    found: list[tuple[SessionMapping, Metadata | None]] = []
    position, more, left = asked.after, True, MOST_SEARCHED
    while more and left and len(found) < asked.limit:
        rows, more = await _rows(request, asked, position, min(left, 100))
        left -= len(rows)
        for row, outline in zip(rows, await _outlines(request, rows), strict=True):
            if len(found) == asked.limit:
                return found, position
            position = row.cursor
            if text in f"{outline.title or ''}\n{outline.first_prompt or ''}".casefold():
                found.append((row, outline))
    return found, position if more else None


async def _outlines(request: Request, rows: list[SessionMapping]) -> list[Metadata]:
    return await history(request).outlines([row.sdk_session_id for row in rows])


def _sessions(request: Request) -> SessionMap:
    return cast("SessionMap", request.state.sessions)
