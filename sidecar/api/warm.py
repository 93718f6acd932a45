"""`/v1/session/warm`: a person has just opened a thread, so its process may start before the message comes."""

from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from session_store import SessionMap
from sidecar.api.http import body
from sidecar.api.schemas import WarmRequest
from sidecar.errors import SessionNotFound
from sidecar.turns import Turns


async def warm(request: Request) -> Response:
    """`POST /v1/session/warm`: start a known thread's process in the background. Asking again does no more."""
    asked = await body(request, WarmRequest)
    if await cast("SessionMap", request.state.sessions).get(asked.key) is None:
        raise SessionNotFound("There is no such thread of this resource; a new one needs no warming.")
    cast("Turns", request.state.turns).warm_up(asked.key, asked.agent)
    return JSONResponse({"object": "warm", "thread_id": asked.thread_id, "resource_id": asked.resource_id}, 202)
