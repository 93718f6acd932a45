"""Retention: what nobody used for so many days goes, and nothing else."""

import base64
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from session_sidecar.app import create_app
from session_sidecar.sessions.reading import Metadata
from session_sidecar.sessions.retention import Terms
from session_sidecar.settings import Settings
from session_store import ThreadKey
from tests.faults import FaultyModel
from tests.replicas import Know
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


async def test_by_default_nothing_goes_however_old(a_sidecar: Make, knows: Know) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "old")
        await aged(sidecar, old=10_000)
        await sidecar.restart()
        assert "First: My name is Ada" in await sidecar.say("old", "And?")
        assert not sidecar.logged("retention")


@pytest.mark.smoke
async def test_mappings_that_were_idle_for_too_long_go_at_start_and_their_transcripts_stay(
    a_sidecar: Make, knows: Know
) -> None:
    async with a_sidecar(SIDECAR_RETENTION_DAYS="1.5") as sidecar:
        for name in ("old", "young", "used"):
            await knows(sidecar, name)
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


async def test_transcripts_go_too_if_the_operator_says_so(a_sidecar: Make, knows: Know) -> None:
    async with a_sidecar(SIDECAR_RETENTION_DAYS="30", SIDECAR_RETENTION_TRANSCRIPTS="delete") as sidecar:
        await knows(sidecar, "t")
        for n in range(110):  # more than a batch
            await sidecar.post("/v1/chat/fork", f"t{n}", from_thread_id="t")
        await aged(sidecar, **{f"t{n}": 31 for n in range(110)})
        sidecar.log.clear()
        await sidecar.restart()
        await sidecar.until_logged("retention", removed=110)
        assert await threads(sidecar) == {"t"}
        assert len(list(sidecar.home.glob("claude/projects/*/*.jsonl"))) == 1


async def tag(sidecar: Sidecar, thread: str, name: str) -> None:
    body = {"thread_id": thread, "resource_id": "alice", "tag": name}
    assert (await sidecar.http.patch("/v1/session", json=body)).status_code == 200


async def test_threads_of_a_tag_have_days_of_their_own_and_where_it_cannot_be_told_they_stay(
    a_sidecar: Make, knows: Know
) -> None:
    tags = {"saved": "checkpoint", "saved-long-ago": "checkpoint", "pinned": "pinned", "lost": "pinned", "mine": "mine"}
    days = {"plain": 31, "saved": 31, "saved-long-ago": 91, "pinned": 400, "lost": 31, "twice": 400, "mine": 31}
    async with a_sidecar(SIDECAR_RETENTION_TAGS="checkpoint:90,pinned:never") as sidecar:
        await knows(sidecar, "t")
        files = {}
        for thread in days:
            await sidecar.post("/v1/chat/fork", thread, from_thread_id="t")
            if thread in tags:
                await tag(sidecar, thread, tags[thread])
            files[thread] = sidecar.transcript(await sidecar.session_id(thread))
        await aged(sidecar, **days)
        files["lost"].unlink()
        elsewhere = files["twice"].parent.with_name("elsewhere")
        elsewhere.mkdir()
        shutil.copy(files["twice"], elsewhere)
        sidecar.log.clear()
        await sidecar.restart()  # without SIDECAR_RETENTION_DAYS only what has such a tag goes
        assert (await sidecar.until_logged("retention"))["removed"] == 1
        assert await threads(sidecar) == {"t", *days} - {"saved-long-ago"}

        await sidecar.stop(signal.SIGTERM)
        sidecar.env["SIDECAR_RETENTION_DAYS"] = "30"
        sidecar.log.clear()
        await sidecar.restart()
        line = await sidecar.until_logged("retention")
        assert (line["removed"], line["kept"], line["unreadable"]) == (3, 2, 1)
        assert await threads(sidecar) == {"t", "saved", "pinned", "twice"}


async def test_of_sealed_transcripts_the_tags_count_too_and_without_the_key_nothing_goes(
    a_sidecar: Make, knows: Know
) -> None:
    right, wrong = (f"{name}:{base64.b64encode(bytes([n]) * 32).decode()}" for n, name in enumerate(("k1", "k2")))
    async with a_sidecar(SIDECAR_ENCRYPTION_KEYS=right, SIDECAR_RETENTION_TAGS="pinned:never") as sidecar:
        for thread in ("pinned", "plain"):
            await knows(sidecar, thread)
        await tag(sidecar, "pinned", "pinned")
        await aged(sidecar, pinned=31, plain=31)
        sidecar.env |= {"SIDECAR_RETENTION_DAYS": "30", "SIDECAR_ENCRYPTION_KEYS": wrong}
        for unreadable, removed, left in ((2, 0, {"pinned", "plain"}), (0, 1, {"pinned"})):
            sidecar.log.clear()
            await sidecar.restart()
            line = await sidecar.until_logged("retention")
            assert (line["unreadable"], line["removed"]) == (unreadable, removed)
            assert await threads(sidecar) == left
            await sidecar.stop(signal.SIGTERM)
            sidecar.env["SIDECAR_ENCRYPTION_KEYS"] = right


async def test_a_thread_that_is_pinned_in_the_last_moment_stays(home: Path) -> None:
    """As a sweep would remove it that saw it before: by the version it had, which a tag does not change."""
    key = ThreadKey("t1", "alice")
    settings = Settings.load({}, home=home, model="offline", retention_days=1e-9, retention_tags="pinned:never")
    app = create_app(Settings.load({}, home=home, model="offline"))
    async with app.router.lifespan_context(app):
        services = app.state.services
        seen = await services.reading.mapping(key)
        await services.changes.describe(key, {"tag": "pinned"})

        def unless(outline: Metadata) -> bool:
            return Terms(settings).keeps(seen, outline)

        assert not await services.changes.forget(key, version=seen.version, unless=unless)
        assert await services.reading.mapping(key) == seen
        await services.changes.describe(key, {"tag": None})
        assert await services.changes.forget(key, version=seen.version, unless=unless)


async def test_a_wrong_setting_is_refused_at_start(a_sidecar: Make) -> None:
    sidecar = a_sidecar(SIDECAR_RETENTION_DAYS="-1")
    try:
        await sidecar.start()
    except AssertionError as error:
        assert "SIDECAR_RETENTION_DAYS" in str(error)  # noqa: PT017 - `start` says what it read
    else:
        raise AssertionError("it started")


async def test_a_sweep_keeps_no_one_from_stopping_and_leaves_a_running_thread(
    a_sidecar: Make, model: FaultyModel, knows: Know
) -> None:
    """With a retention of no time at all: everything is too old but what a turn is on."""
    async with a_sidecar() as sidecar:
        await knows(sidecar, "idle")
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
