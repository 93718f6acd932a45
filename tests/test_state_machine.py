"""Two minutes of all that people and bad days do to a sidecar, at random and many at once: what it promises holds.

The seed gives every worker its choices; how they meet is the machine's. `STATE_MACHINE_SEED` names another one.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from session_sidecar.agent.transcripts.reading.chain import read_entries
from tests.promises import ADOPT, BOUND, FORK, GONE, NOTHING_TO_FORK, TURN, People, Thread
from tests.server import SECONDS, Sidecar, a_moment, gone, running
from tests.volume import Volume, mounted

Make = Callable[..., Sidecar]

SEED = int(os.environ.get("STATE_MACHINE_SEED", "20261121"))
LASTS = 120.0  # seconds
WORKERS = 6
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

EXPLAINED = ("Fatal error in message reader: Command failed with exit code", "No space left on device")


class World(People):
    """A sidecar, its people, its disk and what its agents work on."""

    def __init__(self, sidecar: Sidecar, volume: Volume, tasks: Path) -> None:
        super().__init__(sidecar)
        self.volume, self.tasks, self.disk, self.most = volume, tasks, asyncio.Lock(), 0


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
        if (
            not world.answered("rejoin", stream.response, thread, (FORK | TURN) - {"thread_exists"})
            and stream.response.status_code == 200
        ):
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
    branch = rng.choice(world.free(parent) or world.threads)
    if branch.resource != parent.resource:
        return
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
    """Take up again, where there is room, what was deleted."""
    mine = sorted(session for resource, session in world.left if resource == thread.resource)
    thread = rng.choice([*world.free(thread), thread])
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
    chat: 32, ask_twice: 8, leave_a_task: 5, rejoin: 5, read: 8, interrupt: 5, fork: 8, delete: 6, adopt: 5,
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
                await a_moment()
    async with asyncio.timeout(SECONDS):
        while len(world.sidecar.cli_processes()) > MOST_KEPT:
            await a_moment()
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
        # Beside the chain may lie what a full disk has parted from it: an answer without its prompt, or the note on an
        # API error without the answer to it. The CLI goes on from what was there before. What the disk has taken only a
        # part of it writes again, so an entry may be there twice.
        parents = {entry["uuid"]: entry.get("parentUuid") for entry in entries if entry["type"] == "user"}
        assert len(set(parents.values())) == len(parents) > 0, ("two prompts follow one message: one is lost", thread)
    await world.sidecar.restart()
    assert await everything() == before


@pytest.mark.long
@pytest.mark.quiet
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
            assert sum(map(len, world.completed.values())) > 50, "too little was done to say anything"
