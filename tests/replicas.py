"""Several sidecars on one database, as they stand behind a load balancer that knows nothing of threads."""

import asyncio
import contextlib
import itertools
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest

from tests.copies import adopted
from tests.faults import FaultyModel
from tests.modes import COLD
from tests.postgres import PASSWORD, free_port
from tests.server import SECONDS, Sidecar, a_moment

SECRET = "the-secret-of-the-replicas"
LEASE_SECONDS = 3.0


class Replica(Sidecar):
    """One of them, at an address that the others know."""

    def __init__(self, home: Path, env: dict[str, str], *options: str) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        super().__init__(home, {"SIDECAR_REPLICA_URL": url, **env}, "--port", str(port), *options)
        self.keep_secret(SECRET, PASSWORD, quote(PASSWORD, ""))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP while the block lasts."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """kill -9, and see it gone."""
        await self.stop(signal.SIGKILL)

    async def restart_cleanly(self) -> None:
        """Stop it, and start it again."""
        await self.stop(signal.SIGTERM)
        await self.restart()


class Replicas:
    """A fleet; `any` is whichever comes next."""

    def __init__(self, members: list[Replica]) -> None:
        self.members = members
        self._next: Iterator[Replica] = itertools.cycle(members)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self.members)

    def __getitem__(self, number: int) -> Replica:
        return self.members[number]

    @property
    def any(self) -> Replica:
        return next(self._next)


class Balancer:
    """A plain load balancer: each connection goes to the next replica that takes it, whatever is asked on it."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        self._replicas = list(replicas)
        self._next = 0

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Who speaks to the fleet through it, and opens a connection for each call."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        limits = httpx.Limits(max_keepalive_connections=0)
        try:
            async with httpx.AsyncClient(base_url=url, timeout=4 * SECONDS, limits=limits) as client:
                yield client
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there = await self._taken()
            await asyncio.gather(_pass_on(reader, there[1]), _pass_on(there[0], writer))
        writer.close()

    async def _taken(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in self._replicas:
            self._next += 1
            port = self._replicas[self._next % len(self._replicas)].http.base_url.port
            with contextlib.suppress(ConnectionError):
                return await asyncio.open_connection("127.0.0.1", port)
        raise ConnectionError("none of them is there")


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


Make = Callable[..., contextlib.AbstractAsyncContextManager[Replicas]]


@pytest.fixture
def some_replicas(model: FaultyModel, model_env: dict[str, str], database: str, tmp_path: Path) -> Make:
    """Start so many replicas on a database of their own, each with a home of its own. Use it as a context.

    They take a process for each turn, unless the settings say otherwise.
    """

    @contextlib.asynccontextmanager
    async def make(count: int = 2, *, url: str = database, **env: str) -> AsyncIterator[Replicas]:
        shared = {
            **model_env,
            **COLD,
            "SIDECAR_DATABASE": url,
            "SIDECAR_REPLICA_SECRET": SECRET,
            "SIDECAR_LEASE_SECONDS": str(LEASE_SECONDS),
            **env,
        }
        async with contextlib.AsyncExitStack() as stack:
            members = [
                await stack.enter_async_context(Replica(tmp_path / f"replica-{number}", shared))
                for number in range(count)
            ]
            yield Replicas(members)
        for member in members:
            no_alarms(member)

    return make


Know = Callable[..., Awaitable[None]]


@pytest.fixture
def knows(_home: Path, _model: FaultyModel) -> Know:
    """Give a sidecar a thread, alice's if nobody is named, whose first turn has completed: it said "My name is Ada".

    No turn is run for it: the transcript is a copy of one that the CLI wrote, and is adopted.
    """
    (written, *_) = _home.glob("claude/projects/*/*.jsonl")
    _model.requests.clear()  # what it was asked for that

    async def know(sidecar: Sidecar, thread: str, resource: str = "alice") -> None:
        await adopted(sidecar, written, thread, resource)

    return know


async def get(replica: Sidecar, path: str, thread: str, **query: str) -> httpx.Response:
    """GET something of a thread of alice's."""
    return await replica.http.get(path, params={"thread_id": thread, "resource_id": "alice", **query})


async def let_go(replica: Sidecar, thread: str) -> None:
    """Wait until no other replica has a thread: one that has just answered is about to let go of it."""
    async with asyncio.timeout(SECONDS):
        while (await get(replica, "/v1/session", thread, metadata="false")).json()["status"] == "running":
            await replica.settle()


async def until_gone(replica: Sidecar, session_id: str) -> None:
    """Wait until a replica has no file of a session."""
    async with asyncio.timeout(SECONDS):
        while [*replica.home.glob(f"claude/projects/*/{session_id}*")]:
            await replica.settle()


async def when_free(replica: Replica, thread: str, message: str, **fields: Any) -> str:
    """The answer to a message that is sent again until its thread is free, sooner than Retry-After says."""
    key = str(uuid.uuid4())
    async with asyncio.timeout(2 * SECONDS):
        while (answer := await replica.chat(thread, message, idempotency_key=key, **fields)).status_code != 200:
            assert answer.status_code in (409, 502, 503), answer.text
            assert (answer.status_code == 502) == ("retry-after" not in answer.headers), answer.text
            await asyncio.sleep(LEASE_SECONDS / 8)
    text: str = answer.json()["text"]
    return text


async def asked(database: str, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What the database says to an operator."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        cursor = await connection.execute(statement.encode(), parameters)
        return await cursor.fetchall() if cursor.description else []


async def all_released(database: str) -> None:
    """Wait until no thread is leased."""
    async with asyncio.timeout(SECONDS):
        while await asked(database, "SELECT 1 FROM session_mappings WHERE lease_until IS NOT NULL"):
            await a_moment()


async def all_run_out(database: str) -> None:
    """Wait until no lease is valid; who asks for a thread then gets it at once, as if somebody had asked before."""
    async with asyncio.timeout(SECONDS):
        while await asked(database, "SELECT 1 FROM session_mappings WHERE lease_until > clock_timestamp()"):
            await a_moment()
    await asked(database, "UPDATE session_mappings SET contested_at = to_timestamp(0) WHERE lease_until IS NOT NULL")


def no_alarms(replica: Sidecar) -> None:
    """See that nothing failed in a replica that nobody foresaw."""
    log = "".join(replica.log)
    for alarm in ("Traceback", "exception was never retrieved", "never awaited", "was destroyed but it is pending"):
        assert alarm not in log, log


async def messages(replica: Sidecar, thread: str) -> list[tuple[str, str]]:
    """The history as a replica gives it: (role, text)."""
    answer = await get(replica, "/v1/session/messages", thread)
    assert answer.status_code == 200, answer.text
    return [(one["type"], _text(one["message"]["content"])) for one in answer.json()["data"]]


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
