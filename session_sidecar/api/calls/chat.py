"""`/v1/chat`: run a turn, rejoin it, stop it, branch a thread."""

from dataclasses import replace
from typing import Any, Literal, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from session_sidecar.api.http import Incoming, Json, unless_gone
from session_sidecar.api.models import answers
from session_sidecar.api.models.answers import session_object
from session_sidecar.api.models.events import TurnSession
from session_sidecar.api.models.requests import ChatRequest, ForkRequest, Thread
from session_sidecar.api.models.texts import MAX_ID_CHARS
from session_sidecar.api.streams.frames import NATIVE, Dialect, Position
from session_sidecar.api.streams.stream import Stream, last_event_id
from session_sidecar.errors import InvalidRequest
from session_sidecar.observe.tracing import as_the_caller_says
from session_sidecar.sessions.reading import Session
from session_sidecar.turns.turn import Turn, TurnRequest


async def chat(call: Incoming[ChatRequest]) -> Response:
    """`POST /v1/chat`: run one turn; it resumes the thread's session, or starts one.

    With `Last-Event-ID` it is a reader who comes back: the turn that the ID names is joined, and none is started.
    """
    return await _begin(call, call.asked.turn())


async def rejoin(call: Incoming[Thread]) -> Response:
    """`GET /v1/chat`: the stream of the running or just ended turn, or the rest of the one that `Last-Event-ID` names.

    204 where there is none, and where nothing is left of it.
    """
    at = last_event_id(call.request)
    turn = await call.services.turns.rejoin(call.asked.key, at.turn_id if at else None)
    return Response(status_code=204) if turn is None else _from(call, turn, at)


async def interrupt(call: Incoming[Thread]) -> Response:
    """`POST /v1/chat/interrupt`: stop the running turn and wait until it has ended."""
    turn = await call.services.turns.interrupt(call.asked.key)
    answer: answers.Interrupted = {
        "object": "interrupt",
        "turn_id": turn.id if turn else None,
        "status": turn.status if turn else "idle",
    }
    return Json(answer)


async def fork(call: Incoming[ForkRequest]) -> Response:
    """`POST /v1/chat/fork`: branch a thread, and run the branch's first turn if there is a message."""
    asked = call.asked
    turn = asked.turn()
    if turn is None:
        mapping = await call.services.turns.fork(asked.parent, asked.key, asked.at_message_id)
        return Json(session_object(Session(mapping, running=False)), 201)
    return await _begin(call, turn)


async def _begin(call: Incoming[Any], turn: TurnRequest) -> Response:
    request = begun_by(call.request, turn)
    at = last_event_id(call.request)
    if at is not None:
        return _from(call, await call.services.turns.again(request, at.turn_id), at)
    with as_the_caller_says(call.request.headers):
        return _from(call, call.services.turns.begin(request), None)


def begun_by(request: Request, turn: TurnRequest) -> TurnRequest:
    """What is asked for, with what the request's headers say of it. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= MAX_ID_CHARS and key.isascii() and key.isprintable()):
        message = f"must be 1 to {MAX_ID_CHARS} printable ASCII characters"
        raise InvalidRequest("Nothing was started. See `errors`.", [{"field": "Idempotency-Key", "message": message}])
    return replace(turn, idempotency_key=key, request_id=request.state.request_id)


def _from(call: Incoming[Any], turn: Turn, at: Position | None) -> Response:
    """A turn from where a reader has come to. 204 after its end: a reader who was told of it stops asking at that."""
    if at is not None and turn.ended.is_set() and at.number >= turn.log.last_id:
        return Response(status_code=204)
    return TurnResponse(call, turn, after=at.number if at else 0)


class TurnResponse(Response):
    """A turn as its reader sees it: a real HTTP status until the session is known, then the stream or one answer.

    The turn belongs to `Turns`; this only reads it. Each reader is counted, for `on_disconnect: cancel`.
    """

    def __init__(self, call: Incoming[Any], turn: Turn, dialect: Dialect = NATIVE, *, after: int = 0) -> None:
        """Read `turn` from the event after the ID `after`."""
        self._turn = turn
        self._dialect = dialect
        self._after = after
        self._settings = call.services.settings
        self._as_json = dialect.has_answers and wants_json(call.request.headers.get("accept", ""))
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one reader until the turn has ended or the reader has gone."""
        turn = self._turn
        with turn.reader():
            ready = turn.ended if self._as_json else turn.began
            if not await unless_gone(receive, ready.wait()):
                return
            await turn.wait_until_begun()
            if self._as_json:
                await _answer(turn)(scope, receive, send)
                return
            turn.log.check(self._after)
            frames = self._dialect.frames(turn.log, self._after, turn.id)
            await Stream(frames, self._settings, self._dialect.headers).serve(scope, receive, send)


def _answer(turn: Turn) -> Response:
    """The whole turn as one JSON object. Raises the SidecarError of a turn that failed: no 200 with bad news in it."""
    if turn.status == "failed" and turn.error is not None:
        raise turn.error.again()
    result = turn.log.newest("result")
    text = (result or {}).get("result") or turn.text
    told = {name: value for name, value in (turn.session or {}).items() if name != "type"}
    session = cast("TurnSession", told)
    status: Literal["completed", "interrupted"] = "completed" if turn.status == "completed" else "interrupted"
    answer: answers.TurnAnswer = {"session": session, "status": status, "text": text, "result": result}
    if turn.stored is not None:
        answer["stored"] = turn.stored
    return Json(answer)


def wants_json(accept: str) -> bool:
    """Whether an Accept header asks for one JSON answer; anything else gets the stream."""
    ranges = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "application/json" in ranges and "text/event-stream" not in ranges
