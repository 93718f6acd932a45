"""Transcripts of 90 MiB and 40,000 messages: they cost whoever asks for them, within bounds, and nobody else."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from session_sidecar.agent.transcripts.reading.chain import conversation, read_entries
from tests.faults import FaultyModel
from tests.modes import COLD
from tests.server import MARK, Sidecar, a_moment, gone
from tests.transcripts import get, messages, repeat

pytestmark = [pytest.mark.long, pytest.mark.quiet]

MESSAGES, MIB = 40_000, 2**20
NAMES = [f"branch-{number}" for number in range(10)]


@pytest.fixture(scope="module")
def long_lines() -> bytes:
    """The lines of a long transcript."""
    text = {"type": "text", "text": "x" * 3800}
    answer = entry("assistant", {"role": "assistant", "content": [text]})
    said = [entry("user", {"role": "user", "content": "Go on"}), answer]
    return repeat(said, MESSAGES)


@pytest.fixture
async def sidecar(
    a_sidecar: Callable[..., Sidecar], long_lines: bytes, request: pytest.FixtureRequest
) -> AsyncIterator[Sidecar]:
    """One that has a long thread and a short one, and settings of the test's own."""
    async with a_sidecar(**getattr(request, "param", {})) as sidecar:
        await have(sidecar, "long", long_lines)
        await have(sidecar, "short", b"".join(long_lines.splitlines(keepends=True)[:4]))
        yield sidecar


def entry(kind: str, message: dict[str, Any], parent: str | None = None) -> bytes:
    made = {"type": kind, "uuid": str(uuid.uuid4()), "parentUuid": parent, "message": message}
    return json.dumps({**made, "timestamp": "2026-01-01T00:00:00.000Z", "isSidechain": False}).encode() + b"\n"


async def have(sidecar: Sidecar, thread: str, lines: bytes) -> Path:
    """A thread with this transcript."""
    session_id = str(uuid.uuid4())
    path = sidecar.home / "claude" / "projects" / "p" / f"{session_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines)
    body = {"thread_id": thread, "resource_id": "alice", "sdk_session_id": session_id}
    assert (await sidecar.http.put("/v1/session", json=body)).status_code == 201
    return path


async def fork(sidecar: Sidecar, parent: str, thread: str) -> httpx.Response:
    return await sidecar.post("/v1/chat/fork", thread, from_thread_id=parent)


def workers(sidecar: Sidecar) -> list[int]:
    """The processes of a sidecar that read for it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"{MARK}={sidecar.home}\0".encode() in (process / "environ").read_bytes()
            if ours and b"session_sidecar.agent.transcripts.reading.worker" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


async def until_working(sidecar: Sidecar) -> list[int]:
    """Wait until a long transcript is being read."""
    async with asyncio.timeout(20):
        while not (found := workers(sidecar)):
            await a_moment()
    return found


class Costs:
    """What those that read for a sidecar take: seconds of CPU, without the disk's; with it, the most memory at once."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar
        self.cpu: dict[int, float] = {}
        self.mib = 0.0

    def look(self) -> None:
        mib = 0.0
        for pid in (self._sidecar.process.pid, *workers(self._sidecar)):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.cpu[pid] = int(fields[11]) / os.sysconf("SC_CLK_TCK")
                mib += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / MIB
        self.mib = max(self.mib, mib)

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        self.look()
        looking = asyncio.create_task(self._go_on())
        try:
            yield
        finally:
            self.look()
            looking.cancel()
            await asyncio.wait([looking])

    async def _go_on(self) -> None:
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(0.02)

    @property
    def cpu_seconds(self) -> float:
        return sum(seconds for pid, seconds in self.cpu.items() if pid != self._sidecar.process.pid)


async def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def while_under_way(work: asyncio.Future[Any], ask: Callable[[], Any]) -> list[float]:
    """How long each of many asked one after the other takes until `work` is done."""
    taken = []
    while not work.done():
        taken.append(await seconds(ask))
    return taken


async def test_ten_forks_of_a_long_thread_take_five_seconds_of_cpu_and_500_mib_and_hold_up_nobody(
    sidecar: Sidecar,
) -> None:
    costs = Costs(sidecar)
    async with costs():
        forks = asyncio.gather(*(fork(sidecar, "long", name) for name in NAMES))
        taken = await while_under_way(forks, lambda: messages(sidecar, "short"))
    assert [response.status_code for response in await forks] == [201] * 10
    assert (costs.cpu_seconds <= 5, costs.mib <= 500) == (True, True), (costs.cpu_seconds, costs.mib)
    assert (statistics.median(taken) <= 0.1, max(taken) <= 1) == (True, True), taken
    whole = sidecar.transcript(await sidecar.session_id("long")).read_bytes().count(b"\n")
    for name in NAMES:
        session_id = await sidecar.session_id(name)
        lines = sidecar.transcript(session_id).read_bytes().splitlines()
        assert len(lines) == whole + 1
        assert all(session_id.encode() in line for line in lines)


@pytest.mark.parametrize("query", [{}, {"order": "desc", "include": "compacted"}], ids=["first", "last"])
async def test_ten_readers_of_a_long_thread_hold_up_no_reader_of_a_short_one(
    sidecar: Sidecar, query: dict[str, str]
) -> None:
    costs = Costs(sidecar)
    async with costs():
        reading = asyncio.gather(*(messages(sidecar, "long", **query) for _ in range(10)))
        taken = await while_under_way(reading, lambda: messages(sidecar, "short"))
        pages = await reading
    assert [len(page) for page in pages] == [50] * 10
    assert costs.mib <= 500
    assert (statistics.median(taken) <= 0.1, max(taken) <= 1) == (True, True), taken


