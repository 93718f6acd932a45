"""Two minutes of all that people and bad days do to a sidecar, at random and many at once: what it promises holds.

The seed gives every worker its choices; how they meet is the machine's. `STATE_MACHINE_SEED` names another one.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.agent.chain import read_entries
from sidecar.offline.model import QUOTED
from tests.server import SECONDS, Sidecar, gone, running
from tests.transcripts import texts
from tests.volume import Volume, mounted

Make = Callable[..., Sidecar]

SEED = int(os.environ.get("STATE_MACHINE_SEED", "20261121"))
LASTS = 120.0  # seconds
WORKERS, NAMES, RESOURCES = 6, 5, ("alice", "bob")
WARM, SPARES, MOST_TURNS = 3, 1, 12
AGENTS = """
[default]
tools = ["Bash"]
allowed_tools = ["Bash"]
permission_mode = "bypassPermissions"
[other]
system_prompt = "Be terse."
"""
SETTINGS = {
    "IS_SANDBOX": "1",
    "SIDECAR_WARM_SESSIONS": str(WARM),
    "SIDECAR_SPARE_PROCESSES": str(SPARES),
    "SIDECAR_MAX_TURNS": str(MOST_TURNS),
    "SIDECAR_QUEUE_TURNS": "3",
    "SIDECAR_TURN_SECONDS": "30",
    "SIDECAR_TURN_IDLE_SECONDS": "5",
    "SIDECAR_INTERRUPT_SECONDS": "1",
}
MOST_KEPT = WARM + 2 * SPARES  # spares of two agents
MOST_PROCESSES = MOST_TURNS + 2 * MOST_KEPT + 1  # as many again as are kept may be leaving, and one be warmed up
BOUND = 75.0  # seconds for any one call: a few stopped CLIs one after the other, each as long as the settings allow

# What a call may be told, whatever happens to it.
GONE = {"session_not_found", "session_missing"}
NOTHING_TO_FORK = GONE | {"unsafe_fork_point", "message_not_found"}
STRUCK = {"agent_failed", "agent_start_failed", "turn_timeout", "api_error", "not_saved"}
STOPPED = {"turn_interrupted", "thread_deleted", "replay_gone", "session_not_found"}
TURN = {"thread_busy", "queue_full", "too_many_turns"} | STRUCK | STOPPED
FORK = {"thread_busy", "thread_exists", "too_many_turns", "not_saved"} | NOTHING_TO_FORK
ADOPT = {"thread_busy", "thread_exists", "session_taken", "session_busy", "session_missing"}
EXPLAINED = ("Fatal error in message reader: Command failed with exit code", "No space left on device")


@dataclass(eq=False)
class Thread:
    """A thread, and the newest session ID that somebody was told of it."""

    name: str
    resource: str
    session: str | None = None
    changes: int = 0  # by hand: what was told before then says nothing any more

    def change(self, session: str | None = None) -> None:
        self.session, self.changes = session, self.changes + 1


@dataclass(eq=False)
class Asked:
    """What was said, and what was known of the thread then."""

    thread: Thread
    prompt: str
    session: str | None
    changes: int
    at: float
    completed_at: float = 0

    @property
    def still(self) -> bool:
        """Whether nobody has changed the thread by hand since then."""
        return self.thread.changes == self.changes


class World:
    """A sidecar, its people and its disk; and what was promised to whom."""

    def __init__(self, sidecar: Sidecar, volume: Volume, tasks: Path) -> None:
        self.sidecar, self.volume, self.tasks = sidecar, volume, tasks
        self.threads = [Thread(f"thread-{number}", resource) for resource in RESOURCES for number in range(NAMES)]
        self.completed: defaultdict[str, set[Asked]] = defaultdict(set)  # by session
        self.turns: dict[str, Asked] = {}  # those whose ID was told
        self.left: set[tuple[str, str]] = set()  # resource and session where a mapping was deleted and no more
        self.disk, self.numbers, self.began = asyncio.Lock(), itertools.count(1), time.monotonic()
        self.journal: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.most = 0

    def note(self, what: str, thread: Thread | None = None, more: object = "") -> None:
        self.outcomes[what] += 1
        where = f" ({thread.resource}'s {thread.name})" if thread else ""
        self.journal.append(f"{time.monotonic() - self.began:7.2f} {what}{where} {more}")

    def ask(self, thread: Thread, how: str = "") -> Asked:
        prompt = f"No. {next(self.numbers)} of {thread.resource} on {thread.name} {how}".strip()
        return Asked(thread, prompt, thread.session, thread.changes, time.monotonic())

    async def call(self, what: str, thread: Thread, may: set[str], key: str = "", **fields: Any) -> httpx.Response:
        """Make a call, `METHOD path`, that comes to an end in time, and to one that is documented."""
        method, path = what.split()
        place = "params" if method in ("GET", "DELETE") else "json"
        keywords: dict[str, Any] = {place: {"thread_id": thread.name, "resource_id": thread.resource, **fields}}
        headers = {"accept": "application/json"} | ({"idempotency-key": key} if key else {})
        async with asyncio.timeout(BOUND):
            response = await self.sidecar.http.request(method, path, headers=headers, **keywords)
        self.answered(what, response, thread, may)
        return response

    def answered(self, what: str, response: httpx.Response, thread: Thread, may: set[str]) -> str:
        code = "" if response.is_success else response.json()["code"]
        self.note(f"{what} {response.status_code} {code}", thread)
        assert response.is_success or code in may, (what, response.text)
        return str(code)

    async def follow(self, asked: Asked, leave: int | None = None, may: set[str] = TURN, **fields: Any) -> str:
        """Ask as a stream, and leave after so many events: what has become of it."""
        thread = asked.thread
        opened = self.sidecar.stream(thread.name, asked.prompt, resource_id=thread.resource, **fields)
        async with asyncio.timeout(BOUND), opened as stream:
            if code := self.answered("stream", stream.response, thread, may):
                return code
            async for event in stream:
                if event.name == "session":
                    self.told(asked, event.data)
                if len(stream.events) == leave:
                    return "left"
        return self.ended(asked, stream.events[-1].data, stream.text)

    async def post(self, asked: Asked, key: str = "", **fields: Any) -> str:
        """Ask for one answer: what has become of it."""
        response = await self.call("POST /v1/chat", asked.thread, TURN, key, message=asked.prompt, **fields)
        if not response.is_success:
            return str(response.json()["code"])
        answer = response.json()
        self.told(asked, answer["session"])
        return self.ended(asked, {**answer["session"], **answer, "error": None}, answer["text"])

    # What holds of every answer

    def told(self, asked: Asked, session: dict[str, Any]) -> None:
        """A thread keeps the session that somebody was told, unless nothing was completed there."""
        thread, now = asked.thread, session["sdk_session_id"]
        self.turns[session["turn_id"]] = asked
        assert (session["thread_id"], session["resource_id"]) == (thread.name, thread.resource)
        assert session["origin"] == "message", session
        if asked.session is not None and asked.still:
            assert session["outcome"] in ("resumed", "restarted", "forked"), (asked, session)
            lost = [before for before in self.completed[asked.session] if before.completed_at < asked.at]
            assert now == asked.session or not lost, ("another session took the place of one with", lost, session)
        if asked.still:
            thread.session = now

    def ended(self, asked: Asked, end: dict[str, Any], text: str) -> str:
        """A turn is completed with the answer to its own prompt, or it says why not."""
        assert "status" in end, ("the stream broke off", asked, end)
        status, code = end["status"], end["error"] and end["error"]["code"]
        self.note(f"end {status} {code or ''}", asked.thread, asked.prompt)
        if status != "completed":
            assert code in STRUCK if status == "failed" else code in {None, *STOPPED}, end
            return code or str(status)
        quoted = asked.prompt if len(asked.prompt) <= QUOTED else asked.prompt[: QUOTED - 1] + "…"
        # In a turn that uses tools, the end of a task may be the last that the model hears of.
        assert text.endswith(quoted) or ("[[tool" in asked.prompt and "<task-notification>" in text), (asked, text)
        asked.completed_at = asked.completed_at or time.monotonic()
        self.completed[end["sdk_session_id"]].add(asked)
        return "completed"

    async def history(self, thread: Thread) -> list[str]:
        """The prompts in a thread's history: each once, all that was completed, in order."""
        asked = self.ask(thread)
        promised = set(self.completed[asked.session or ""])
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"next": None}
        while not found or page["has_more"]:
            after = {"after": page["next"]} if found else {}
            response = await self.call("GET /v1/session/messages", thread, GONE, limit="200", **after)
            if not response.is_success:
                assert not promised or not asked.still, (response.text, asked, promised)
                return []
            page = response.json()
            found += page["data"]
            if not page["data"]:
                break
        said = [message for message in found if message["type"] == "user" and not message["synthetic"]]
        prompts = [text for text in texts(said) if text.startswith("No. ")]
        assert all(f" of {thread.resource} " in prompt for prompt in prompts), prompts
        assert len(set(prompts)) == len(prompts), ("twice in the history", prompts)
        if asked.still:
            assert {one.prompt for one in promised} <= set(prompts), ("not in the history", asked, promised, prompts)
            placed = sorted(promised, key=lambda one: prompts.index(one.prompt))
            for earlier, later in itertools.combinations(placed, 2):
                assert later.completed_at > earlier.at, ("out of order", earlier, later)
        return prompts


