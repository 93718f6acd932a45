"""`/v1/chat`: run a turn, rejoin it, stop it, branch a thread."""

import asyncio
import contextlib
from dataclasses import replace
from typing import cast

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from session_store import SessionMap
from sidecar.api.http import body, query
from sidecar.api.schemas import MAX_ID_CHARS, ChatRequest, ForkRequest, RejoinQuery, Thread
from sidecar.api.sessions import session_object
from sidecar.errors import InvalidRequest, SessionNotFound
from sidecar.events import CHUNK_BYTES
from sidecar.settings import Settings
from sidecar.turn import Turn, TurnRequest
from sidecar.turns import Turns


async def chat(request: Request) -> Response:
    """`POST /v1/chat`: run one turn; it resumes the thread's session, or starts one."""
    asked = await body(request, ChatRequest)
    return TurnResponse(request, _begin(request, asked.turn()))


async def rejoin(request: Request) -> Response:
    """`GET /v1/chat`: the stream of the running or just ended turn, from after `Last-Event-ID`."""
    asked = query(request, RejoinQuery)
    turns = _turns(request)
    running = turns.threads.running(asked.key)
    # What the agent says by itself before it comes to the message is said first.
    there = (running and running.before, running, running or turns.replay.latest(asked.key))
    turn = next((turn for turn in there if turn is not None and asked.turn_id in (None, turn.id)), None)
    if turn is None:
        return Response(status_code=204)
    return TurnResponse(request, turn, after=_last_event_id(request))


async def interrupt(request: Request) -> Response:
    """`POST /v1/chat/interrupt`: stop the running turn and wait until it has ended."""
    asked = await body(request, Thread)
    turn = _turns(request).threads.running(asked.key)
    if turn is None:
        if await cast("SessionMap", request.state.sessions).get(asked.key) is None:
            raise SessionNotFound("There is no such thread of this resource, so nothing to interrupt.")
        return JSONResponse({"object": "interrupt", "turn_id": None, "status": "idle"})
    turn.stop()
    await turn.ended.wait()
    return JSONResponse({"object": "interrupt", "turn_id": turn.id, "status": turn.status})


async def fork(request: Request) -> Response:
    """`POST /v1/chat/fork`: branch a thread, and run the branch's first turn if there is a message."""
    asked = await body(request, ForkRequest)
    turn = asked.turn()
    if turn is None:
        mapping = await _turns(request).fork(asked.parent, asked.key, asked.at_message_id)
        return JSONResponse(session_object(mapping, running=False), 201)
    return TurnResponse(request, _begin(request, turn))


def _begin(request: Request, turn: TurnRequest) -> Turn:
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= MAX_ID_CHARS and key.isascii() and key.isprintable()):
        message = f"must be 1 to {MAX_ID_CHARS} printable ASCII characters"
        raise InvalidRequest("Nothing was started. See `errors`.", [{"field": "Idempotency-Key", "message": message}])
    return _turns(request).begin(replace(turn, idempotency_key=key, request_id=request.state.request_id))


class TurnResponse(Response):
    """A turn as its reader sees it: a real HTTP status until the session is known, then the stream or one answer.

    The turn belongs to `Turns`; this only reads it. Each reader is counted, for `on_disconnect: cancel`.
    """

    def __init__(self, request: Request, turn: Turn, *, after: int = 0) -> None:
        """Read `turn` from the event after the ID `after`."""
        self._turn = turn
        self._after = after
        self._settings = cast("Settings", request.state.settings)
        self._as_json = wants_json(request.headers.get("accept", ""))
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one reader until the turn has ended or the reader has gone."""
        turn = self._turn
        with turn.reader():
            ready = turn.ended if self._as_json else turn.began
            if not await _unless_gone(receive, ready):
                return
            await turn.wait_until_begun()
            if self._as_json:
                await _answer(turn)(scope, receive, send)
                return
            turn.log.check(self._after)
            with contextlib.suppress(TimeoutError):  # a reader that takes nothing is dropped; it may rejoin
                await self._stream()(scope, receive, _in_pieces(send, self._settings.send_seconds))

    def _stream(self) -> EventSourceResponse:
        return EventSourceResponse(
            self._turn.log.chunks(self._after),
            sep="\n",
            headers={"Cache-Control": "no-store, no-transform"},
            ping=self._settings.ping_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            shutdown_grace_period=self._settings.shutdown_seconds,
        )


def _answer(turn: Turn) -> Response:
    """The whole turn as one JSON object. Raises the SidecarError of a turn that failed: no 200 with bad news in it."""
    if turn.status == "failed" and turn.error is not None:
        raise turn.error.again()
    result = turn.log.newest("result")
    text = (result or {}).get("result") or turn.text
    session = {name: value for name, value in (turn.session or {}).items() if name != "type"}
    return JSONResponse({"session": session, "status": turn.status, "text": text, "result": result})


def _in_pieces(send: Send, seconds: float) -> Send:
    """`send`, with a large event cut up: what the server holds for a slow reader is a piece of it, not all.

    Raises TimeoutError where a piece is not taken within so many seconds.
    """
    one = asyncio.Lock()  # or a ping would go out in the middle of an event

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        last = max(len(body) - 1, 0) // CHUNK_BYTES * CHUNK_BYTES
        async with one:
            for start in range(0, last, CHUNK_BYTES):
                async with asyncio.timeout(seconds):
                    await send({**message, "body": body[start : start + CHUNK_BYTES], "more_body": True})
            async with asyncio.timeout(seconds):
                await send({**message, "body": body[last:]} if last else message)

    return send_pieces


async def _unless_gone(receive: Receive, ready: asyncio.Event) -> bool:
    """Wait for `ready`; False if the client goes away first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting = [asyncio.ensure_future(ready.wait()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return ready.is_set()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


def wants_json(accept: str) -> bool:
    """Whether an Accept header asks for one JSON answer; anything else gets the stream."""
    ranges = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "application/json" in ranges and "text/event-stream" not in ranges


def _last_event_id(request: Request) -> int:
    text = request.headers.get("last-event-id", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequest("See `errors`.", [{"field": "Last-Event-ID", "message": "must be the id of an event"}])
    return int(text)


def _turns(request: Request) -> Turns:
    return cast("Turns", request.state.turns)
