"""`/v1/session` and `/v1/sessions`: the mappings, what is known of their sessions, and what is changed by hand."""

import json

from starlette.responses import Response

from session_sidecar.api.http import Incoming, Json
from session_sidecar.api.models import answers
from session_sidecar.api.models.answers import branch_object, session_object, written
from session_sidecar.api.models.requests import (
    Adoption,
    DeleteQuery,
    EraseQuery,
    ListQuery,
    MessagesQuery,
    SessionPatch,
    SessionQuery,
    Thread,
    WarmRequest,
    encode,
)
from session_sidecar.sessions.reading import Asked


async def list_sessions(call: Incoming[ListQuery]) -> Response:
    """`GET /v1/sessions`: one page of a resource's mappings, newest first; of all resources' where none is named.

    A search may give less than a page, or nothing, while `has_more` says that there are more to look through.
    """
    found, position = await call.while_there(call.services.reading.page(call.asked.listing))
    after = encode(position) if position else None
    page: answers.SessionList = {
        "object": "list",
        "data": [session_object(session) for session in found],
        "has_more": after is not None,
        "next": after,
    }
    return Json(page)


async def get_session(call: Incoming[SessionQuery]) -> Response:
    """`GET /v1/session`: one mapping, with what the SDK's transcript tells of it unless `metadata=false`."""
    asked = call.asked
    looking = call.services.reading.session(asked.key, metadata=asked.metadata)
    return Json(session_object(await call.while_there(looking) if asked.metadata else await looking))


async def update_session(call: Incoming[SessionPatch]) -> Response:
    """`PATCH /v1/session`: set title or tag. They are the SDK's to keep; no process may have the session meanwhile."""
    return Json(session_object(await call.services.changes.describe(call.asked.key, call.asked.changes)))


async def delete_session(call: Incoming[DeleteQuery]) -> Response:
    """`DELETE /v1/session`: forget a mapping. Deleting what is not there is no error.

    The transcript stays unless `transcript=delete`. While turns run on the thread or wait for it: 409 `thread_busy`;
    with `force=true` they are stopped, and end with `thread_deleted`.
    """
    asked = call.asked
    await call.services.changes.forget(asked.key, transcript=asked.transcript == "delete", force=asked.force)
    return Response(status_code=204)


async def erase_resource(call: Incoming[EraseQuery]) -> Response:
    """`DELETE /v1/sessions`: forget all mappings of a resource, with the options that `DELETE /v1/session` has.

    For a person who asks to be forgotten: `transcript=delete&force=true`. 200 means that none is left; 409 that a turn
    was on one of the threads: what it came to before that is gone, and asking again goes on with the rest. Where the
    transcripts are kept, nothing tells any more whose they were.
    """
    asked = call.asked
    erase_transcripts = asked.transcript == "delete"
    count = await call.services.changes.forget_all(asked.resource_id, transcripts=erase_transcripts, force=asked.force)
    deleted: answers.Deleted = {"object": "deleted", "resource_id": asked.resource_id, "count": count}
    return Json(deleted)


async def adopt_session(call: Incoming[Adoption]) -> Response:
    """`PUT /v1/session`: map a thread to a session that exists: of a person's own use of the CLI, of an older backend.

    201 with the session object, 200 if the thread has this very session. Whoever may call this may read any transcript
    below the sidecar's config directory: it is for operators. Where nobody's tokens are checked, everybody who
    reaches the loopback address is one.
    """
    session, is_new = await call.services.changes.adopt(call.asked.key, call.asked.sdk_session_id)
    return Json(session_object(session), 201 if is_new else 200)


async def list_messages(call: Incoming[MessagesQuery]) -> Response:
    """`GET /v1/session/messages`: one page of the conversation, always oldest first within the page.

    `order=asc` begins with the first page, `order=desc` with the last: its `next` leads to the page before it. A page
    ends early where its messages are very large.
    """
    asked = call.asked
    wanted = Asked(asked.limit, asked.after, asked.order == "desc", compacted=asked.include is not None)
    page = await call.while_there(call.services.reading.messages(asked.key, wanted, written))
    # An `answers.MessageList` whose messages are written already.
    more, after = json.dumps(page.next is not None), json.dumps(page.next)
    body = f'{{"object":"list","data":[{",".join(page.written)}],"has_more":{more},"next":{after}}}'
    return Response(body.encode(), media_type="application/json")


async def show_branches(call: Incoming[Thread]) -> Response:
    """`GET /v1/session/branches`: the whole family of forks that a thread belongs to, as a tree.

    A deleted ancestor is a node with `status: "deleted"`. `truncated` tells that the family has more threads than are
    shown.
    """
    root, truncated = await call.while_there(call.services.reading.family(call.asked.key))
    branches: answers.Branches = {
        "object": "branches",
        "thread_id": call.asked.thread_id,
        "root": branch_object(root),
        "truncated": truncated,
    }
    return Json(branches)


async def warm_session(call: Incoming[WarmRequest]) -> Response:
    """`POST /v1/session/warm`: start a known thread's process in the background: a person has just opened it.

    Asking again does no more.
    """
    asked = call.asked
    await call.services.reading.mapping(asked.key)
    call.services.turns.warm_up(asked.key, asked.agent)
    taken: answers.Warming = {"object": "warm", "thread_id": asked.thread_id, "resource_id": asked.resource_id}
    return Json(taken, 202)
