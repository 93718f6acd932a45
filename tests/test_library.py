"""As a part of somebody's own application: mounted below a path, and without a trace in its process."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from session_sidecar.app import create_app
from session_sidecar.settings import Settings
from tests.modes import NO_SPARE

pytestmark = pytest.mark.long


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An application behind a real server in this event loop."""
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        await task


def host_of(sidecar: Starlette, kind: type[Starlette]) -> Starlette:
    """Somebody's application around it, as the docs have it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with sidecar.router.lifespan_context(sidecar):
            yield

    host = kind(lifespan=lifespan)
    host.mount("/agents", sidecar)
    return host


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
async def test_it_works_below_a_path_of_another_application(kind: type[Starlette], tmp_path: Path) -> None:
    before = dict(os.environ)
    sidecar = create_app(Settings.load(NO_SPARE, home=tmp_path / "home", model="offline"))
    async with served(host_of(sidecar, kind)) as client:
        assert dict(os.environ) == before
        body = {"thread_id": "t1", "resource_id": "alice", "message": "My name is Ada"}
        async with client.stream("POST", "/agents/v1/chat", json=body) as response:
            streamed = [line async for line in response.aiter_lines()]
        assert "event: end" in streamed
        again = await client.post("/agents/v1/chat", json=body, headers={"accept": "application/json"})
        assert again.json()["text"].startswith("You have said 2 things")
        refused = await client.put("/agents/v1/chat", json=body)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, POST")
        chat = "/agents/v1/ai-sdk/chat/t1%2F2"
        answers = [await client.get(path, params={"resource_id": "alice"}) for path in (f"{chat}/stream", chat)]
        assert [answer.status_code for answer in answers] == [204, 404]
        assert answers[1].json()["code"] == "session_not_found"
        assert (await client.post(chat)).headers["allow"] == "GET, HEAD"
        assert (await client.get("/agents/nowhere")).json()["code"] == "not_found"
        assert (await client.get("/nowhere")).status_code == 404
        elsewhere = await client.get("/agents/v1/sessions", headers={"host": "evil.test"})
        assert elsewhere.status_code == 421
    assert dict(os.environ) == before


async def test_two_of_them_share_a_process_and_nothing_else(tmp_path: Path) -> None:
    sidecars = {
        name: create_app(Settings.load(NO_SPARE, home=tmp_path / name, model="offline")) for name in ("one", "two")
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for sidecar in sidecars.values():
                await stack.enter_async_context(sidecar.router.lifespan_context(sidecar))
            yield

    host = Starlette(routes=[Mount(f"/{name}", app) for name, app in sidecars.items()], lifespan=lifespan)
    async with served(host) as client:
        for name in sidecars:
            body = {"thread_id": "t1", "resource_id": "alice", "message": f"I am {name}"}
            said = await client.post(f"/{name}/v1/chat", json=body, headers={"accept": "application/json"})
            assert said.json()["text"] == f"You have said 1 thing: I am {name}"
        for name in sidecars:
            titled = {"thread_id": "t1", "resource_id": "alice", "title": f"Of {name}"}
            assert (await client.patch(f"/{name}/v1/session", json=titled)).json()["metadata"]["title"] == f"Of {name}"


async def test_importing_it_reads_no_environment(tmp_path: Path) -> None:
    program = "import session_sidecar.app, session_sidecar.settings; print('imported')"
    env = {**os.environ, "SIDECAR_PORT": "high", "SIDECAR_NONSENSE": "x"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), env=env, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out == b"imported\n"
