"""Whatever hangs, every turn ends: by its deadline, by an interrupt, with its thread, with the sidecar."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.modes import KEPT
from tests.server import SECONDS, Sidecar, a_moment, gone

Make = Callable[..., Sidecar]

CODE = """
import asyncio, time
from session_sidecar.agent.agents import safe_options
{function}
    if 'hangs' in key.thread_id:
        {hang}
    return safe_options()
"""
HANGS = {
    "a function that blocks": CODE.format(function="def options(key, name):", hang="time.sleep(3600)"),
    "a function that waits": CODE.format(function="async def options(key, name):", hang="await asyncio.sleep(3600)"),
}


@pytest.fixture(params=[pytest.param(text, id=name) for name, text in HANGS.items()])
def hanging(request: pytest.FixtureRequest, a_sidecar: Make, tmp_path: Path) -> Callable[..., Sidecar]:
    """A sidecar whose operator's function does not return for some threads."""
    (tmp_path / "hanging.py").write_text(request.param)
    return lambda **env: a_sidecar("--agents", "hanging:options", PYTHONPATH=path(tmp_path), **env)


def path(more: Path) -> str:
    return os.pathsep.join([str(more), *filter(None, [os.environ.get("PYTHONPATH")])])


async def asked(sidecar: Sidecar, thread: str) -> None:
    """See that a turn which has just been asked for is on its thread."""
    await sidecar.settle()
    assert (await sidecar.chat(thread, "Another")).status_code == 409


async def test_a_turn_whose_agent_is_never_told_can_be_stopped_in_every_way(
    hanging: Callable[..., Sidecar], thread: str
) -> None:
    async with hanging(**KEPT) as sidecar:
        for stop in ("interrupt", "supersede", "force", "leave"):
            name = f"{thread}-{stop}-hangs"
            fields = {"on_disconnect": "cancel"} if stop == "leave" else {}
            waiting = asyncio.create_task(sidecar.chat(name, "Hello", **fields))
            await asked(sidecar, name)
            assert await sidecar.say(thread, "Hello")  # the others are not held up
            if stop == "interrupt":
                assert (await sidecar.post("/v1/chat/interrupt", name)).json()["status"] == "interrupted"
            elif stop == "supersede":
                again = asyncio.create_task(sidecar.chat(name, "Rather this", multitask_strategy="interrupt"))
                await waiting
                await sidecar.post("/v1/chat/interrupt", name)
                await again
            elif stop == "force":
                query = {"thread_id": name, "resource_id": "alice", "force": "true"}
                assert (await sidecar.http.delete("/v1/session", params=query)).status_code == 204
            else:
                waiting.cancel()
            if stop != "leave":
                assert (await waiting).json()["code"] in ("turn_interrupted", "thread_deleted")
            await sidecar.until_logged("turn", thread_id=name)
            assert (await sidecar.session(name)).status_code == 404


async def test_it_ends_at_its_deadline(hanging: Callable[..., Sidecar], thread: str) -> None:
    for limit in ("SIDECAR_TURN_SECONDS", "SIDECAR_TURN_IDLE_SECONDS"):
        async with hanging(**{limit: "0.5"}) as sidecar:
            response = await sidecar.chat(f"{thread}-hangs", "Hello")
            assert (response.status_code, response.json()["code"]) == (504, "turn_timeout")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_shutdown_does_not_wait_for_it(
    hanging: Callable[..., Sidecar], thread: str, number: signal.Signals
) -> None:
    async with hanging() as sidecar:
        waiting = asyncio.create_task(sidecar.chat(f"{thread}-hangs", "Hello"))
        await asked(sidecar, f"{thread}-hangs")
        began = time.monotonic()
        sidecar.process.send_signal(number)
        assert (await waiting).json()["code"] == "shutting_down"
        await sidecar.wait()
        assert time.monotonic() - began < 10


@pytest.mark.long
@pytest.mark.quiet
async def test_a_message_does_not_wait_for_a_hundred_hints(a_sidecar: Make, thread: str, model: FaultyModel) -> None:
    async with a_sidecar(SIDECAR_WARM_SESSIONS="8") as sidecar:
        await sidecar.say(thread, "My name is Ada")
        kept = await sidecar.process_of(thread)
        names = [f"{thread}-{number}" for number in range(110)]
        for name in names:
            assert (await sidecar.post("/v1/chat/fork", name, from_thread_id=thread)).status_code == 201
        hints = [sidecar.post("/v1/session/warm", name) for name in names[:-1]]
        assert {response.status_code for response in await asyncio.gather(*hints)} == {202}
        assert (await sidecar.post("/v1/session/warm", names[-1])).status_code == 202
        assert await sidecar.say(f"{thread}-new", "Hello")
        alone = (await sidecar.until_logged("turn", thread_id=thread))["ms"]["first_delta"]
        beside = (await sidecar.until_logged("turn", thread_id=f"{thread}-new"))["ms"]["first_delta"]
        # The hints may take one of two cores; where a start takes seconds by itself, others use the machine.
        assert beside < max(2000, 3 * alone)
        async with asyncio.timeout(SECONDS):  # there is room for six hints beside the two threads that were spoken to
            while len(sidecar.cli_processes()) < 8:
                await a_moment()
        assert not await gone([kept], 0), "a hint has taken the place of a thread in use"
        await sidecar.process_of(names[-1])  # the newest hint has one
