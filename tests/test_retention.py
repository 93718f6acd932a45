"""Retention: what nobody used for so many days goes, and nothing else."""

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.faults import FaultyModel
from tests.server import Sidecar

pytestmark = pytest.mark.long  # `make test-all`

Make = Callable[..., Sidecar]
DAY = 24 * 3600


async def aged(sidecar: Sidecar, **days: float) -> None:
    """Stop the sidecar, and let so many days pass for these threads."""
    await sidecar.stop(signal.SIGTERM)
    with closing(sqlite3.connect(sidecar.home / "sidecar.db")) as database, database:
        for thread, number in days.items():
            then = int((time.time() - number * DAY) * 1e6)
            database.execute(
                "UPDATE session_mappings SET created_at = min(created_at, ?), updated_at = ? WHERE thread_id = ?",
                (then, then, thread),
            )


async def threads(sidecar: Sidecar) -> set[str]:
    return {row["thread_id"] for row in (await sidecar.http.get("/v1/sessions")).json()["data"]}


async def test_by_default_nothing_goes_however_old(a_sidecar: Make) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say("old", "Hello")
        await aged(sidecar, old=10_000)
        await sidecar.restart()
        assert "First: Hello" in await sidecar.say("old", "And?")
        assert not sidecar.logged("retention")


async def test_mappings_that_were_idle_for_too_long_go_at_start_and_their_transcripts_stay(a_sidecar: Make) -> None:
    async with a_sidecar(SIDECAR_RETENTION_DAYS="1.5") as sidecar:
        for name in ("old", "young", "used"):
            await sidecar.say(name, "Hello")
        session_id = await sidecar.session_id("old")
        await aged(sidecar, old=1.6, young=1.4, used=9)
        with (
            closing(sqlite3.connect(sidecar.home / "sidecar.db")) as database,
            database,
        ):  # created long ago, used today
            database.execute(
                "UPDATE session_mappings SET updated_at = ? WHERE thread_id = 'used'", (time.time_ns() // 1000,)
            )
        sidecar.log.clear()
        await sidecar.restart()
        line = await sidecar.until_logged("retention", removed=1)
        assert (line["busy"], line["seen"], line["transcripts"]) == (0, 3, "keep")
        assert len(sidecar.logged("retention")) == 1
        assert await threads(sidecar) == {"young", "used"}
        assert sidecar.transcript(session_id).exists()


async def test_transcripts_go_too_if_the_operator_says_so(a_sidecar: Make) -> None:
    async with a_sidecar(SIDECAR_RETENTION_DAYS="30", SIDECAR_RETENTION_TRANSCRIPTS="delete") as sidecar:
        await sidecar.say("t", "Hello")
        for n in range(110):  # more than a batch
            await sidecar.post("/v1/chat/fork", f"t{n}", from_thread_id="t")
        await aged(sidecar, **{f"t{n}": 31 for n in range(110)})
        sidecar.log.clear()
        await sidecar.restart()
        await sidecar.until_logged("retention", removed=110)
        assert await threads(sidecar) == {"t"}
        assert len(list(sidecar.home.glob("claude/projects/*/*.jsonl"))) == 1


async def test_a_wrong_setting_is_refused_at_start(a_sidecar: Make) -> None:
    sidecar = a_sidecar(SIDECAR_RETENTION_DAYS="-1")
    try:
        await sidecar.start()
    except AssertionError as error:
        assert "SIDECAR_RETENTION_DAYS" in str(error)  # noqa: PT017 - `start` says what it read
    else:
        raise AssertionError("it started")


async def test_a_sweep_keeps_no_one_from_stopping_and_leaves_a_running_thread(
    a_sidecar: Make, model: FaultyModel
) -> None:
    """With a retention of no time at all: everything is too old but what a turn is on."""
    async with a_sidecar() as sidecar:
        await sidecar.say("idle", "Hello")
        await sidecar.stop(signal.SIGTERM)
        sidecar.env["SIDECAR_RETENTION_DAYS"] = "1e-9"
        sidecar.log.clear()
        await sidecar.restart()
        await sidecar.until_logged("retention", removed=1)
        async with sidecar.stream("busy", "Hello [[hold 3]]") as stream:
            await stream.until_text()
            assert await threads(sidecar) == {"busy"}
            began = time.monotonic()
            await sidecar.stop(signal.SIGTERM)
            assert time.monotonic() - began < 5
