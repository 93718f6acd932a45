"""The offline model with faults: what a real API does on its bad days, on demand and without waiting.

    async with FaultyModel() as model:
        model.script(fail(529), hold(3))     # the next two requests; then model.default
        request = await model.requested(2)   # it has arrived
        await request.holding()              # three deltas are out, and no more will come
        request.release()                    # … until now

A prompt may choose for itself: `[[slow 20 0.05]]`, `[[hold 3]]`, `[[fail 429 7]]`, `[[tool Bash {"command": "ls"}]]`:
any function of BEHAVIOURS with its arguments.
"""

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from session_sidecar.offline.model import OfflineModel, error, frames
from session_sidecar.offline.reply import Block, Json, prompts, sentence, text_block, thinking_block, tool_block

SECONDS = 15  # the most that a test waits for an event before it says that it hangs

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How one request is answered; the parts combine."""

    status: int = 200
    retry_after: str | None = None
    silent: bool = False  # not even a status line
    text: str | None = None  # None: the offline model's own sentence, or nothing where tools are called
    thinking: str | None = None  # before the text
    tools: tuple[tuple[str, Json], ...] = ()  # names and inputs
    pause: float = 0  # seconds before each delta
    hold_after: int | None = None  # deltas; 0 holds before the first byte of the body
    cut_after: int | None = None  # deltas


def say(text: str) -> Behaviour:
    """Answer just this, a word a delta."""
    return Behaviour(text=text)


def slow(deltas: int = 20, pause: float = 0.05) -> Behaviour:
    """That many deltas, one every `pause` seconds. Where an event will do, `hold` is better."""
    return Behaviour(text="word " * deltas, pause=pause)


def pace(pause: float = 0.05) -> Behaviour:
    """The usual answer, a word every `pause` seconds."""
    return Behaviour(pause=pause)


def burst(deltas: int = 2000) -> Behaviour:
    """That many deltas at once."""
    return Behaviour(text="word " * deltas)


def big(size: int = 1_200_000) -> Behaviour:
    """One delta of that many characters."""
    return Behaviour(text="x" * size)


def hold(after: int = 3) -> Behaviour:
    """That many deltas, then nothing until the test releases it (or until the client has gone)."""
    return Behaviour(hold_after=after)


def cut(after: int = 3) -> Behaviour:
    """That many deltas, then the connection breaks."""
    return Behaviour(cut_after=after)


def silent() -> Behaviour:
    """The request is read, and nothing ever answered."""
    return Behaviour(silent=True)


def fail(status: int, retry_after: float | str | None = None) -> Behaviour:
    """An API error."""
    return Behaviour(status=status, retry_after=None if retry_after is None else str(retry_after))


def tool(name: str, arguments: Json) -> Behaviour:
    """Call one tool; the request with its result is answered by what comes next."""
    return tools((name, arguments))


def tools(*calls: tuple[str, Json]) -> Behaviour:
    """Call several tools in one reply."""
    return Behaviour(tools=calls)


def think(thinking: str = "Let me see.") -> Behaviour:
    """A thinking block, then the usual answer."""
    return Behaviour(thinking=thinking)


BEHAVIOURS: dict[str, Callable[..., Behaviour]] = {
    function.__name__: function for function in (say, slow, pace, burst, big, hold, cut, silent, fail, tool, think)
}


def marked(body: Json) -> Behaviour | None:
    """The behaviour that the prompt asks for, if the last thing said is a prompt and not a tool's result."""
    turns = [entry for entry in body["messages"] if entry["role"] == "user"]
    said = prompts(turns[-1:]) or [""]
    marker = re.search(r"\[\[(\w+)(.*?)\]\]", said[-1])
    if marker is None or marker[1] not in BEHAVIOURS:
        return None
    return BEHAVIOURS[marker[1]](*(_value(word) for word in re.findall(r"\{.*\}|\S+", marker[2])))


def _value(word: str) -> object:
    try:
        return json.loads(word)
    except ValueError:
        return word