# What people do


def manner(rng: random.Random) -> dict[str, Any]:
    return {
        "agent": rng.choices(("default", "other"), (6, 1))[0],
        "multitask_strategy": rng.choice(("reject", "enqueue", "enqueue", "interrupt")),
        "on_disconnect": rng.choice(("continue", "continue", "cancel")),
    }


def model(rng: random.Random) -> str:
    return rng.choices(("", "[[pace 0.05]]", "[[fail 529]]"), (12, 10, 1))[0]


async def chat(world: World, rng: random.Random, thread: Thread) -> None:
    leave = rng.choice((None, None, None, 1, rng.randint(2, 25)))
    await world.follow(world.ask(thread, model(rng)), leave, **manner(rng))


async def ask_twice(world: World, rng: random.Random, thread: Thread) -> None:
    """Lose patience with the first attempt, or not, and repeat it."""
    asked, how = world.ask(thread, model(rng)), manner(rng)
    first = asyncio.create_task(world.post(asked, asked.prompt, **how))
    await asyncio.wait([first], timeout=2 * rng.random())
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    await world.post(asked, asked.prompt, **how)


async def leave_a_task(world: World, rng: random.Random, thread: Thread) -> None:
    end = world.tasks / str(next(world.numbers))
    command = f"until [ -e {end} ]; do sleep 0.1; done; echo it is done"
    bash = json.dumps({"command": command, "run_in_background": True, "description": "wait"})
    await world.follow(world.ask(thread, f"[[tool Bash {bash}]]"), **manner(rng))
    await asyncio.sleep(2 * rng.random())
    end.touch()
    world.note("task done", thread)


