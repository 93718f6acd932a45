"""What an agent's tools have started ends with its process, however it was started and however the process ends."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from session_sidecar.agent.processes.orphans import guarded_cli
from tests.faults import FaultyModel
from tests.modes import COLD, WARM
from tests.server import SECONDS, Sidecar, a_moment, gone, running
from tests.transcripts import AGENTS

Make = Callable[..., Sidecar]

# Each is part of one command line; the last keeps the tool busy.
WAYS = {
    "background": "sh {} &",
    "background-without-the-environment": "(env -i sh {}; true) &",
    "orphan": "(sh {} &)",
    "session": "setsid nohup sh {} > /dev/null 2>&1 &",
    "daemon": "setsid sh -c '(setsid sh {} < /dev/null > /dev/null 2>&1 &)'",
    "foreground": "sh {}",
}


class Beats:
    """Programs that write to a file each, for as long as they live, and are started in a way of their own each."""

    def __init__(self, directory: Path) -> None:
        self._scripts = {directory / f"{name}.sh": way for name, way in WAYS.items()}
        for script in self._scripts:
            script.write_text(f"while :; do echo beat >> {script}.beats; sleep 0.5; done\n")

    def prompt(self, *ways: str) -> str:
        """A prompt that has them started by a tool: all, or those of some ways."""
        chosen = [way.format(script) for script, way in self._scripts.items() if not ways or script.stem in ways]
        return "[[tool Bash {}]]".format(json.dumps({"command": "\n".join(chosen)}))

    def running(self) -> dict[str, list[int]]:
        """What runs of them, by the way it was started."""
        return {script.stem: pids for script in self._scripts if (pids := running(script))}

    async def started(self, sidecar: Sidecar, *ways: str) -> list[int]:
        """Wait until these write, or all; the processes that have them in their command line."""
        wanted = set(ways or WAYS)
        async with asyncio.timeout(3 * SECONDS):
            while {script.stem for script in self._scripts if Path(f"{script}.beats").exists()} < wanted:
                await a_moment()
        found = self.running()
        assert found.keys() == wanted
        return [pid for pids in found.values() for pid in pids]


@pytest.fixture
def beats(tmp_path: Path) -> Iterator[Beats]:
    beats = Beats(tmp_path)
    yield beats
    for pids in beats.running().values():  # only where a test has failed
        for pid in pids:
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


async def ended(sidecar: Sidecar, thread: str, beats: Beats, processes: list[int]) -> bool:
    """Whether all of it was over when the thread was free again."""
    await sidecar.until_logged("turn", thread_id=thread)
    return await gone(processes, 0) and beats.running() == {}


async def test_they_end_with_an_interrupted_turn(sidecar: Sidecar, thread: str, beats: Beats) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beats.prompt(), agent="tools"))
    processes = await beats.started(sidecar)
    await sidecar.post("/v1/chat/interrupt", thread)
    assert (await asking).json()["status"] == "interrupted"
    assert await ended(sidecar, thread, beats, processes)


async def test_they_end_with_a_completed_turn_whose_process_is_not_kept(
    sidecar: Sidecar, thread: str, beats: Beats
) -> None:
    await sidecar.say(thread, beats.prompt("orphan", "session", "daemon"), agent="tools")
    await sidecar.until_logged("turn", thread_id=thread)
    assert beats.running() == {}


@pytest.mark.long
async def test_they_end_with_a_cli_that_is_stopped(sidecar: Sidecar, thread: str, beats: Beats) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beats.prompt(), agent="tools"))
    processes = await beats.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)
    await sidecar.post("/v1/chat/interrupt", thread)
    await asking
    assert await ended(sidecar, thread, beats, processes)
    assert sidecar.logged("turn", thread_id=thread)[0]["exit"] == -signal.SIGKILL
    assert await sidecar.say(thread, "Go on", agent="tools")


@pytest.mark.long
async def test_they_end_with_a_cli_that_is_stopped_and_comes_to_its_deadline(
    a_sidecar: Make, agents: Path, thread: str, beats: Beats
) -> None:
    patience = {"SIDECAR_INTERRUPT_SECONDS": "0.5", "SIDECAR_TURN_IDLE_SECONDS": "20"}
    async with a_sidecar("--agents", str(agents), **COLD, **patience) as sidecar:
        async with sidecar.stream(thread, beats.prompt(), agent="tools") as stream:
            processes = await beats.started(sidecar)
            signal_clis(sidecar, signal.SIGSTOP)
            async with asyncio.timeout(2 * SECONDS):
                async for event in stream:
                    if event.name == "end":
                        assert event.data["error"]["code"] == "turn_timeout"
        assert await ended(sidecar, thread, beats, processes)


@pytest.mark.long
async def test_they_end_with_a_cli_that_somebody_kills(sidecar: Sidecar, thread: str, beats: Beats) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beats.prompt(), agent="tools"))
    processes = await beats.started(sidecar)
    signal_clis(sidecar, signal.SIGKILL)
    await asking
    assert await ended(sidecar, thread, beats, processes)


@pytest.mark.long
async def test_they_end_with_a_thread_that_is_deleted_by_force(sidecar: Sidecar, thread: str, beats: Beats) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beats.prompt(), agent="tools"))
    processes = await beats.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)
    params = {"thread_id": thread, "resource_id": "alice", "force": "true", "transcript": "delete"}
    assert (await sidecar.http.delete("/v1/session", params=params)).status_code == 204
    assert await gone(processes, 0)
    assert beats.running() == {}
    await asking


@pytest.mark.long
async def test_they_end_with_a_sidecar_that_is_asked_to(sidecar: Sidecar, thread: str, beats: Beats) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beats.prompt(), agent="tools"))
    processes = await beats.started(sidecar)
    signal_clis(sidecar, signal.SIGSTOP)
    await sidecar.stop(signal.SIGTERM)
    assert await gone(processes, 0)
    assert beats.running() == {}
    await asyncio.wait([asking])


@pytest.mark.parametrize("stopped", [True, False], ids=["CLI stopped", "CLI running"])
async def test_they_end_when_a_sidecar_that_was_killed_is_started_again(
    sidecar: Sidecar, thread: str, beats: Beats, stopped: bool
) -> None:
    asking = asyncio.create_task(sidecar.chat(thread, beats.prompt(), agent="tools"))
    processes = await beats.started(sidecar)
    if stopped:
        signal_clis(sidecar, signal.SIGSTOP)
    await sidecar.stop(signal.SIGKILL)
    await asyncio.wait([asking])
    assert not await gone(processes, 0)
    await sidecar.restart()
    assert await gone(processes, 0)
    assert beats.running() == {}


async def test_they_live_as_long_as_a_process_that_is_kept(
    a_sidecar: Make, agents: Path, thread: str, model: FaultyModel, beats: Beats
) -> None:
    async with a_sidecar("--agents", str(agents), **WARM) as sidecar:
        await sidecar.say(thread, beats.prompt("session"), agent="tools")
        processes = await beats.started(sidecar, "session")
        await sidecar.say(thread, "And?", agent="tools")
        await sidecar.until_logged("turn", thread_id=thread)
        assert not await gone(processes, 0)
        params = {"thread_id": thread, "resource_id": "alice"}
        assert (await sidecar.http.delete("/v1/session", params=params)).status_code == 204
        assert await gone(processes, 0)


async def test_nothing_is_ended_that_was_not_started_by_an_agent_of_this_home(sidecar: Sidecar, thread: str) -> None:
    config = sidecar.home / "claude"
    directory = config.stat()
    elsewhere = {
        "CLAUDE_CONFIG_DIR": str(config),
        "SESSION_SIDECAR_PROCESS": "0",
        "SESSION_SIDECAR_HOME": f"{directory.st_dev}:{directory.st_ino + 1}:{config}",  # the same path, in a container
    }
    stranger = await asyncio.create_subprocess_exec("sleep", "600", env=os.environ | elsewhere)
    try:
        await sidecar.say(thread, "Hello", agent="tools")
        await sidecar.stop(signal.SIGKILL)
        await sidecar.restart()
        assert not await gone([stranger.pid], 0)
    finally:
        stranger.kill()
        await stranger.wait()


def test_a_cli_whose_sidecar_has_gone_before_it_could_be_told_is_not_begun(tmp_path: Path) -> None:
    launcher = guarded_cli(tmp_path)
    assert launcher is not None
    ours = subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False)
    anothers = subprocess.run(["sh", "-c", f"{launcher} --version; true"], capture_output=True, text=True, check=False)
    assert ("Claude Code" in ours.stdout, anothers.stdout) == (True, "")
