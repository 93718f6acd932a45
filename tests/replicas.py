"""Several sidecars on one database, as they stand behind a load balancer that knows nothing of threads."""

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import FaultyModel
from tests.modes import COLD, WARM
from tests.postgres import free_port
from tests.server import SECONDS, Sidecar

SECRET = "the-secret-of-the-replicas"
LEASE_SECONDS = 2.0


class Replica(Sidecar):
    """One of them, at an address that the others know."""

    def __init__(self, home: Path, env: dict[str, str], *options: str) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        super().__init__(home, {**env, "SIDECAR_REPLICA_URL": url}, "--port", str(port), *options)
        self.keep_secret(SECRET)

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


Make = Callable[..., contextlib.AbstractAsyncContextManager[Replicas]]


@pytest.fixture
def some_replicas(model: FaultyModel, model_env: dict[str, str], database: str, tmp_path: Path) -> Make:
    """Start so many replicas on a database of their own, each with a home of its own. Use it as a context."""

    @contextlib.asynccontextmanager
    async def make(count: int = 2, *, warm: bool = False, url: str = database, **env: str) -> AsyncIterator[Replicas]:
        shared = {
            **model_env,
            **(WARM if warm else COLD),
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

    return make


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


async def messages(replica: Sidecar, thread: str) -> list[tuple[str, str]]:
    """The history as a replica gives it: (role, text)."""
    answer = await get(replica, "/v1/session/messages", thread)
    assert answer.status_code == 200, answer.text
    return [(one["type"], _text(one["message"]["content"])) for one in answer.json()["data"]]


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
