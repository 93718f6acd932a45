"""Around every call: who is admitted, the request's ID and its line in the log, and errors as problems."""

import contextlib
import logging
import re
import sys
import time
import uuid
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from session_sidecar.api.access.admission import PROBES, Access
from session_sidecar.api.front.forwarding import Forwarded
from session_sidecar.api.http import services
from session_sidecar.api.routes import CALLS
from session_sidecar.errors import (
    BodyTooLarge,
    HeldElsewhere,
    MessageTooLarge,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    SidecarError,
    TooManyUploads,
    Unauthorized,
    public_error,
)
from session_sidecar.settings import SettingsError
from session_store import SessionMapError, StoreUnusable

logger = logging.getLogger(__name__)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What the caller has not sent yet is not waited for.
_CLOSING = (BodyTooLarge, MessageTooLarge, RequestTimeout, TooManyUploads)


def problem(request: Request, error: SidecarError) -> Response:
    """An error as RFC 9457 problem details; it is counted."""
    services(request).metrics.problem(error.code)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, _CLOSING):
        headers["Connection"] = "close"
    return JSONResponse(
        {**error.problem(), "request_id": request.state.request_id},
        error.status,
        headers,
        media_type="application/problem+json",
    )


async def on_sidecar_error(request: Request, error: Exception) -> Response:
    """The exception handler for what a caller can be told."""
    assert isinstance(error, SidecarError)  # noqa: S101 - registered for it
    return problem(request, error)


async def on_store_error(request: Request, error: Exception) -> Response:
    """The exception handler for a session map that fails; it has logged why itself."""
    return problem(request, public_error(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """The exception handler for what the router refuses."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    if error.status_code == 405:
        path = get_route_path(request.scope)  # without what it is mounted below
        methods = {call.method for call in CALLS if call.is_at(path)}
        allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set[str]())))
        response = problem(request, MethodNotAllowed(f"This path takes {allowed}."))
        response.headers["Allow"] = allowed
        return response
    return problem(request, NotFound("See the README's table of calls."))


async def on_client_gone(request: Request, error: Exception) -> Response:
    """The exception handler for a client that left: nobody reads this, but the log has nginx's status."""
    assert isinstance(error, ClientDisconnect)  # noqa: S101 - registered for it
    return Response(status_code=499)


async def on_any_error(request: Request, error: Exception) -> Response:
    """The exception handler for what nobody foresaw; the server's log has the traceback."""
    return problem(request, public_error(error))


async def on_held_elsewhere(request: Request, error: Exception) -> Response:
    """The exception handler for a thread that another replica has: it is asked, unless this was forwarded already."""
    assert isinstance(error, HeldElsewhere)  # noqa: S101 - registered for it
    of_here = services(request)
    if of_here.peers is None or error.url is None or of_here.access.is_replica(request.headers):
        return unreachable(request, error)
    return Forwarded(request, error, of_here.peers, of_here.tenancy, otherwise=unreachable)


def unreachable(request: Request, error: HeldElsewhere) -> Response:
    """What is answered where a thread is elsewhere, and that cannot be asked."""
    if error.live:
        return problem(request, error)
    # It was there last, and what has ended there is gone with it.
    return problem(request, error.instead) if error.instead is not None else Response(status_code=204)


HANDLERS = {
    HeldElsewhere: on_held_elsewhere,
    SidecarError: on_sidecar_error,
    SessionMapError: on_store_error,
    HTTPException: on_http_error,
    ClientDisconnect: on_client_gone,
    Exception: on_any_error,
}


class Front:
    """The outermost layer: a request ID on every response, a line in the log, and only callers that are admitted."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        fields: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        scope["state"]["log"] = fields

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                fields["status"] = message["status"]
            await send(message)

        came = time.monotonic()
        try:
            await self._admitted(scope)(scope, receive, send_with_id)
        finally:
            fields["ms"] = round((time.monotonic() - came) * 1000, 1)
            probe = scope["path"] in (*PROBES, "/metrics") and fields.get("status") == 200
            logger.log(logging.DEBUG if probe else logging.INFO, "request", extra={"fields": fields})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and stop the application; what the operator has to mend is told in one line, without a traceback."""
        told = (SettingsError, StoreUnusable)

        async def send_short(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and isinstance(error := sys.exception(), told):
                message["message"] = str(error)
            await send(message)

        with contextlib.suppress(*told):
            await self._app(scope, receive, send_short)

    def _admitted(self, scope: Scope) -> ASGIApp:
        try:
            self._access.admit(scope)
        except SidecarError as refusal:
            return problem(Request(scope), refusal)
        return self._app
