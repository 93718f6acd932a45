"""A stand-in for `POST /v1/messages`, over HTTP: what it says is in `reply`."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from session_sidecar.offline.reply import Block, Json, answer, count_tokens, whole


def message(body: Json, content: list[Json], stop_reason: str | None, output_tokens: int) -> Json:
    """A Messages API message. Its ID is unique, as the API's are: the CLI tells replies apart by it."""
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model", "offline"),
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "context_management": None,
        "diagnostics": None,
        "usage": usage(body, output_tokens),
    }


def usage(body: Json, output_tokens: int) -> Json:
    """What a reply has cost, with every field that the API's own has."""
    return {
        "input_tokens": count_tokens(body),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_1h_input_tokens": 0, "ephemeral_5m_input_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": None,
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
        "iterations": None,
        "speed": None,
        "fallback_credit": None,
    }


def frames(body: Json, blocks: Iterable[Block], stop_reason: str = "end_turn") -> Iterator[str]:
    """The server-sent events of one reply, in the API's order."""
    sent = 0
    yield _frame("message_start", message=message(body, [], None, 1))
    for index, (start, deltas) in enumerate(blocks):
        yield _frame("content_block_start", index=index, content_block=start)
        for delta in deltas:
            sent += 1
            yield _frame("content_block_delta", index=index, delta=delta)
        yield _frame("content_block_stop", index=index)
    ending = {"stop_reason": stop_reason, "stop_sequence": None, "stop_details": None, "container": None}
    yield _frame("message_delta", delta=ending, usage=usage(body, sent), context_management=None)
    yield _frame("message_stop")


def _frame(name: str, **data: object) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


async def _stream(events: Iterable[str], pause: float) -> AsyncIterator[str]:
    for event in events:
        if pause and event.startswith("event: content_block_delta"):
            await asyncio.sleep(pause)
        yield event


def error(status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the API's own shape."""
    request_id = f"req_{uuid.uuid4().hex}"
    body = {"type": "error", "error": {"type": kind, "message": detail}, "request_id": request_id}
    return JSONResponse(body, status, {"request-id": request_id, **(headers or {})})


def _refuse(_: Request, problem: Exception) -> Response:
    return error(400, "invalid_request_error", f"not a Messages API request: {problem!r}")


class OfflineModel:
    """The stand-in, listening on a free loopback port of this event loop for as long as the context lasts."""

    def __init__(self) -> None:
        self._port = 0
        routes = [
            Route("/", self._here, methods=["GET"]),
            Route("/v1/messages", self._messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
        ]
        # A client that left before its request was read is a problem too, but one that nobody will read about.
        handlers = dict.fromkeys((ClientDisconnect, ValueError, KeyError, TypeError), _refuse)
        app = Starlette(routes=routes, exception_handlers=handlers)
        # Not a whole uvicorn.Server: that takes the signal handlers, and sets the levels of loggers that it shares with
        # the sidecar's own server. Its HTTP protocol alone does neither, and needs no task.
        self._config = uvicorn.Config(app, ws="none", proxy_headers=False, log_config=None)
        self._state = ServerState()
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """What `ANTHROPIC_BASE_URL` has to be."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._config.load()
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hang_up()

    async def listen(self) -> None:
        """Take connections; after `hang_up`, on the same port again."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._protocol, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def hang_up(self) -> None:
        """Refuse connections, cut the open ones, and see every request's task to its end."""
        if self._listener:
            self._listener.close()
        for _ in range(2):  # the loop makes an accepted connection, and closes an aborted one, in its next round
            for connection in list(self._state.connections):
                connection.transport.abort()
            await asyncio.sleep(0)
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self._config.http_protocol_class
        protocol: asyncio.Protocol = make(config=self._config, server_state=self._state, app_state={})
        protocol.access_log = False  # type: ignore[attr-defined]
        return protocol

    async def _here(self, _: Request) -> Response:
        return Response()

    async def _count_tokens(self, request: Request) -> Response:
        return JSONResponse({"input_tokens": count_tokens(await request.json())})

    async def _messages(self, request: Request) -> Response:
        return await self.reply(request, await request.json())

    async def reply(self, request: Request, body: Json) -> Response:
        """Answer one request; tests make their faults here."""
        reply = answer(body)
        if body.get("stream"):
            events = frames(body, reply.blocks, reply.stop_reason)
            return StreamingResponse(_stream(events, reply.pause), media_type="text/event-stream")
        sent = sum(len(deltas) for _, deltas in reply.blocks)
        return JSONResponse(message(body, [whole(block) for block in reply.blocks], reply.stop_reason, sent))
