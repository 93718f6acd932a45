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
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.offline.model import QUOTED
from tests.server import SECONDS, Sidecar, chain, gone, running
from tests.transcripts import texts
from tests.volume import Volume, mounted

Make = Callable[..., Sidecar]

SEED = int(os.environ.get("STATE_MACHINE_SEED", "20261121"))
LASTS = 120.0  # seconds
WORKERS, RESOURCES, NAMES = 6, ("alice", "bob"), 5
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
# Turns have a process each, what is kept and the spares of two agents too; as many as are kept can be on their way out,
# and one be warmed up.
MOST_KEPT = WARM + 2 * SPARES
MOST_PROCESSES = MOST_TURNS + 2 * MOST_KEPT + 1
BOUND = 90.0  # seconds for any one call: a few stopped CLIs, each as long as the settings allow, one after the other

KILLED = "Fatal error in message reader: Command failed with exit code -"  # the SDK's word for a CLI that was struck

BUSY = {(409, "thread_busy")}
GONE = {(404, "session_not_found"), (410, "session_missing")}
FULL = {(507, "not_saved")}
TURN = (
    BUSY
    | FULL
    | {(409, "turn_interrupted"), (409, "thread_deleted"), (410, "replay_gone"), (429, "queue_full")}
    | {(502, "agent_failed"), (502, "agent_start_failed"), (503, "too_many_turns"), (504, "turn_timeout")}
    | {(404, "session_not_found"), (502, "api_error")}
)
NOTHING_TO_FORK = GONE | {(422, "unsafe_fork_point"), (422, "message_not_found")}
FORK = NOTHING_TO_FORK | BUSY | FULL | {(409, "thread_exists"), (503, "too_many_turns")}


@dataclass(eq=False)
class Thread:
    """A thread, and the newest session ID that anybody was told of it."""

    name: str
    resource: str
    session: str | None = None
    changes: int = 0  # by hand: what was told before then says nothing any more

    @property
    def key(self) -> dict[str, str]:
        return {"thread_id": self.name, "resource_id": self.resource}

    @property
    def known(self) -> tuple[str | None, int]:
        return self.session, self.changes

    def change(self, session: str | None = None) -> None:
        self.session = session
        self.changes += 1


@dataclass(frozen=True)
class Asked:
    """What was said where and when, and what was known of the thread then."""

    thread: Thread
    prompt: str
    known: tuple[str | None, int]
    at: float


@dataclass(frozen=True)
class Said:
    """A turn that somebody was told is completed."""

    prompt: str
    asked: float
    ended: float


