"""`/v1/session` and `/v1/sessions`: the mappings themselves."""

from datetime import datetime
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from session_store import SessionMap, SessionMapping
from sidecar.api.http import query
from sidecar.api.schemas import ListQuery, Thread, encode
from sidecar.errors import SessionNotFound
from sidecar.turns import Turns


async def list_sessions(request: Request) -> Response:
    """`GET /v1/sessions`: one page of a resource's mappings, newest first."""
    asked = query(request, ListQuery)
    # One more than asked for tells whether there is a next page.
    rows = await _sessions(request).page(
        asked.resource_id,
        limit=asked.limit + 1,
        after=asked.after,
        descending=asked.order == "desc",
        thread_id_prefix=asked.thread_id_prefix,
        parent_thread_id=asked.parent_thread_id,
    )
    page, more = rows[: asked.limit], len(rows) > asked.limit
    return JSONResponse(
        {
            "object": "list",
            "data": [session_object(row, running=_running(request, row)) for row in page],
            "has_more": more,
            "next": encode(page[-1].cursor) if more else None,
        }
    )


async def get_session(request: Request) -> Response:
    """`GET /v1/session`: one mapping."""
    asked = query(request, Thread)
    mapping = await _sessions(request).get(asked.key)
    if mapping is None:
        raise SessionNotFound("There is no such thread of this resource.")
    return JSONResponse(session_object(mapping, running=_running(request, mapping)))


async def delete_session(request: Request) -> Response:
    """`DELETE /v1/session`: forget a mapping. The transcript stays. Deleting what is not there is no error."""
    asked = query(request, Thread)
    async with cast("Turns", request.state.turns).hold(asked.key):
        await _sessions(request).remove(asked.key)
    return Response(status_code=204)


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
        "created_at": _rfc3339(mapping.created_at),
        "updated_at": _rfc3339(mapping.updated_at),
    }


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _running(request: Request, mapping: SessionMapping) -> bool:
    return cast("Turns", request.state.turns).running(mapping.key) is not None


def _sessions(request: Request) -> SessionMap:
    return cast("SessionMap", request.state.sessions)