async def rejoin(world: World, _: random.Random, thread: Thread) -> None:
    async with asyncio.timeout(BOUND), world.sidecar.rejoin(thread.name, resource_id=thread.resource) as stream:
        if not world.answered("rejoin", stream.response, thread, FORK | TURN) and stream.response.status_code == 200:
            async for _event in stream:
                pass
            asked = world.turns.get(stream.events[0].data["turn_id"])
            if asked is not None:
                world.ended(asked, stream.events[-1].data, stream.text)


async def read(world: World, _: random.Random, thread: Thread) -> None:
    await world.history(thread)


async def interrupt(world: World, _: random.Random, thread: Thread) -> None:
    await world.call("POST /v1/chat/interrupt", thread, GONE)


async def fork(world: World, rng: random.Random, parent: Thread) -> None:
    """All that was completed on the parent is on the branch."""
    family = [thread for thread in world.threads if thread.resource == parent.resource and thread is not parent]
    branch = rng.choice([thread for thread in family if thread.session is None] or family)
    asked, before = world.ask(branch, model(rng)), world.ask(parent)
    inherited, session = set(world.completed[before.session or ""]), None
    if rng.random() < 0.5:
        where: dict[str, Any] = {"path": "/v1/chat/fork", "from_thread_id": parent.name, **manner(rng)}
        code = await world.follow(asked, rng.choice((None, None, 3)), FORK | TURN, **where)
        session = next((name for name, said in world.completed.items() if asked in said), None)
    else:
        response = await world.call("POST /v1/chat/fork", branch, FORK, from_thread_id=parent.name)
        code, session = response.json().get("code"), response.json().get("sdk_session_id")
        if session and asked.still:
            branch.session = session
    if before.still:
        assert not inherited or code not in NOTHING_TO_FORK, (code, inherited)
        if session:
            world.completed[session] |= inherited


async def delete(world: World, rng: random.Random, thread: Thread) -> None:
    how = {"force": rng.choice(("true", "false")), "transcript": rng.choice(("keep", "keep", "delete"))}
    session = thread.session
    thread.change()
    response = await world.call("DELETE /v1/session", thread, {"thread_busy"}, **how)
    thread.change()
    if response.is_success and session is not None and how["transcript"] == "keep":
        world.left.add((thread.resource, session))


async def adopt(world: World, rng: random.Random, thread: Thread) -> None:
    mine = sorted(session for resource, session in world.left if resource == thread.resource)
    if mine:
        session, changes = rng.choice(mine), thread.changes
        response = await world.call("PUT /v1/session", thread, ADOPT, sdk_session_id=session)
        if response.status_code == 201:
            world.left.discard((thread.resource, session))
            thread.change(session if thread.changes == changes else None)