class World:
    """A sidecar, its people and its disk; and what has been promised to whom."""

    def __init__(self, sidecar: Sidecar, volume: Volume, tasks: Path) -> None:
        self.sidecar, self.volume, self.tasks = sidecar, volume, tasks
        self.threads = [Thread(f"thread-{number}", resource) for resource in RESOURCES for number in range(NAMES)]
        self.completed: defaultdict[str, dict[str, Said]] = defaultdict(dict)  # by session, by prompt
        self.turns: dict[str, Asked] = {}  # those whose ID was told
        self.left: list[tuple[str, str]] = []  # resources and sessions whose mapping was deleted, and they were not
        self.numbers = itertools.count(1)
        self.disk = asyncio.Lock()
        self.journal: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.most = 0
        self._began = time.monotonic()

    def note(self, action: str, outcome: object, thread: Thread | None = None, more: object = "") -> None:
        self.outcomes[f"{action}: {outcome}"] += 1
        where = f"{thread.name} of {thread.resource}" if thread else ""
        self.journal.append(f"{time.monotonic() - self._began:7.2f} {action} {where}: {outcome} {more}")

    def ask(self, thread: Thread, more: str = "") -> Asked:
        """Something to say that nobody has said before."""
        prompt = f"No. {next(self.numbers)} of {thread.resource} on {thread.name}{more}"
        return Asked(thread, prompt, thread.known, time.monotonic())

    async def call(
        self, method: str, path: str, thread: Thread, allowed: set[tuple[int, str]], **fields: Any
    ) -> httpx.Response:
        """Make a call that comes to a documented end within its bound."""
        place = "params" if method in ("GET", "DELETE") else "json"
        keywords: dict[str, Any] = {place: {**thread.key, **fields}}
        async with asyncio.timeout(BOUND):
            response = await self.sidecar.http.request(method, path, **keywords)
        self.answered(f"{method} {path}", response, thread, allowed)
        return response

    def answered(
        self, action: str, response: httpx.Response, thread: Thread, allowed: set[tuple[int, str]]
    ) -> tuple[int, str]:
        """The status and code of an answer, which is one of those that are documented."""
        outcome = (response.status_code, "" if response.is_success else response.json()["code"])
        self.note(action, f"{outcome[0]} {outcome[1]}".strip(), thread)
        assert response.is_success or outcome in allowed, (action, response.text)
        return outcome

    # What holds of every answer

    def told(self, asked: Asked, session: dict[str, Any]) -> None:
        """A thread keeps the session that somebody was told, unless nothing was ever completed there."""
        thread, (before, changes) = asked.thread, asked.known
        now = session["sdk_session_id"]
        self.turns[session["turn_id"]] = asked
        assert {name: session[name] for name in thread.key} == thread.key
        assert session["origin"] == "message", session
        if thread.changes != changes:
            return  # by somebody else, meanwhile
        if before is not None:
            assert session["outcome"] in ("resumed", "restarted", "forked"), (before, session)
            lost = [said for said in self.completed[before].values() if said.ended < asked.at]
            assert now == before or not lost, ("another session took the place of one with", lost, session)
        thread.session = now

    def ended(self, asked: Asked, session: str, status: str, code: str | None, text: str) -> None:
        """A turn's end: completed with the answer to its own prompt, or with a reason."""
        self.note("end", code or status, asked.thread, asked.prompt)
        if status != "completed":
            assert (status, code) != ("failed", None)
            assert code in {None, *(name for _, name in TURN)}, code
            return
        prompt = asked.prompt
        quoted = prompt if len(prompt) <= QUOTED else prompt[: QUOTED - 1] + "…"
        # What a task in the background has to say may be the last that the model hears in a turn that uses tools.
        assert text.endswith(quoted) or ("[[tool" in prompt and "<task-notification>" in text), (prompt, text)
        self.completed[session].setdefault(prompt, Said(prompt, asked.at, time.monotonic()))

    async def follow(self, asked: Asked, allowed: set[tuple[int, str]], leave: int | None, **fields: Any) -> bool:
        """Ask as a stream, and leave after so many events; whether it has completed."""
        thread = asked.thread
        stream_of = self.sidecar.stream(thread.name, asked.prompt, resource_id=thread.resource, **fields)
        async with asyncio.timeout(BOUND), stream_of as stream:
            if self.answered("stream", stream.response, thread, allowed)[0] != 200:
                return False
            async for event in stream:
                if event.name == "session":
                    self.told(asked, event.data)
                if len(stream.events) == leave:
                    self.note("leave", "", thread, asked.prompt)
                    return False
            end = stream.events[-1].data
        assert end["type"] == "end", ("the stream broke off", asked, [event.name for event in stream.events])
        self.ended(asked, end["sdk_session_id"], end["status"], (end["error"] or {}).get("code"), stream.text)
        return bool(end["status"] == "completed")

    async def post(self, asked: Asked, key: str | None = None, **fields: Any) -> bool:
        """Ask for one answer; whether it has completed."""
        thread = asked.thread
        async with asyncio.timeout(BOUND):
            response = await self.sidecar.chat(
                thread.name, asked.prompt, resource_id=thread.resource, idempotency_key=key, **fields
            )
        if self.answered("post", response, thread, TURN)[0] != 200:
            return False
        answer = response.json()
        self.told(asked, answer["session"])
        self.ended(asked, answer["session"]["sdk_session_id"], answer["status"], None, answer["text"])
        return bool(answer["status"] == "completed")

    async def history(self, thread: Thread) -> list[str] | None:
        """The prompts in a thread's history: each once, all that was completed, in order. None if it has no session."""
        (session, changes), at = thread.known, time.monotonic()
        promised = [said for said in self.completed[session or ""].values() if said.ended < at]
        found: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        while True:
            page = await self.call("GET", "/v1/session/messages", thread, GONE, limit="200", **after)
            if page.status_code != 200:
                assert not promised or thread.changes != changes, (page.text, promised)
                return None
            found += page.json()["data"]
            if not page.json()["has_more"]:
                break
            after = {"after": page.json()["next"]}
        said = [message for message in found if message["type"] == "user" and not message["synthetic"]]
        prompts = [text for text in texts(said) if text.startswith("No. ")]
        if thread.changes != changes:
            return prompts
        assert all(f" of {thread.resource} " in prompt for prompt in prompts), prompts
        assert len(set(prompts)) == len(prompts), ("twice in the history", prompts)
        assert {said.prompt for said in promised} <= set(prompts), (thread, session, promised, prompts)
        placed = sorted(promised, key=lambda said: prompts.index(said.prompt))
        for earlier, later in itertools.combinations(placed, 2):
            assert later.ended > earlier.asked, ("out of order", earlier, later)
        return prompts


Action = Callable[[World, random.Random, Thread], Awaitable[None]]


# What people do


def way(rng: random.Random) -> dict[str, str]:
    """How a turn is asked for."""
    return {
        "agent": rng.choices(("default", "other"), (6, 1))[0],
        "multitask_strategy": rng.choice(("reject", "enqueue", "enqueue", "interrupt")),
        "on_disconnect": rng.choice(("continue", "continue", "cancel")),
    }


