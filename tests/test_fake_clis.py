"""A CLI that misbehaves: every turn ends, its claim is released, and no process is left."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.server import Sidecar, a_moment, gone, running

pytestmark = pytest.mark.long  # `make test-all`

Make = Callable[..., Sidecar]

# Each is a shell script in the CLI's place, put together from what a CLI says in as few words as it takes.
HANDSHAKE = r"""
read -r line
id=$(printf '%s' "$line" | sed 's/.*"request_id": *"\([^"]*\)".*/\1/')
printf '{"type":"control_response","response":{"subtype":"success","request_id":"%s","response":{}}}\n' "$id"
"""
INIT = r"""
session=$(printf '%s\n' "$@" | sed -n 's/^--session-id=//p')
read -r prompt
printf '{"type":"system","subtype":"init","session_id":"%s"}\n' "$session"
"""
RESULT = r"""
printf '{"type":"result","subtype":"success","is_error":false,"result":"ok","session_id":"%s"}\n' "$session"
"""

ENDS_BEFORE_IT_BEGAN = {
    "hangs at start": "exec sleep 600",
    "hangs at start and ignores SIGTERM": "trap '' TERM; while :; do sleep 0.1; done",
    "prints nothing": "exit 0",
    "prints garbage": 'echo garbage; echo \'{"type": "garbage\'; exit 0',
    "exits 1 with a message": "echo 'no such option' >&2; exit 1",
    "dies after the handshake": HANDSHAKE + "read -r prompt; exit 3",
    "hangs after the handshake": HANDSHAKE + "exec sleep 600",
    "opens another session": HANDSHAKE
    + 'read -r prompt; echo \'{"type":"system","subtype":"init","session_id":"another"}\'; exec sleep 600',
}
ENDS_IN_MID_TURN = {
    "dies": HANDSHAKE + INIT + "exit 1",
    "ends orderly": HANDSHAKE + INIT + "exit 0",
    "prints garbage": HANDSHAKE + INIT + 'echo \'{"type": "garbage\'; exec sleep 600',
    "hangs": HANDSHAKE + INIT + "exec sleep 600",
    "hangs and ignores SIGTERM": "trap '' TERM\n" + HANDSHAKE + INIT + "while :; do sleep 0.1; done",
}
HANGS_ON_THE_WAY_OUT = "trap '' TERM\n" + HANDSHAKE + INIT + RESULT + "while :; do sleep 0.1; done"


@pytest.fixture
def cli(tmp_path: Path) -> Path:
    """The agents file whose agent has a CLI of the test's."""
    path = tmp_path / "claude"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o700)
    path.with_name("agents.toml").write_text(f'[default]\ncli_path = "{path}"\n')
    return path


@pytest.fixture
async def sidecar(a_sidecar: Make, cli: Path, model: FaultyModel) -> AsyncIterator[Sidecar]:
    """A sidecar that is soon out of patience."""
    patience = {"SIDECAR_TURN_IDLE_SECONDS": "1", "SIDECAR_INTERRUPT_SECONDS": "0.5"}
    async with a_sidecar("--agents", str(cli.with_name("agents.toml")), **patience) as sidecar:
        yield sidecar


@pytest.mark.parametrize("script", [pytest.param(text, id=name) for name, text in ENDS_BEFORE_IT_BEGAN.items()])
async def test_a_cli_that_fails_before_it_begins_is_a_real_status_and_leaves_nothing(
    sidecar: Sidecar, cli: Path, thread: str, script: str
) -> None:
    cli.write_text(f"#!/bin/sh\n{script}\n")
    response = await sidecar.chat(thread, "Hello")
    assert response.status_code in (502, 504), response.text
    assert response.json()["code"] in ("agent_start_failed", "agent_failed", "turn_timeout")
    await sidecar.until_logged("turn", thread_id=thread)
    assert running(cli) == []
    assert (await sidecar.session(thread)).status_code == 404


@pytest.mark.parametrize("script", [pytest.param(text, id=name) for name, text in ENDS_IN_MID_TURN.items()])
async def test_a_cli_that_fails_in_mid_turn_ends_the_stream_and_frees_the_thread(
    sidecar: Sidecar, cli: Path, thread: str, script: str
) -> None:
    cli.write_text(f"#!/bin/sh\n{script}\n")
    async with sidecar.stream(thread, "Hello") as stream:
        events = await stream.rest()
    assert events[0].name == "session"
    assert [event.name for event in events].count("end") == 1
    end = events[-1].data
    assert end["status"] == "failed"
    assert end["error"]["code"] in ("agent_failed", "turn_timeout")
    await sidecar.until_logged("turn", thread_id=thread)
    assert running(cli) == []
    # Its client was told this ID: it stays the thread's, though there never was a transcript.
    assert (await sidecar.session(thread)).json()["sdk_session_id"] == events[0].data["sdk_session_id"]


async def test_the_thread_is_held_until_a_cli_that_hangs_on_the_way_out_is_gone(
    sidecar: Sidecar, cli: Path, thread: str
) -> None:
    cli.write_text(f"#!/bin/sh\n{HANGS_ON_THE_WAY_OUT}\n")
    async with sidecar.stream(thread, "Hello") as stream:
        end = await stream.until("end")
        assert end.data["status"] == "completed"
        left = running(cli)
        assert left
        again = asyncio.create_task(sidecar.chat(thread, "And?"))
        await sidecar.settle()
        assert running(cli) == left  # the next turn waits
        line = await sidecar.until_logged("turn", thread_id=thread)
        assert line["exit"] == -9
        assert await gone(left, 0)
    await again


async def test_a_turn_ends_though_somebody_out_of_reach_holds_its_clis_output_open(
    sidecar: Sidecar, cli: Path, thread: str
) -> None:
    holder = cli.with_name("holder")
    holder.write_text("sleep 600\n")
    escapes = f"env -i sh -c 'setsid sh {holder} &'"
    cli.write_text(f"#!/bin/sh\n{HANDSHAKE}{INIT}{escapes}\nexec sleep 600\n")
    try:
        async with sidecar.stream(thread, "Hello") as stream:
            assert (await stream.rest())[-1].data["error"]["code"] == "turn_timeout"
        line = await sidecar.until_logged("turn", thread_id=thread)
        assert line["exit"] == -signal.SIGTERM
        assert running(cli) == []
        assert running(holder)
    finally:
        for pid in running(holder):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


async def test_a_shutdown_does_not_wait_for_a_cli_that_hangs(sidecar: Sidecar, cli: Path, thread: str) -> None:
    cli.write_text("#!/bin/sh\ntrap '' TERM; while :; do sleep 0.1; done\n")
    asking = asyncio.create_task(sidecar.chat(thread, "Hello"))
    while not running(cli):
        await a_moment()
    sidecar.process.terminate()
    response = await asking
    assert (response.status_code, response.json()["code"]) == (503, "shutting_down")
    await sidecar.wait()
    assert running(cli) == []
