"""What an agent's tools have started ends with its process, however it was started and however the process ends."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.modes import COLD, WARM
from tests.server import SECONDS, Sidecar, gone, running
from tests.transcripts import AGENTS

Make = Callable[..., Sidecar]

WAYS = {
    "in the foreground": "sh {beat}",
    "in the foreground without the environment": "env -i sh {beat}",
    "in the background": "sh {beat} &",
    "orphaned": "(sh {beat} &)",
    "in a session of its own": "setsid nohup sh {beat} > /dev/null 2>&1 &",
    "as a daemon": "setsid sh -c '(setsid sh {beat} < /dev/null > /dev/null 2>&1 &)'",
}
in_every_way = pytest.mark.parametrize("command", [pytest.param(text, id=name) for name, text in WAYS.items()])


class Beat:
    """A program that writes to a file for as long as it lives."""

    def __init__(self, directory: Path) -> None:
        self.script, self.file = directory / "beat.sh", directory / "beats"
        self.script.write_text(f"while :; do echo beat >> {self.file}; sleep 0.02; done\n")

    def prompt(self, command: str) -> str:
        """A prompt that has it started by this command, in which `{beat}` is its path."""
        return "[[tool Bash {}]]".format(json.dumps({"command": command.format(beat=self.script)}))

    async def started(self, sidecar: Sidecar) -> list[int]:
        """Wait until it writes; its processes, and the shells that have it in their command line."""
        async with asyncio.timeout(SECONDS):
            while not self.file.exists():
                await sidecar.settle()
        return running(self.script)


@pytest.fixture
def beat(tmp_path: Path) -> Iterator[Beat]:
    beat = Beat(tmp_path)
    yield beat
    for pid in running(beat.script):  # only where a test has failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """An agents file whose agent `tools` has Bash."""
    path = tmp_path / "agents.toml"
    path.write_text(AGENTS)
    return path


@pytest.fixture
async def sidecar(a_sidecar: Make, model: FaultyModel, agents: Path) -> AsyncIterator[Sidecar]:
    """A sidecar that keeps no process and is soon out of patience."""
    async with a_sidecar("--agents", str(agents), **COLD, SIDECAR_INTERRUPT_SECONDS="0.5") as sidecar:
        yield sidecar


def signal_clis(sidecar: Sidecar, number: signal.Signals) -> None:
    for pid in sidecar.cli_processes():
        os.kill(pid, number)


async def ended(sidecar: Sidecar, thread: str, beat: Beat, processes: list[int]) -> bool:
    """Whether all of it was over when the thread was free again."""
    await sidecar.until_logged("turn", thread_id=thread)
    return await gone(processes, 0) and running(beat.script) == []


@in_every_way
async def test_they_end_with_an_interrupted_turn(sidecar: Sidecar, thread: str, beat: Beat, command: str) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beat.prompt(f"{command}\nsleep 60"), agent="tools"))
    processes = await beat.started(sidecar)
    await sidecar.post("/v1/chat/interrupt", thread)
    assert (await asking).json()["status"] == "interrupted"
    assert await ended(sidecar, thread, beat, processes)


async def test_they_end_with_a_completed_turn_whose_process_is_not_kept(
    sidecar: Sidecar, thread: str, beat: Beat
) -> None:
    await sidecar.say(thread, beat.prompt(WAYS["as a daemon"]), agent="tools")
    assert await ended(sidecar, thread, beat, await beat.started(sidecar))


@pytest.mark.long
@in_every_way
async def test_they_end_with_a_cli_that_is_stopped(sidecar: Sidecar, thread: str, beat: Beat, command: str) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beat.prompt(f"{command}\nsleep 60"), agent="tools"))
    processes = await beat.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)
    await sidecar.post("/v1/chat/interrupt", thread)
    await asking
    assert await ended(sidecar, thread, beat, processes)
    assert sidecar.logged("turn", thread_id=thread)[0]["exit"] == -signal.SIGKILL
    assert await sidecar.say(thread, "Go on", agent="tools")


@pytest.mark.long
async def test_they_end_with_a_cli_that_is_stopped_and_comes_to_its_deadline(
    a_sidecar: Make, agents: Path, thread: str, beat: Beat
) -> None:
    patience = {"SIDECAR_INTERRUPT_SECONDS": "0.5", "SIDECAR_TURN_IDLE_SECONDS": "10"}
    async with a_sidecar("--agents", str(agents), **COLD, **patience) as sidecar:
        async with sidecar.stream(thread, beat.prompt(WAYS["in the foreground"]), agent="tools") as stream:
            processes = await beat.started(sidecar)
            signal_clis(sidecar, signal.SIGSTOP)
            assert (await stream.rest())[-1].data["error"]["code"] == "turn_timeout"
        assert await ended(sidecar, thread, beat, processes)


@pytest.mark.long
@in_every_way
async def test_they_end_with_a_cli_that_somebody_kills(sidecar: Sidecar, thread: str, beat: Beat, command: str) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beat.prompt(f"{command}\nsleep 60"), agent="tools"))
    processes = await beat.started(sidecar)
    signal_clis(sidecar, signal.SIGKILL)
    await asking
    assert await ended(sidecar, thread, beat, processes)


@pytest.mark.long
async def test_they_end_with_a_thread_that_is_deleted_by_force(sidecar: Sidecar, thread: str, beat: Beat) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beat.prompt(WAYS["in the background"]), agent="tools"))
    processes = await beat.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)
    params = {"thread_id": thread, "resource_id": "alice", "force": "true", "transcript": "delete"}
    assert (await sidecar.http.delete("/v1/session", params=params)).status_code == 200
    assert await gone(processes, 0)
    assert running(beat.script) == []
    await asking


@pytest.mark.long
@in_every_way
async def test_they_end_with_a_sidecar_that_is_asked_to(
    sidecar: Sidecar, thread: str, beat: Beat, command: str
) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beat.prompt(f"{command}\nsleep 60"), agent="tools"))
    processes = await beat.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)
    await sidecar.stop(signal.SIGTERM)
    assert await gone(processes, 0)
    assert running(beat.script) == []
    await asyncio.wait([asking])


@in_every_way
async def test_they_end_when_a_sidecar_that_was_killed_is_started_again(
    sidecar: Sidecar, thread: str, beat: Beat, command: str
) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beat.prompt(f"{command}\nsleep 60"), agent="tools"))
    processes = await beat.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)  # one that runs ends most of them itself, when it hears of its parent's end
    await sidecar.stop(signal.SIGKILL)
    await asyncio.wait([asking])
    assert not await gone(processes, 0)
    await sidecar.restart()
    assert await gone(processes, 0)
    assert running(beat.script) == []


async def test_they_live_as_long_as_a_process_that_is_kept(
    a_sidecar: Make, agents: Path, thread: str, beat: Beat
) -> None:
    async with a_sidecar("--agents", str(agents), **WARM) as sidecar:
        await sidecar.say(thread, beat.prompt(WAYS["in a session of its own"]), agent="tools")
        processes = await beat.started(sidecar)
        await sidecar.say(thread, "And?", agent="tools")
        await sidecar.until_logged("turn", thread_id=thread)
        assert not await gone(processes, 0)
        params = {"thread_id": thread, "resource_id": "alice"}
        assert (await sidecar.http.delete("/v1/session", params=params)).status_code == 200
        assert await gone(processes, 0)


async def test_nothing_is_ended_that_was_not_started_by_an_agent_of_this_home(
    sidecar: Sidecar, thread: str, beat: Beat
) -> None:
    config = sidecar.home / "claude"
    directory = config.stat()
    elsewhere = {
        "CLAUDE_CONFIG_DIR": str(config),
        "SESSION_SIDECAR_PROCESS": "0",
        "SESSION_SIDECAR_HOME": f"{directory.st_dev}:{directory.st_ino + 1}:{config}",  # the same path, in a container
    }
    stranger = await asyncio.create_subprocess_exec("sleep", "60", env=os.environ | elsewhere)
    await sidecar.say(thread, "Hello", agent="tools")
    await sidecar.stop(signal.SIGKILL)
    await sidecar.restart()
    assert stranger.returncode is None
    assert not await gone([stranger.pid], 0)
    stranger.kill()
    await stranger.wait()