async def rename(world: World, _: random.Random, thread: Thread) -> None:
    await world.call("PATCH /v1/session", thread, GONE | {"thread_busy", "not_saved"}, title="A title")


async def warm(world: World, _: random.Random, thread: Thread) -> None:
    await world.call("POST /v1/session/warm", thread, GONE)


# What bad days do


async def strike(world: World, rng: random.Random, _: Thread) -> None:
    number, processes = rng.choice((signal.SIGKILL, signal.SIGSTOP)), world.sidecar.cli_processes()
    if processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid := rng.choice(processes), number)
            world.note(number.name, more=pid)


async def fill_the_disk(world: World, rng: random.Random, _: Thread) -> None:
    async with world.disk:
        world.volume.fill()
        world.note("the disk is full")
        await asyncio.sleep(2 * rng.random())
        world.volume.free()
        world.note("it is not")


ACTIONS: dict[Callable[[World, random.Random, Thread], Awaitable[None]], float] = {
    chat: 32, ask_twice: 8, leave_a_task: 5, rejoin: 5, read: 8, interrupt: 5, fork: 8, delete: 3, adopt: 4,
    rename: 3, warm: 4, strike: 3, fill_the_disk: 0.7,
}  # fmt: skip


async def work(world: World, rng: random.Random, until: float) -> None:
    while time.monotonic() < until:
        (action,) = rng.choices(list(ACTIONS), list(ACTIONS.values()))
        await action(world, rng, rng.choice(world.threads))


# What holds all along, and in the end


async def processes_are_bounded(world: World) -> None:
    while True:
        world.most = max(world.most, len(found := world.sidecar.cli_processes()))
        assert len(found) <= MOST_PROCESSES, found
        await asyncio.sleep(0.3)


async def every_thread_takes_a_message(world: World) -> None:
    for thread in world.threads:
        async with asyncio.timeout(BOUND):  # a CLI that is stopped may cost a turn
            while await world.post(world.ask(thread), multitask_strategy="enqueue") != "completed":
                await world.sidecar.settle()
    async with asyncio.timeout(SECONDS):
        while len(world.sidecar.cli_processes()) > MOST_KEPT:
            await world.sidecar.settle()
    assert (await world.sidecar.http.get("/readyz")).status_code == 200


async def a_restart_changes_nothing(world: World) -> None:
    async def everything() -> list[object]:
        mappings = (await world.sidecar.http.get("/v1/sessions", params={"limit": "200"})).json()["data"]
        return [mappings, [await world.history(thread) for thread in world.threads]]

    before, processes = await everything(), world.sidecar.cli_processes()
    assert await world.sidecar.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert await gone(processes, 0)
    assert not running(world.tasks)
    for thread in world.threads:
        # What a full disk has not taken is missing; that nothing told as completed is, the history has shown.
        entries = read_entries(world.sidecar.transcript(thread.session or ""))
        parents = [entry.get("parentUuid") for entry in entries if "uuid" in entry]
        assert len(set(parents)) == len(parents) > 0, ("not one chain", thread)
    await world.sidecar.restart()
    assert await everything() == before


@pytest.mark.long
async def test_two_minutes_of_everything_at_once(a_sidecar: Make, tmp_path: Path) -> None:
    (tmp_path / "agents.toml").write_text(AGENTS)
    (tmp_path / "tasks").mkdir()
    options = ("--agents", str(tmp_path / "agents.toml"))
    with mounted(tmp_path / "home" / "claude", 64) as volume:
        async with a_sidecar(*options, **SETTINGS) as sidecar:
            world = World(sidecar, volume, tmp_path / "tasks")
            rngs = [random.Random(f"{SEED}-{number}") for number in range(WORKERS)]
            try:
                async with asyncio.TaskGroup() as group:
                    watching = group.create_task(processes_are_bounded(world))
                    until = world.began + LASTS
                    await asyncio.gather(*(group.create_task(work(world, rng, until)) for rng in rngs))
                    await every_thread_takes_a_message(world)
                    watching.cancel()
                await a_restart_changes_nothing(world)
            finally:  # shown if it fails
                print(f"STATE_MACHINE_SEED={SEED}; at most {world.most} processes", *world.journal, sep="\n")
                print(*(f"{number:5} {what}" for what, number in sorted(world.outcomes.items())), sep="\n")
                print(*(line for line in sidecar.log if '"level": "info"' not in line), sep="")
            errors = [line for line in sidecar.log if '"level": "error"' in line]
            assert not [line for line in errors if not any(words in line for words in EXPLAINED)]
            assert sum(map(len, world.completed.values())) > 100, "too little was done to say anything"
