"""Ways to take a turn, each timed by the same client from the call to the first delta and to the end."""

import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, StreamEvent, query

from bench.names import CONNECTED
from bench.options import options
from bench.seeds import Seeds
from bench.servers import Server

MESSAGE = "And what do you make of that?"


class Timing(NamedTuple):
    """Milliseconds from the call."""

    first_delta: float
    end: float


Turn = Callable[[], Awaitable[Timing]]


class Contender(Protocol):
    """One way to take a turn."""

    name: str

    def follow_up(self, messages: int) -> contextlib.AbstractAsyncContextManager[Turn]:
        """The next turn of a conversation of so many messages, whose last two were said through this contender.

        None are said where `messages` is 0: it is the first turn of a new conversation then.
        """
        ...


class Forker(Contender, Protocol):
    """One that can also fork."""

    def fork(self, messages: int) -> contextlib.AbstractAsyncContextManager[Turn]:
        """The first turn of a branch of such a conversation."""
        ...


class Clock:
    """Notes when the first delta came and when the end did."""

    def __init__(self) -> None:
        """Start now."""
        self._start = time.perf_counter()
        self._first: float | None = None

    def delta(self) -> None:
        """A delta is here."""
        if self._first is None:
            self._first = time.perf_counter()

    def end(self) -> Timing:
        """The turn is over."""
        if self._first is None:
            raise RuntimeError("a turn without a delta")
        return Timing((self._first - self._start) * 1000, (time.perf_counter() - self._start) * 1000)


async def streamed(server: Server, path: str, body: dict[str, Any], *, delta: str, end: str) -> Timing:
    """POST for a stream; `delta` and `end` are in the lines that carry a delta and the end."""
    clock = Clock()
    timing = None
    async with server.http.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if delta in line:
                clock.delta()
            elif end in line:
                timing = clock.end()
    if timing is None:
        raise RuntimeError(f"a stream of {path} without an end")
    return timing


async def received(messages: AsyncIterator[Any], clock: Clock) -> Timing:
    """Read what the SDK gives, up to the result."""
    async for message in messages:
        if isinstance(message, StreamEvent) and message.event["type"] == "content_block_delta":
            clock.delta()
        elif type(message).__name__ == "ResultMessage":
            return clock.end()
    raise RuntimeError("a turn without a result")


@dataclass
class RawApi:
    """The Messages API itself, with the whole conversation in the request: the least that a turn can cost."""

    model: Server
    name = "raw API stream"

    @contextlib.asynccontextmanager
    async def follow_up(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        said = [{"role": ("user", "assistant")[i % 2], "content": f"This is thing number {i}"} for i in range(messages)]
        body = {"model": "m", "stream": True, "messages": [*said, {"role": "user", "content": MESSAGE}]}
        yield lambda: streamed(self.model, "/v1/messages", body, delta="content_block_delta", end="event: message_stop")


@dataclass
class Connected:
    """A `ClaudeSDKClient` that stays connected, used directly: the floor for whoever keeps processes."""

    home: Path
    model: str
    seeds: Seeds
    name = CONNECTED

    @contextlib.asynccontextmanager
    async def follow_up(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        config, cwd = self.home / "claude", self.home / "workspace"
        resume = self.seeds.copy(messages - 2, config, cwd) if messages > 2 else None
        async with ClaudeSDKClient(options(config, cwd, self.model, resume=resume)) as client:
            if messages:
                await self._turn(client)
            yield lambda: self._turn(client)

    async def _turn(self, client: ClaudeSDKClient) -> Timing:
        clock = Clock()
        await client.query(MESSAGE)
        return await received(client.receive_response(), clock)


@dataclass
class Query:
    """`query(resume=…)`: a process a turn, as the SDK's documentation shows it."""

    home: Path
    model: str
    seeds: Seeds
    name = "query(resume=…)"

    def _options(self, **more: Any) -> ClaudeAgentOptions:
        return options(self.home / "claude", self.home / "workspace", self.model, **more)

    @contextlib.asynccontextmanager
    async def follow_up(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        resume = await self._conversation(messages) if messages else None
        yield lambda: self._turn(resume=resume)

    @contextlib.asynccontextmanager
    async def fork(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        resume = await self._conversation(messages)
        yield lambda: self._turn(resume=resume, fork_session=True)

    async def _conversation(self, messages: int) -> str:
        if messages > 2:
            session_id = self.seeds.copy(messages - 2, self.home / "claude", self.home / "workspace")
            await self._turn(resume=session_id)
        else:
            session_id = str(uuid.uuid4())
            await self._turn(session_id=session_id)
        return session_id

    async def _turn(self, **more: Any) -> Timing:
        clock = Clock()
        messages = query(prompt=MESSAGE, options=self._options(**more))
        timing = await received(messages, clock)
        async for _ in messages:  # it ends when its process has
            pass
        return timing


@dataclass
class Sidecar:
    """The sidecar over HTTP. Where there are servers for `then`, follow-ups are taken with these, one after another."""

    name: str
    server: Server
    home: Path
    seeds: Seeds
    then: Sequence[Server] = ()

    @contextlib.asynccontextmanager
    async def follow_up(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        servers = itertools.cycle(self.then or [self.server])
        async with self._conversation(messages) as key:
            yield lambda: self._turn("/v1/chat", key, next(servers))

    @contextlib.asynccontextmanager
    async def fork(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        async with self._conversation(messages) as key:
            branch = {**key, "thread_id": str(uuid.uuid4()), "from_thread_id": key["thread_id"]}
            yield lambda: self._turn("/v1/chat/fork", branch)

    @contextlib.asynccontextmanager
    async def _conversation(self, messages: int) -> AsyncIterator[dict[str, str]]:
        key = {"thread_id": str(uuid.uuid4()), "resource_id": "bench"}
        if messages > 2:
            session_id = self.seeds.copy(messages - 2, self.home / "claude", self.home / "workspace")
            adopted = await self.server.http.put("/v1/session", json={**key, "sdk_session_id": session_id})
            adopted.raise_for_status()
        if messages:
            await self._turn("/v1/chat", key)
        yield key
        forgotten = await self.server.http.delete("/v1/session", params=key)  # and with it its process
        forgotten.raise_for_status()

    async def _turn(self, path: str, key: dict[str, str], server: Server | None = None) -> Timing:
        body = {**key, "message": MESSAGE}
        return await streamed(server or self.server, path, body, delta="content_block_delta", end="event: end")


@dataclass
class AgUi:
    """ag-ui-claude-sdk, which keeps a process a thread, behind its own FastAPI endpoint."""

    server: Server
    home: Path
    seeds: Seeds
    name = "ag-ui-claude-sdk"

    @contextlib.asynccontextmanager
    async def follow_up(self, messages: int) -> AsyncIterator[Turn]:
        """See Contender."""
        thread, props = str(uuid.uuid4()), {}
        if messages > 2:
            props["resume"] = self.seeds.copy(messages - 2, self.home / "claude", self.home / "workspace")
        if messages:
            await self._turn(thread, props)
        yield lambda: self._turn(thread, {})
        await self.server.http.post("/forget", params={"thread_id": thread})

    async def _turn(self, thread: str, props: dict[str, str]) -> Timing:
        message = {"id": str(uuid.uuid4()), "role": "user", "content": MESSAGE}
        body = {"threadId": thread, "runId": str(uuid.uuid4()), "messages": [message], "forwardedProps": props}
        empty: dict[str, Any] = {"state": None, "tools": [], "context": []}
        return await streamed(self.server, "/chat", body | empty, delta="TEXT_MESSAGE_CONTENT", end="RUN_FINISHED")