def manner(rng: random.Random) -> str:
    """How it is answered."""
    return rng.choices(("", " [[pace 0.05]]", " [[fail 529]]"), (6, 5, 0.3))[0]


async def chat(world: World, rng: random.Random, thread: Thread) -> None:
    leave = rng.choice((None, None, None, 1, rng.randint(2, 25)))
    await world.follow(world.ask(thread, manner(rng)), TURN, leave, **way(rng))


async def ask_once(world: World, rng: random.Random, thread: Thread) -> None:
    await world.post(world.ask(thread, manner(rng)), **way(rng))


async def ask_again(world: World, rng: random.Random, thread: Thread) -> None:
    """Lose patience, and send it once more under its key."""
    asked, fields = world.ask(thread, manner(rng)), way(rng)
    first = asyncio.create_task(world.post(asked, asked.prompt, **fields))
    await asyncio.wait([first], timeout=rng.random())
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    await world.post(asked, asked.prompt, **fields)


async def leave_a_task(world: World, rng: random.Random, thread: Thread) -> None:
    end = world.tasks / str(next(world.numbers))
    command = f"until [ -e {end} ]; do sleep 0.1; done; echo it is done"
    bash = {"command": command, "run_in_background": True, "description": "wait"}
    await world.follow(world.ask(thread, f" [[tool Bash {json.dumps(bash)}]]"), TURN, None, **way(rng))
    await asyncio.sleep(2 * rng.random())
    end.touch()
    world.note("task", "done", thread)


async def rejoin(world: World, rng: random.Random, thread: Thread) -> None:
    stream_of = world.sidecar.rejoin(thread.name, resource_id=thread.resource)
    async with asyncio.timeout(BOUND), stream_of as stream:
        if world.answered("rejoin", stream.response, thread, {(410, "replay_gone"), *TURN})[0] != 200:
            return
        await stream.until("session")
        async for event in stream:
            if event.name == "end":
                break
    session, end = stream.events[0].data, stream.events[-1].data
    asked = world.turns.get(session["turn_id"])
    assert end["type"] == "end", session
    if asked is not None:
        world.ended(asked, end["sdk_session_id"], end["status"], (end["error"] or {}).get("code"), stream.text)


async def read(world: World, rng: random.Random, thread: Thread) -> None:
    await world.history(thread)


async def interrupt(world: World, rng: random.Random, thread: Thread) -> None:
    await world.call("POST", "/v1/chat/interrupt", thread, GONE)


async def fork(world: World, rng: random.Random, parent: Thread) -> None:
    """With a message or without one; all that was completed on the parent is then on the branch."""
    family = [thread for thread in world.threads if thread.resource == parent.resource and thread is not parent]
    thread = rng.choice([thread for thread in family if thread.session is None] or family)
    asked, known = world.ask(thread, manner(rng)), parent.known
    inherited = dict(world.completed[parent.session or ""])
    allowed = FORK if not inherited else FORK - NOTHING_TO_FORK
    if rng.random() < 0.5:
        fields = {"path": "/v1/chat/fork", "from_thread_id": parent.name}
        leave = rng.choice((None, None, 3))
        forked = await world.follow(asked, FORK | TURN, leave, **fields, **way(rng))
        session = next((name for name, said in world.completed.items() if forked and asked.prompt in said), None)
    else:
        response = await world.call("POST", "/v1/chat/fork", thread, FORK, from_thread_id=parent.name)
        session = response.json()["sdk_session_id"] if response.status_code == 201 else None
        if session is None and parent.known == known:
            assert (response.status_code, response.json()["code"]) in allowed, (response.text, inherited)
        if session is not None and thread.changes == asked.known[1]:
            thread.session = session
    if session is not None and parent.known == known:
        world.completed[session].update(inherited)


async def delete(world: World, rng: random.Random, thread: Thread) -> None:
    query = {"force": rng.choice(("true", "false")), "transcript": rng.choice(("keep", "delete"))}
    session = thread.session
    thread.change()
    response = await world.call("DELETE", "/v1/session", thread, BUSY | FULL, **query)
    thread.change()
    if response.status_code == 204 and session is not None and query["transcript"] == "keep":
        world.left.append((thread.resource, session))


async def adopt(world: World, rng: random.Random, thread: Thread) -> None:
    """Take up a session whose mapping was deleted."""
    mine = [session for resource, session in world.left if resource == thread.resource]
    if not mine:
        return
    session = rng.choice(mine)
    known = thread.known
    taken = {(409, "thread_exists"), (409, "session_taken"), (409, "session_busy"), (410, "session_missing")}
    response = await world.call("PUT", "/v1/session", thread, BUSY | taken, sdk_session_id=session)
    if response.status_code == 201:
        world.left.remove((thread.resource, session))
        thread.change(session if thread.changes == known[1] else None)


