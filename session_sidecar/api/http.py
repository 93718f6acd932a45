"""What every call has in common: how it is described, and how it is read before its handler has it."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast
from urllib.parse import quote, unquote

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope

from session_sidecar.api.access.admission import Access, Caller
from session_sidecar.api.models.bodies import Bodies, validated
from session_sidecar.api.models.texts import MAX_ID_CHARS
from session_sidecar.errors import InvalidRequest, SidecarError, UnsupportedMediaType
from session_sidecar.observe.metrics import Metrics
from session_sidecar.replicas.peers import Peers
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.sessions.changes import Changes
from session_sidecar.sessions.chats import Chats
from session_sidecar.sessions.reading import Reading
from session_sidecar.settings import Settings
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.turns import Turns

RESOURCE_HEADER = "X-Resource-Id"

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers call: made by the composition root, and there as long as the application runs."""

    settings: Settings
    access: Access
    turns: Turns
    reading: Reading
    changes: Changes
    chats: Chats
    bodies: Bodies
    metrics: Metrics
    tenancy: Tenancy
    peers: Peers | None  # None: there are no other replicas, or this one knows no secret of theirs
    feed: Feed


class Incoming(Generic[M]):
    """A call as its handler gets it: what is asked, already validated, and what answers it."""

    def __init__(self, request: Request, asked: M) -> None:
        self.request = request
        self.asked = asked

    @property
    def services(self) -> Services:
        """The application's."""
        return services(self.request)

    async def while_there(self, work: Awaitable[T]) -> T:
        """What `work` comes to, never None; it is left where it is when the caller goes away.

        Raises ClientDisconnect then.
        """
        done = await unless_gone(self.request.receive, work)
        if done is None:
            raise ClientDisconnect
        return done


class Nothing(BaseModel):
    """A call that takes no parameters. Whatever is appended is let pass, as probes do that."""


@dataclass(frozen=True)
class Call(Generic[M]):
    """One call: its method and path, what it asks, what it answers, and which problems it has of its own.

    `asks` is the body of POST, PUT and PATCH, the query of the others, with what the path names. `answers` gives the
    shape of each status.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    handler: Callable[[Incoming[M]], Awaitable[Response]]
    asks: type[M]
    answers: dict[int, Any]
    problems: tuple[type[SidecarError], ...] = ()
    of_header: bool = False  # whether `X-Resource-Id` says whose threads it is about
    admits: Literal["anybody", "token", "unrestricted", "metrics"] = "token"  # who may call, where tokens are asked for

    @property
    def has_body(self) -> bool:
        """Whether what is asked travels in the body."""
        return self.method in {"POST", "PUT", "PATCH"}

    @property
    def in_path(self) -> list[str]:
        """The names of what is asked in the path."""
        return re.findall(r"\{(\w+)\}", self.path)

    @property
    def route(self) -> Route:
        """The call, for the router. What is in its path may be anything, as it is encoded there."""
        route = _Encoded if self.in_path else Route
        return route(self.path.replace("}", ":path}"), self._serve, methods=[self.method])

    def is_at(self, path: str) -> bool:
        """Whether this is a path of the call."""
        return self.path == path or bool(self.in_path and self.route.path_regex.match(path))

    async def _serve(self, request: Request) -> Response:
        """The one place that knows who calls and what for, before anything is done."""
        caller = self._caller(request)
        asked = await _asked(request, self)
        asked = _own(caller, _of_header(request, caller, asked) if self.of_header else asked)
        names = ("thread_id", "resource_id")
        request.state.log.update({name: getattr(asked, name) for name in names if hasattr(asked, name)})
        if services(request).peers is not None:
            request.state.asked = asked  # it may have to be asked of another replica
        return await self.handler(Incoming(request, asked))

    def _caller(self, request: Request) -> Caller:
        """Who calls. Raises Unauthorized, UnrestrictedOnly, ReadOnlyToken."""
        if self.admits == "anybody":
            return Caller()
        caller = services(request).access.caller(request.headers)
        if caller.name is not None:
            request.state.log["token"] = caller.name
        if self.admits == "unrestricted":
            caller.check_unrestricted()
        elif self.admits == "metrics":
            caller.check_metrics()
        if self.method != "GET":
            caller.check_change()
        return caller


class _Encoded(Route):
    """A route that looks at the path as it was sent: a `%2F` in what it names does not part it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As Starlette has it."""
        raw = scope.get("raw_path")
        return super().matches({**scope, "path": raw.decode("latin-1") if raw else quote(scope["path"])})


class Json(JSONResponse):
    """JSON that can say whatever a transcript holds: half an emoji is no UTF-8, but can be escaped."""

    def render(self, content: Any) -> bytes:
        """The body, in ASCII."""
        return json.dumps(content, separators=(",", ":")).encode()


def services(request: Request) -> Services:
    """What the application is made of."""
    return cast("Services", request.app.state.services)


def _own(caller: Caller, asked: M) -> M:
    """What is asked, of the caller's own resources. Raises SessionNotFound, InvalidRequest."""
    if "resource_id" not in type(asked).model_fields:
        return asked
    named: str | None = getattr(asked, "resource_id", None)
    if named is None:
        return asked.model_copy(update={"resource_id": caller.the_resource()})
    caller.check_resource(named)
    return asked


def _of_header(request: Request, caller: Caller, asked: M) -> M:
    """What is asked, of the resource that the header names, or the caller's only one. Raises InvalidRequest."""
    names = request.headers.getlist(RESOURCE_HEADER)
    field: str | None = getattr(asked, "resource_id", None)
    if not names:
        if field is None and caller.is_unrestricted:
            raise _wrong_header("is needed, as the token does not say whose the chat is")
        return asked
    named = names[0]
    if names[1:] or field not in (None, named):  # one of them may be a browser's own, which a proxy has let pass
        raise _wrong_header("says something else than another one, or than the field `resource_id`")
    if not (named.isascii() and named.isprintable() and 1 <= len(named) <= MAX_ID_CHARS):
        raise _wrong_header(
            f"must be 1 to {MAX_ID_CHARS} printable ASCII characters; another one goes into the field `resource_id`"
        )
    return asked.model_copy(update={"resource_id": named})


def _wrong_header(message: str) -> InvalidRequest:
    return InvalidRequest("Nothing was started. See `errors`.", [{"field": RESOURCE_HEADER, "message": message}])


async def _asked(request: Request, call: Call[M]) -> M:
    if call.asks is Nothing:
        return call.asks()
    if call.has_body:
        return await _body(request, call.asks)
    return _query(request, call.asks, {name: unquote(request.path_params[name]) for name in call.in_path})


async def _body(request: Request, model: type[M]) -> M:
    """The JSON body as `model`. Raises the SidecarError that says what is wrong with it; nothing of it is kept then."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Send `Content-Type: application/json`.")
    return await services(request).bodies.read(request, model)


def _query(request: Request, model: type[M], path: Mapping[str, str]) -> M:
    """The query string, with what the path names, as `model`. Raises InvalidRequest."""
    items = request.query_params.multi_items()
    data = dict(items)
    if len(data) < len(items):
        names = {name for name, _ in items if request.query_params.getlist(name)[1:]}
        raise InvalidRequest("A parameter is there twice.", [{"field": n, "message": "given twice"} for n in names])
    return validated(model, {**data, **path})


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """What `work` comes to; it is broken off, and None, when the client goes away first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))
