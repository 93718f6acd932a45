"""A shutdown in the middle of everything: each stream gets its `end`, no process is left, and it is over in time."""

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults import FaultyModel, fail, hold, silent
from tests.modes import in_both_modes
from tests.server import Sidecar, gone

Make = Callable[..., Sidecar]


@pytest.fixture
def forked() -> bool:
    """The program as it is installed."""
    return False


@pytest.mark.long
@in_both_modes
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "twice Ctrl-C"])
async def test_eight_streams_are_open_in_every_state(
    a_sidecar: Make, thread: str, model: FaultyModel, signals: list[signal.Signals], mode: str
) -> None:
    async with a_sidecar(SIDECAR_INTERRUPT_SECONDS="2", SIDECAR_SHUTDOWN_SECONDS="10") as sidecar:
        streams, contexts = [], []
        model.default = hold(0)  # a retry of the 529 may come before the last stream
        model.script(hold(1), hold(3), hold(5), silent(), silent(), fail(529))
        for number in range(7):
            context = sidecar.stream(f"{thread}-{number}", "Hello")
            stream = await context.__aenter__()
            contexts.append(context)
            await stream.until("session")
            await model.requested(number + 1)
            streams.append(stream)
        waiting = asyncio.create_task(sidecar.chat(f"{thread}-0", "And?", multitask_strategy="enqueue"))
        await sidecar.settle()
        processes = sidecar.cli_processes()
        assert len(processes) == 7 or (mode == "warm" and len(processes) > 7)  # a spare is no surprise
        began = time.monotonic()
        ending = asyncio.create_task(sidecar.wait())
        for number_ in signals:
            sidecar.process.send_signal(number_)
            await asyncio.sleep(0)
        if len(signals) == 1:
            for stream in streams:
                end = (await stream.rest())[-1]
                assert end.name == "end"
                assert end.data["status"] == "interrupted"
                assert end.data["error"]["code"] == "shutting_down"
            refused = await waiting
            assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
        await ending
        assert time.monotonic() - began < 10
        assert await gone(processes)
        for context in contexts:
            await context.__aexit__(RuntimeError, RuntimeError(), None)
        await asyncio.wait([waiting])
        model.reset()
        await sidecar.restart()
        for number in range(3):
            assert (await sidecar.chat(f"{thread}-{number}", "Go on")).json()["status"] == "completed"


@pytest.mark.smoke
async def test_new_turns_are_refused_while_it_shuts_down(a_sidecar: Make, thread: str, model: FaultyModel) -> None:
    async with a_sidecar() as sidecar, sidecar.stream(thread, "[[hold 1]]") as stream:
        await stream.until_text()
        ready = await sidecar.http.get("/readyz")
        assert ready.status_code == 200
        sidecar.process.terminate()
        await stream.rest()
        await sidecar.wait()


async def test_a_second_start_finds_everything_closed_in_order(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say(thread, "Hello")
        assert await sidecar.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert [path.name for path in sidecar.home.glob("sidecar.db*")].count("sidecar.db-wal") == 0
        assert "Traceback" not in "".join(sidecar.log)
        assert not sidecar.logged("closing the agent's process failed")