@pytest.mark.parametrize("sidecar", [{"SIDECAR_WARM_SESSIONS": "1"}], indirect=True)
async def test_a_turn_of_a_short_thread_takes_at_most_50_ms_more_while_a_long_one_is_forked(
    sidecar: Sidecar, model: FaultyModel
) -> None:
    await sidecar.say("another", "Hello")
    calm = [await seconds(lambda: sidecar.say("another", "Go on")) for _ in range(15)]
    forks = asyncio.gather(*(fork(sidecar, "long", name) for name in NAMES))
    busy = await while_under_way(forks, lambda: sidecar.say("another", "Go on"))
    assert [response.status_code for response in await forks] == [201] * 10
    assert statistics.median(busy) - statistics.median(calm) <= 0.05, (calm, busy)


async def test_the_end_of_a_long_thread_is_read_without_the_rest_of_it(sidecar: Sidecar) -> None:
    page = (await get(sidecar, "/v1/session/messages", "long", order="desc", limit=200)).json()
    assert not workers(sidecar)
    path = sidecar.transcript(await sidecar.session_id("long"))
    whole = await asyncio.to_thread(lambda: conversation(read_entries(path)))
    assert [m["uuid"] for m in page["data"]] == [m.uuid for m in whole[-200:]]
    assert page["data"][0]["parent_uuid"] == whole[-201].uuid
    assert (page["has_more"], page["next"]) == (True, whole[-200].uuid)
    rest = await messages(sidecar, "long", order="desc", limit=200, after=page["next"])
    assert [m["uuid"] for m in rest] == [m.uuid for m in whole[-400:-200]]
    assert len(workers(sidecar)) == 1


async def test_readers_that_have_left_are_not_worked_for(sidecar: Sidecar) -> None:
    reading = [asyncio.create_task(messages(sidecar, "long")) for _ in range(5)]
    working = await until_working(sidecar)
    for reader in reading:
        reader.cancel()
    await asyncio.wait(reading)
    assert await gone(working, 5)
    async with asyncio.timeout(20):
        while len(sidecar.logged("request", path="/v1/session/messages", status=499)) < 5:
            await a_moment()
    assert not workers(sidecar)
    assert len(await messages(sidecar, "long")) == 50  # who asks then is answered


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_process_that_reads_ends_with_the_sidecar(sidecar: Sidecar, number: signal.Signals) -> None:
    files = set(sidecar.home.glob("claude/projects/*/*"))
    forks = [asyncio.create_task(fork(sidecar, "long", name)) for name in NAMES]
    working = await until_working(sidecar)
    await sidecar.stop(number)
    assert await gone(working)
    await asyncio.wait(forks)
    if number == signal.SIGTERM:
        made = [task for task in forks if task.exception() is None and task.result().is_success]
        assert len(set(sidecar.home.glob("claude/projects/*/*")) - files) == len(made)


@pytest.mark.parametrize("sidecar", [{"SIDECAR_MAX_TURNS": "2"}], indirect=True)
async def test_forks_without_a_message_beyond_the_limit_of_turns_are_refused(sidecar: Sidecar) -> None:
    responses = await asyncio.gather(*(fork(sidecar, "long", name) for name in NAMES))
    made = [response for response in responses if response.status_code == 201]
    refused = [response for response in responses if response.status_code == 503]
    assert (len(made), len(refused)) == (2, 8)
    assert {response.json()["code"] for response in refused} == {"too_many_turns"}
    assert all(int(response.headers["retry-after"]) > 0 for response in refused)
    assert (await fork(sidecar, "long", "afterwards")).status_code == 201


async def test_a_process_that_is_killed_over_a_long_thread_costs_that_request(sidecar: Sidecar) -> None:
    files = set(sidecar.home.glob("claude/projects/*/*"))
    forking = asyncio.create_task(fork(sidecar, "long", "branch"))
    (worker,) = await until_working(sidecar)
    os.kill(worker, signal.SIGKILL)
    response = await forking
    assert (response.status_code, response.json()["code"]) == (503, "transcripts_unavailable")
    assert set(sidecar.home.glob("claude/projects/*/*")) == files
    assert (await fork(sidecar, "long", "branch")).status_code == 201


async def test_a_process_that_is_killed_while_it_waits_costs_nobody_anything(sidecar: Sidecar) -> None:
    assert (await fork(sidecar, "long", "before")).status_code == 201
    (worker,) = workers(sidecar)
    os.kill(worker, signal.SIGKILL)
    async with asyncio.timeout(20):
        while Path(f"/proc/{worker}").exists():  # until the sidecar has heard of it
            await a_moment()
    assert (await fork(sidecar, "long", "after")).status_code == 201


async def test_a_thread_that_ends_in_a_tool_call_without_its_result_is_not_forked_there(
    a_sidecar: Callable[..., Sidecar],
) -> None:
    prompt = entry("user", {"role": "user", "content": "Look"})
    call = {"id": "msg_1", "role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "Bash"}]}
    killed = prompt + entry("assistant", call, json.loads(prompt)["uuid"])
    lines = repeat(killed.splitlines(), 2)
    async with a_sidecar(**COLD) as sidecar:
        await have(sidecar, "killed", lines)
        response = await fork(sidecar, "killed", "branch")
        assert (response.status_code, response.json()["code"]) == (422, "unsafe_fork_point")
        assert "a message before it" in response.json()["detail"]
        assert (await sidecar.session("branch")).status_code == 404
