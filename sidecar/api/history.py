"""`/v1/session/messages` and `/v1/session/branches`: what was said on a thread, and on those that it shares it with."""

import dataclasses
import json
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from session_store import SessionMap
from sidecar.agent.chain import Message
from sidecar.agent.history import Asked, Page
from sidecar.api.http import query
from sidecar.api.readers import for_a_reader
from sidecar.api.schemas import MessagesQuery, Thread
from sidecar.api.sessions import Json, history, is_running, mapped, rfc3339
from sidecar.branches import Branch, family
from sidecar.errors import SessionMissing


@for_a_reader
async def list_messages(request: Request) -> Response:
    """`GET /v1/session/messages`: one page of the conversation, always oldest first within the page.

    `order=asc` begins with the first page, `order=desc` with the last: its `next` leads to the page before it. A page
    ends early where its messages are very large.
    """
    asked = query(request, MessagesQuery)
    mapping = await mapped(request, asked.key)
    wanted = Asked(asked.limit, asked.after, asked.order == "desc", compacted=asked.include is not None)
    try:
        page = await history(request).messages(mapping.sdk_session_id, wanted, written)
    except SessionMissing:
        if not is_running(request, mapping):
            raise
        page = Page([], None)  # its first turn has only just begun
    end = json.dumps({"has_more": page.next is not None, "next": page.next})
    body = f'{{"object":"list","data":[{",".join(page.written)}],{end[1:]}'
    return Response(body.encode(), media_type="application/json")


@for_a_reader
async def show_branches(request: Request) -> Response:
    """`GET /v1/session/branches`: the whole family of forks that a thread belongs to, as a tree.

    A deleted ancestor is a node with `status: "deleted"`. `truncated` tells that the family has more threads than are
    shown.
    """
    asked = query(request, Thread)
    mapping = await mapped(request, asked.key)
    root, truncated = await family(cast("SessionMap", request.state.sessions), mapping)
    nodes = await _nodes(request, root)
    return Json({"object": "branches", "thread_id": asked.thread_id, "root": nodes, "truncated": truncated})


def written(message: Message) -> str:
    """A message as callers see it, by itself: one long page would be one long stop for everybody else."""
    return json.dumps(
        {
            "uuid": message.uuid,
            "type": message.type,
            "message": message.message,
            "timestamp": message.timestamp,
            "parent_uuid": message.parent_uuid,
            "synthetic": message.synthetic,
        },
        separators=(",", ":"),
    )


async def _nodes(request: Request, root: Branch) -> dict[str, Any]:
    """The tree with what the transcripts tell of each thread."""
    mappings = [branch.mapping for branch in root if branch.mapping is not None]
    outlines = await history(request).outlines([mapping.sdk_session_id for mapping in mappings])
    titles = {mapping.thread_id: outline.title for mapping, outline in zip(mappings, outlines, strict=True)}

    async def node(branch: Branch, parent: Branch | None) -> dict[str, Any]:
        mapping = branch.mapping
        status = "deleted" if mapping is None else "running" if is_running(request, mapping) else "idle"
        return {
            "thread_id": branch.thread_id,
            "sdk_session_id": mapping and mapping.sdk_session_id,
            "title": titles[branch.thread_id] if mapping else None,
            "status": status,
            "parent_message_id": mapping and mapping.parent_message_id,
            "branch_point": await _branch_point(request, branch, parent),
            "last_activity": mapping and rfc3339(mapping.updated_at),
            "children": [await node(child, branch) for child in branch.children],
        }

    return await node(root, None)


async def _branch_point(request: Request, branch: Branch, parent: Branch | None) -> dict[str, Any] | None:
    """The message that a thread was forked after: its own transcript has it too, should the parent be gone."""
    if branch.mapping is None or branch.mapping.parent_message_id is None:
        return None
    for mapping in (branch.mapping, parent.mapping if parent else None):
        if mapping is not None:
            found = await history(request).find(mapping.sdk_session_id, branch.mapping.parent_message_id)
            if found is not None:
                return dataclasses.asdict(found)
    return None