class Exchange:
    """One request that has arrived, and how far its answer is."""

    def __init__(self, body: Json, headers: Mapping[str, str], behaviour: Behaviour) -> None:
        self.body = body
        self.headers = headers
        self.behaviour = behaviour
        self.sent = 0  # deltas
        self.was_cut = False  # by the behaviour, so that a client which then goes away does no wrong
        self._holding, self._released, self._gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @property
    def prompts(self) -> list[str]:
        """What the person has said in this conversation, as the API was sent it."""
        return prompts(self.body["messages"])

    def release(self) -> None:
        """Let a held answer go on."""
        self._released.set()

    async def holding(self) -> None:
        """Wait until all that comes before the gate has been sent."""
        await _within(self._holding.wait(), "the answer has not come to its gate")

    async def gone(self) -> None:
        """Wait until the client has closed the connection before the answer was complete."""
        await _within(self._gone.wait(), "the client is still there")

    async def play(self, break_off: Callable[[], None]) -> AsyncIterator[str]:
        """The reply's events, with the behaviour's stops between them."""
        does = self.behaviour
        blocks, stop_reason = self._content()
        for event in frames(self.body, blocks, stop_reason):
            is_delta, is_last = event.startswith("event: content_block_delta"), event.startswith("event: message_stop")
            if (
                does.hold_after is not None
                and (self.sent >= does.hold_after or is_last)
                and not self._released.is_set()
            ):
                self._holding.set()
                await self._released.wait()
            if does.cut_after is not None and (self.sent >= does.cut_after or is_last):
                self.was_cut = True
                break_off()
                await asyncio.Event().wait()  # ends with the connection
            if is_delta:
                await asyncio.sleep(does.pause)
                self.sent += 1
            yield event

    def lost(self) -> None:
        """The client's connection has gone."""
        if not self.was_cut:
            self._gone.set()

    def _content(self) -> tuple[list[Block], str]:
        does = self.behaviour
        blocks: list[Block] = []
        if does.thinking is not None:
            blocks.append(thinking_block(does.thinking))
        if does.text is not None or not does.tools:
            blocks.append(text_block(sentence(self.prompts) if does.text is None else does.text))
        blocks += [tool_block(name, arguments) for name, arguments in does.tools]
        return blocks, "tool_use" if does.tools else "end_turn"


class FaultyModel(OfflineModel):
    """The offline model, seen from inside. It runs in the test's own event loop, for whatever process calls it.

    `hang_up()` makes it refuse connections, `listen()` takes them again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Exchange] = []
        self.default = Behaviour()
        self._script: deque[Behaviour] = deque()
        self._arrival = asyncio.Condition()

    def script(self, *behaviours: Behaviour) -> None:
        """What the next requests get, one each, before any marker and before `default`."""
        self._script.extend(behaviours)

    def reset(self) -> None:
        """Forget what was asked and what was planned, and release what is held."""
        self.release()
        self.requests.clear()
        self._script.clear()
        self.default = Behaviour()

    def release(self) -> None:
        """Let every held answer go on."""
        for exchange in self.requests:
            exchange.release()

    async def requested(self, number: int = 1) -> Exchange:
        """Wait for the nth request, counted from one."""
        await _within(self._arrive(number), f"request {number} has not come: there were {len(self.requests)}")
        return self.requests[number - 1]

    async def gone(self, number: int = 1) -> None:
        """Wait until the client of the nth request has gone away before its answer was complete."""
        await (await self.requested(number)).gone()

    async def reply(self, request: Request, body: Json) -> Response:
        """Answer one request as the script, its prompt or the default says."""
        behaviour = self._script.popleft() if self._script else marked(body) or self.default
        exchange = Exchange(body, dict(request.headers), behaviour)
        async with self._arrival:
            self.requests.append(exchange)
            self._arrival.notify_all()
        if behaviour.silent:
            return _Silence(exchange)
        if behaviour.status != 200:
            headers = {} if behaviour.retry_after is None else {"retry-after": behaviour.retry_after}
            return error(behaviour.status, KINDS[behaviour.status], "as the test wished", headers)
        if not body.get("stream"):
            return await super().reply(request, body)
        return _Watched(exchange, lambda: self._break_off(request))

    async def _arrive(self, number: int) -> None:
        async with self._arrival:
            await self._arrival.wait_for(lambda: len(self.requests) >= number)

    def _break_off(self, request: Request) -> None:
        for connection in list(self._state.connections):
            if getattr(connection, "client", None) == tuple(request.scope["client"]):
                connection.transport.close()  # what was sent still arrives; the end of the body never does


class _Watched(StreamingResponse):
    """A stream that tells its exchange when the client goes away."""

    def __init__(self, exchange: Exchange, break_off: Callable[[], None]) -> None:
        super().__init__(self._play(exchange, break_off), media_type="text/event-stream")
        self._exchange = exchange
        self._complete = False

    async def _play(self, exchange: Exchange, break_off: Callable[[], None]) -> AsyncIterator[str]:
        async for event in exchange.play(break_off):
            yield event
        self._complete = True  # from here on, a disconnect is the ordinary end

    async def listen_for_disconnect(self, receive: Receive) -> None:
        await super().listen_for_disconnect(receive)
        if not self._complete:
            self._exchange.lost()


class _Silence(Response):
    """No answer at all, for as long as somebody waits for it."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._exchange.lost()


async def _within(waiting: Awaitable[object], problem: str) -> None:
    try:
        async with asyncio.timeout(SECONDS):
            await waiting
    except TimeoutError:
        raise AssertionError(problem) from None
