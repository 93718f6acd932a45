"""Real clients whose connection breaks in mid-answer: each has every event once, and the prompt is run once."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults import FaultyModel, hold
from tests.node import CLIENTS, need_node
from tests.server import SECONDS, Sidecar, a_moment
from tests.terminal import Relay, relay

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "examples" / "reconnecting"
PROGRAMS = {
    "httpx": RECIPES / "follow_httpx.py",
    "requests-sse": CLIENTS / "with_requests_sse.py",
    "aiohttp-sse-client2": CLIENTS / "with_aiohttp_sse_client2.py",
    "curl": RECIPES / "follow.sh",
    "fetch": RECIPES / "fetch.mjs",
    "fetch-event-source": CLIENTS / "fetch-event-source.mjs",
}


def command(program: Path, place: Path) -> list[str]:
    if program.suffix == ".py":
        return [sys.executable, str(program)]
    if program.suffix == ".sh":
        return [str(program)]
    need_node()
    place.mkdir(exist_ok=True)
    (place / "node_modules").symlink_to(CLIENTS / "node_modules")  # packages are looked for beside the program
    return ["node", str(shutil.copy(program, place))]


class Client:
    """A program that prints the ID and the name of each event that it has."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[tuple[str, str]] = []

    async def until(self, name: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            while line := (await self.process.stdout.readline()).decode():
                event_id, event = line.split()
                self.events.append((event_id, event))
                if event == name:
                    return
        raise AssertionError(f"it ended without {name}: {self.events}")


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[Client]:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        yield Client(process)
        async with asyncio.timeout(SECONDS):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def asked_again(sidecar: Sidecar, between: Relay, call: bytes) -> None:
    async with asyncio.timeout(SECONDS):
        while between.sent.count(call) < 2:
            await a_moment()


def has_all(client: Client) -> None:
    turn = client.events[0][0].rpartition("-")[0]
    assert [event_id for event_id, _ in client.events] == [f"{turn}-{n + 1}" for n in range(len(client.events))]
    assert (client.events[0][1], client.events[-1][1]) == ("session", "end")


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_connection_that_breaks_in_mid_answer_costs_no_event_and_runs_nothing_twice(
    sidecar: Sidecar, thread: str, model: FaultyModel, tmp_path: Path, name: str
) -> None:
    model.script(hold(3))
    body = json.dumps({"thread_id": thread, "resource_id": "alice", "message": "Hello"})
    program = command(PROGRAMS[name], tmp_path)
    async with relay(str(sidecar.http.base_url)) as (between, url), running(*program, url, body) as client:
        await client.until("stream_event")
        exchange = await model.requested()
        await exchange.holding()
        between.cut()
        await asked_again(sidecar, between, b"POST /v1/chat")
        exchange.release()
        await client.until("end")
    has_all(client)
    assert b"last-event-id: " in between.sent.lower()
    assert [who for who, _ in await sidecar.history(thread)] == ["user", "assistant"]


async def test_eventsource_follows_a_turn_over_a_break_and_stops_at_its_end(
    sidecar: Sidecar, thread: str, model: FaultyModel, tmp_path: Path
) -> None:
    model.script(hold(3))
    program = command(RECIPES / "eventsource.mjs", tmp_path)
    async with sidecar.stream(thread, "Hello") as stream, relay(str(sidecar.http.base_url)) as (between, url):
        await stream.until_text()
        async with running(*program, url, thread, "alice") as client:
            await client.until("stream_event")
            between.cut()
            await asked_again(sidecar, between, b"GET /v1/chat")
            model.release()
            await client.until("end")
    has_all(client)


async def test_eventsource_that_is_not_closed_at_the_end_is_told_to_stop(
    sidecar: Sidecar, thread: str, tmp_path: Path
) -> None:
    await sidecar.say(thread, "Hello")
    program = (RECIPES / "eventsource.mjs").read_text()
    (tmp_path / "open.mjs").write_text(program.replace('if (name === "end") source.close();', ""))
    node = command(tmp_path / "open.mjs", tmp_path / "node")
    async with (
        relay(str(sidecar.http.base_url)) as (between, url),
        running(*node, url, thread, "alice") as client,
    ):
        await client.until("end")
    assert between.sent.count(b"GET /v1/chat") == 2
    has_all(client)
