"""Requests in, problems out: what every call has in common."""

import contextlib
import logging
import re
import sys
import time
import uuid
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from session_store import StoreUnusable
from sidecar.api.bodies import Bodies, validated
from sidecar.errors import (
    BodyTooLarge,
    ForbiddenHost,
    ForbiddenOrigin,
    InvalidRequest,
    MessageTooLarge,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    SidecarError,
    TooManyUploads,
    UnsupportedMediaType,
)
from sidecar.settings import SettingsError
from sidecar.told import told

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = ("/healthz", "/readyz")
# What the caller has not sent yet is not waited for.
_CLOSING = (BodyTooLarge, MessageTooLarge, RequestTimeout, TooManyUploads)


async def body(request: Request, model: type[M]) -> M:
    """The JSON body as `model`. Raises the SidecarError that says what is wrong with it; nothing of it is kept then."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Send `Content-Type: application/json`.")
    return _noted(request, await cast("Bodies", request.state.bodies).read(request, model))


def query(request: Request, model: type[M]) -> M:
    """The query string as `model`. Raises InvalidRequest."""
    items = request.query_params.multi_items()
    data = dict(items)
    if len(data) < len(items):
        names = {name for name, _ in items if request.query_params.getlist(name)[1:]}
        raise InvalidRequest("A parameter is there twice.", [{"field": n, "message": "given twice"} for n in names])
    return _noted(request, validated(model, data))


def _noted(request: Request, asked: M) -> M:
    """Put the thread that a call is about into its log line."""
    names = ("thread_id", "resource_id")
    request.state.log.update({name: getattr(asked, name) for name in names if hasattr(asked, name)})
    return asked


def problem(request: Request, error: SidecarError) -> Response:
    """An error as RFC 9457 problem details."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
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
    return problem(request, told(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """The exception handler for what the router refuses."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    if error.status_code == 405:
        path = request.url.path
        methods = {m for route in request.app.routes if route.path == path for m in route.methods}
        allowed = ", ".join(sorted(methods))
        response = problem(request, MethodNotAllowed(f"This path takes {allowed}."))
        response.headers["Allow"] = allowed
        return response
    return problem(request, NotFound("See the README's table of calls."))


async def on_client_gone(request: Request, error: Exception) -> Response:
    """The exception handler for a client that left in mid-upload: nobody reads this, but the log has nginx's status."""
    assert isinstance(error, ClientDisconnect)  # noqa: S101 - registered for it
    return Response(status_code=499)


async def on_any_error(request: Request, error: Exception) -> Response:
    """The exception handler for what nobody foresaw; the server's log has the traceback."""
    return problem(request, told(error))


class Front:
    """The outermost layer: a request ID on every response, and only the hosts and origins that are ours.

    A page in a person's browser can send requests to a server on the same machine: under a name of its own that
    resolves to 127.0.0.1, or from its own origin. Neither is a caller of ours.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str]) -> None:
        """`hosts`: the names under which the sidecar answers, without ports."""
        self._app = app
        self._hosts = hosts

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

        refusal = self._refusal(headers)
        app: ASGIApp | Response = problem(Request(scope), refusal) if refusal else self._app
        came = time.monotonic()
        try:
            await app(scope, receive, send_with_id)
        finally:
            fields["ms"] = round((time.monotonic() - came) * 1000, 1)
            probe = scope["path"] in _PROBES and fields.get("status") == 200
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

    def _refusal(self, headers: Headers) -> SidecarError | None:
        host = _hostname("//" + headers.get("host", ""))
        if host not in self._hosts:
            return ForbiddenHost("The Host header must name the address that this server listens on.")
        origin = headers.get("origin")
        if origin is not None and _hostname(origin) not in self._hosts:
            return ForbiddenOrigin("Browsers may call only from this server's own origin. Proxy through your backend.")
        return None


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
