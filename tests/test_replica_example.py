"""The example with several replicas: it runs as it stands, and a conversation goes on on whichever of them is left."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from session_sidecar.settings import Settings
from tests.forked import PROGRAM
from tests.replicas import LEASE_SECONDS
from tests.server import SECONDS, a_moment

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parent.parent / "examples" / "replicas"
THREAD = {"thread_id": "t", "resource_id": "alice"}
JSON = {"Accept": "application/json"}


def _port() -> int:
    """A port that is free, as the three after it are."""
    while True:
        with contextlib.ExitStack() as free, contextlib.suppress(OSError):
            port = 0
            for number in range(4):
                probe = free.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port and port + number))
                port = port or int(probe.getsockname()[1])
            return port


class Example:
    """`run.sh`, and what its replicas have logged."""

    def __init__(self, process: asyncio.subprocess.Process, http: httpx.AsyncClient) -> None:
        self.process = process
        self.http = http
        self.log = ""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(2**16):
            self.log += piece.decode()

    async def ready(self, replicas: int) -> None:
        """Wait until so many replicas listen, each with its imports to do, and nginx with them."""
        async with asyncio.timeout(3 * SECONDS):
            while self.log.count("running on") < replicas or not await self._answers():
                assert self.process.returncode is None, self.log
                await a_moment()

    async def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await self.http.get("/readyz")).status_code == 200
        return False

    async def say(self, message: str) -> str:
        """Send a message, again where the thread is not free yet, as Retry-After says; the answer."""
        async with asyncio.timeout(SECONDS):
            while True:
                answer = await self.http.post("/v1/chat", json={**THREAD, "message": message}, headers=JSON)
                if answer.status_code == 200:
                    text: str = answer.json()["text"]
                    return text
                # 502 is nginx's: it does not send a message again whose connection broke.
                assert answer.status_code in (409, 502, 503), answer.text
                await asyncio.sleep(LEASE_SECONDS / 4)

    def replicas(self) -> dict[int, Path]:
        """The processes of the replicas, and their homes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in children}
        return {
            pid: Path(command[command.index("--home") + 1]) for pid, command in commands.items() if "serve" in command
        }

    async def end(self) -> int:
        """End it as Ctrl-C does; its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(2 * SECONDS):
            status = await self.process.wait()
            await self._reading
        return status


@pytest.fixture
async def example(database: str, tmp_path: Path) -> AsyncIterator[Example]:
    """`run.sh` with the stand-in for the model."""
    if shutil.which("nginx") is None:
        assert "CI" not in os.environ, "install nginx"
        pytest.skip("LEFT OUT for want of nginx: install it")
    port = _port()
    person = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")}
    env = {
        "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
        "PORT": f"{port}",
        "REPLICAS_HOME": f"{tmp_path}/replicas",
        "SIDECAR_DATABASE": database,
        "SIDECAR_LEASE_SECONDS": f"{LEASE_SECONDS}",
        "SIDECAR_SPARE_PROCESSES": "0",
    }
    process = await asyncio.create_subprocess_exec(
        EXAMPLE / "run.sh", "--model", "offline", env=person | env, stderr=asyncio.subprocess.PIPE
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as http:
        example = Example(process, http)
        try:
            await example.ready(3)
            yield example
        finally:
            await example.end()


async def test_a_conversation_goes_on_on_every_replica_and_when_one_of_them_is_killed(example: Example) -> None:
    for number in range(1, 5):
        assert f"You have said {number} thing" in await example.say(f"thing {number}")
    replicas = example.replicas()
    assert len(replicas) == 3
    with_files = {pid for pid, home in replicas.items() if list(home.glob("claude/projects/*/*.jsonl"))}
    assert len(with_files) > 1, "all turns were one replica's"
    os.kill(with_files.pop(), signal.SIGKILL)
    for number in range(5, 8):
        assert f"You have said {number} thing" in await example.say(f"thing {number}")
    history = (await example.http.get("/v1/session/messages", params=THREAD)).json()["data"]
    assert [one["message"]["content"] for one in history if one["type"] == "user"] == [
        f"thing {number}" for number in range(1, 8)
    ]


async def test_what_was_started_is_ended_with_it(example: Example) -> None:
    await example.say("hello")
    started = example.replicas()
    assert await example.end() == 0
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
    with pytest.raises(httpx.ConnectError):
        await example.http.get("/healthz")


def test_the_containers_are_those_that_nginx_and_the_replicas_ask() -> None:
    composed: dict[str, Any] = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())
    replicas = {name: one["environment"] for name, one in composed["services"].items() if "build" in one}
    asked = set(re.findall(r"server ([\w-]+):8000", (EXAMPLE / "nginx.conf").read_text()))
    assert asked == set(replicas)
    for name, environment in replicas.items():
        settings = Settings.load(environment)
        assert settings.replica_url == f"http://{name}:8000"
        assert settings.served_hosts == {"replicas"}
        assert settings.tokens_file is not None
    homes = {one["volumes"][0] for name, one in composed["services"].items() if name in replicas}
    assert len(homes) == len(replicas) == 3
    assert set(composed["volumes"]) == {volume.partition(":")[0] for volume in homes} | {"database"}
    lock = composed["x-replica"]["build"]["args"]["LOCK"]
    assert "\npsycopg==" in (EXAMPLE.parent.parent / lock).read_text()
