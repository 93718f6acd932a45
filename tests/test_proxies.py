"""Behind a proxy: a turn still comes word by word, a closed tab still cancels, the sidecar still sets the bounds."""

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.faults import FaultyModel
from tests.server import SECONDS, Sidecar, Stream

EXAMPLES = Path(__file__).parent.parent / "examples"
PROXIES = {  # an example, and the command that runs a file such as it
    "nginx/nginx.conf": ("nginx", "-e", "stderr", "-p", ".", "-c"),
    "caddy/Caddyfile": ("caddy", "run", "--adapter", "caddyfile", "--config"),
    "haproxy/haproxy.cfg": ("haproxy", "-db", "-f"),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=PROXIES, ids=lambda example: example.partition("/")[0])
async def proxy(request: pytest.FixtureRequest, sidecar: Sidecar, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """An example in front of the sidecar; only its ports are other ones."""
    program, *arguments = PROXIES[request.param]
    if shutil.which(program) is None:
        assert "CI" not in os.environ, f"install {program}"
        pytest.skip(f"LEFT OUT for want of {program}: install it")
    port = free_port()
    config = (EXAMPLES / request.param).read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    config = config.replace("127.0.0.1:8000", f"127.0.0.1:{sidecar.http.base_url.port}")
    (tmp_path / "config").write_text(config)
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    process = await asyncio.create_subprocess_exec(
        program, *arguments, "config", cwd=tmp_path, env={**os.environ, **home}
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            async with asyncio.timeout(SECONDS):
                while not await answers(client):
                    assert process.returncode is None
            yield client
    finally:
        process.terminate()
        await process.wait()


async def answers(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/healthz")).status_code == 200
    return False


@contextlib.asynccontextmanager
async def asked(client: httpx.AsyncClient, thread: str, message: str, **fields: str) -> AsyncIterator[Stream]:
    body = {"thread_id": thread, "resource_id": "alice", "message": message, **fields}
    async with client.stream("POST", "/v1/chat", json=body) as response:
        assert response.status_code == 200
        yield Stream(response)


async def test_an_answer_comes_through_while_it_is_given(
    proxy: httpx.AsyncClient, thread: str, model: FaultyModel
) -> None:
    async with asked(proxy, thread, "[[hold 3]] Hello") as stream:
        exchange = await model.requested()
        await exchange.holding()
        await stream.until_text("You have said ")
        exchange.release()
        assert (await stream.rest())[-1].data["status"] == "completed"


async def test_a_reader_that_leaves_is_noticed(
    proxy: httpx.AsyncClient, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with asked(proxy, thread, "[[hold 3]] Hello", on_disconnect="cancel") as stream:
        await stream.until_text()
    await sidecar.until_logged("turn", thread_id=thread, status="interrupted")


async def test_what_is_too_large_is_told_by_the_sidecar(proxy: httpx.AsyncClient, thread: str) -> None:
    body = {"thread_id": thread, "resource_id": "alice", "message": "x" * 5 * 2**20}
    refused = await proxy.post("/v1/chat", json=body)
    assert (refused.status_code, refused.json()["code"]) == (413, "message_too_large")