async def rename(world: World, rng: random.Random, thread: Thread) -> None:
    await world.call("PATCH", "/v1/session", thread, BUSY | FULL | GONE, title=f"Title {next(world.numbers)}")


async def warm(world: World, rng: random.Random, thread: Thread) -> None:
    await world.call("POST", "/v1/session/warm", thread, GONE)


# What bad days do


async def strike(world: World, rng: random.Random, _: Thread) -> None:
    """kill -9 a CLI, or stop it."""
    processes = world.sidecar.cli_processes()
    number = rng.choice((signal.SIGKILL, signal.SIGSTOP))
    if processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid := rng.choice(processes), number)
            world.note("strike", number.name, more=pid)


async def fill_the_disk(world: World, rng: random.Random, _: Thread) -> None:
    async with world.disk:
        world.volume.fill()
        world.note("disk", "full")
        await asyncio.sleep(2 * rng.random())
        world.volume.free()
        world.note("disk", "free")


ACTIONS: dict[Action, float] = {
    chat: 30, ask_once: 6, ask_again: 5, leave_a_task: 5, rejoin: 5, read: 8, interrupt: 5, fork: 8, delete: 4,
    adopt: 4, rename: 3, warm: 4, strike: 3, fill_the_disk: 0.7,
}  # fmt: skip


# What holds all along, and in the end


async def bounded_processes(world: World) -> None:
    while True:
        world.most = max(world.most, len(processes := world.sidecar.cli_processes()))
        assert len(processes) <= MOST_PROCESSES, processes
        await asyncio.sleep(0.3)


async def takes_a_message(world: World, thread: Thread) -> None:
    """Nobody has the thread for good. A CLI that was stopped may cost a turn."""
    async with asyncio.timeout(BOUND):
        while not await world.post(world.ask(thread), multitask_strategy="enqueue"):
            await world.sidecar.settle()


async def at_rest(world: World) -> None:
    async with asyncio.timeout(SECONDS):
        while len(world.sidecar.cli_processes()) > MOST_KEPT:
            await world.sidecar.settle()


def one_chain_each(world: World) -> None:
    for thread in world.threads:
        assert thread.session is not None
        assert chain(world.sidecar.transcript(thread.session))


async def everything(world: World) -> list[object]:
    """All mappings and all histories."""
    mappings = (await world.sidecar.http.get("/v1/sessions", params={"limit": "200"})).json()["data"]
    return [mappings, [await world.history(thread) for thread in world.threads]]


async def work(world: World, rng: random.Random, until: float) -> None:
    while time.monotonic() < until:
        (action,) = rng.choices(list(ACTIONS), list(ACTIONS.values()))
        await action(world, rng, rng.choice(world.threads))


@contextlib.asynccontextmanager
async def watched(world: World) -> AsyncIterator[None]:
    """Tell on failure what was done, and what the log says of it."""
    try:
        yield
    finally:
        print(f"STATE_MACHINE_SEED={SEED}, at most {world.most} processes", *world.journal, sep="\n")
        print(*(f"{number:5} {outcome}" for outcome, number in sorted(world.outcomes.items())), sep="\n")
        print(*(line for line in world.sidecar.log if '"level": "info"' not in line), sep="")


@pytest.mark.long
async def test_two_minutes_of_everything_at_once(a_sidecar: Make, tmp_path: Path) -> None:
    (tmp_path / "agents.toml").write_text(AGENTS)
    (tasks := tmp_path / "tasks").mkdir()
    rng = random.Random(SEED)
    with mounted(tmp_path / "home" / "claude", 64) as volume:
        async with a_sidecar("--agents", str(tmp_path / "agents.toml"), **SETTINGS) as sidecar:
            world = World(sidecar, volume, tasks)
            async with watched(world):
                async with asyncio.TaskGroup() as group:
                    watching = group.create_task(bounded_processes(world))
                    until = time.monotonic() + LASTS
                    rngs = [random.Random(rng.random()) for _ in range(WORKERS)]
                    await asyncio.gather(*(group.create_task(work(world, rng, until)) for rng in rngs))
                    for thread in world.threads:
                        await takes_a_message(world, thread)
                    await at_rest(world)
                    watching.cancel()
                assert (await sidecar.http.get("/readyz")).status_code == 200
                before = await everything(world)
                processes = sidecar.cli_processes()
                assert await sidecar.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
                assert await gone(processes, 0)
                assert not running(tasks)
                one_chain_each(world)
                await sidecar.restart()
                assert await everything(world) == before
                errors = [line for line in sidecar.log if '"level": "error"' in line]
                assert not [line for line in errors if KILLED not in line]
                assert sum(map(len, world.completed.values())) > 100, "too little was done to say anything"
