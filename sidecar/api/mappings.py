"""`DELETE` and `PUT` of `/v1/session` and `/v1/sessions`: mappings changed by hand."""

from typing import Annotated, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from sidecar.api.http import body, query
from sidecar.api.schemas import ID, Thread
from sidecar.api.sessions import Json, is_running, session_object
from sidecar.mappings import Mappings, is_canonical


def _canonical(value: str) -> str:
    if not is_canonical(value):
        raise ValueError("must be a UUID as the SDK writes it, in lower case")
    return value


class Adoption(Thread):
    """The body of `PUT /v1/session`."""

    sdk_session_id: Annotated[str, AfterValidator(_canonical)]


class _Deletion(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    transcript: Literal["keep", "delete"] = "keep"
    force: bool = False


class DeleteQuery(Thread, _Deletion):
    """The query of `DELETE /v1/session`."""


class EraseQuery(_Deletion):
    """The query of `DELETE /v1/sessions`."""

    resource_id: ID


async def delete_session(request: Request) -> Response:
    """`DELETE /v1/session`: forget a mapping. Deleting what is not there is no error.

    The transcript stays unless `transcript=delete`. While turns run on the thread or wait for it: 409 `thread_busy`;
    with `force=true` they are stopped, and end with `thread_deleted`.
    """
    asked = query(request, DeleteQuery)
    await _mappings(request).forget(asked.key, transcript=asked.transcript == "delete", force=asked.force)
    return Response(status_code=204)


async def erase_resource(request: Request) -> Response:
    """`DELETE /v1/sessions`: forget all mappings of a resource, with the options that `DELETE /v1/session` has.

    For a person who asks to be forgotten: `transcript=delete&force=true`. 200 means that none is left; 409 that a turn
    was on one of the threads: what it came to before that is gone, and asking again goes on with the rest. Where the
    transcripts are kept, nothing tells any more whose they were.
    """
    asked = query(request, EraseQuery)
    erase_transcripts = asked.transcript == "delete"
    count = await _mappings(request).forget_all(asked.resource_id, transcripts=erase_transcripts, force=asked.force)
    return Json({"object": "deleted", "resource_id": asked.resource_id, "count": count})


async def adopt_session(request: Request) -> Response:
    """`PUT /v1/session`: map a thread to a session that exists: of a person's own use of the CLI, of an older backend.

    201 with the session object, 200 if the thread has this very session. Whoever may call this may read any transcript
    below the sidecar's config directory: it is for operators. Where nobody's tokens are checked, everybody who
    reaches the loopback address is one.
    """
    asked = await body(request, Adoption)
    mapping, is_new = await _mappings(request).adopt(asked.key, asked.sdk_session_id)
    return Json(session_object(mapping, running=is_running(request, mapping)), 201 if is_new else 200)


def _mappings(request: Request) -> Mappings:
    return cast("Mappings", request.state.mappings)
