"""The session map's disk is full, or its files go while it is in use: nothing is told that the next start denies."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import FaultyModel
from tests.replicas import Know
from tests.server import Sidecar
from tests.volume import Volume, mounted

Make = Callable[..., Sidecar]

CANNOT = "the session map cannot be used: "


def refused(response: httpx.Response, *said: str) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (503, "store_unavailable"), problem
    assert all(text in problem["detail"] for text in said), problem


def logged(sidecar: Sidecar, event: str) -> int:
    return sum(event in line for line in sidecar.log)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Volume]:
    """A small disk for the database alone, in the home of a sidecar that is yet to start."""
    with mounted(tmp_path / "disk", megabytes=1) as volume:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "sidecar.db").symlink_to(tmp_path / "disk" / "sidecar.db")
        yield volume


def every_call(sidecar: Sidecar, thread: str, session_id: str) -> Iterator[Any]:
    """All that ask the map something."""
    key = {"thread_id": thread, "resource_id": "alice"}
    new = {**key, "thread_id": "another"}
    yield sidecar.chat(thread, "Again")
    yield sidecar.chat("another", "Hello")
    yield sidecar.post("/v1/chat/fork", "another", from_thread_id=thread)
    yield sidecar.post("/v1/chat/fork", "another", from_thread_id=thread, message="Hello")
    yield sidecar.post("/v1/chat/interrupt", thread)
    yield sidecar.post("/v1/session/warm", thread)
    yield sidecar.http.put("/v1/session", json={**new, "sdk_session_id": session_id})
    yield sidecar.http.patch("/v1/session", json={**key, "title": "A title"})
    yield sidecar.http.delete("/v1/session", params=key)
    yield sidecar.http.delete("/v1/sessions", params={"resource_id": "alice"})
    for path in ("/v1/session", "/v1/session/messages", "/v1/session/branches"):
        yield sidecar.http.get(path, params=key)
    yield sidecar.http.get("/v1/sessions")
    yield sidecar.http.get("/readyz")


async def test_after_the_database_was_deleted_no_call_claims_to_have_done_anything(
    a_sidecar: Make, model: FaultyModel, thread: str, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        session_id = await sidecar.session_id(thread)
        asked = len(model.requests)
        for file in sidecar.home.glob("sidecar.db*"):
            file.unlink()
        for call in every_call(sidecar, thread, session_id):
            refused(await call, "sidecar.db cannot be found any more", "stop the program, restore a backup")
        assert (await sidecar.http.get("/healthz")).status_code == 200
        await sidecar.at_rest()
        assert len(model.requests) == asked
        assert logged(sidecar, CANNOT) == 1


async def test_a_turn_that_runs_while_the_database_goes_still_ends_with_its_answer(
    a_sidecar: Make, model: FaultyModel, thread: str
) -> None:
    async with a_sidecar() as sidecar, sidecar.stream(thread, "[[hold 3]]") as stream:
        await (await model.requested()).holding()
        session_id = await sidecar.session_id(thread)
        (sidecar.home / "sidecar.db").unlink()
        model.release()
        await stream.rest()
        assert stream.events[-1].data["status"] == "completed"
        assert stream.text in sidecar.transcript(session_id).read_text()
        refused(await sidecar.http.get("/readyz"))


async def test_a_database_that_was_moved_away_and_back_goes_on_without_a_restart(
    a_sidecar: Make, thread: str, another_thread: str, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        database, away = sidecar.home / "sidecar.db", sidecar.home / "away.db"
        database.rename(away)
        refused(await sidecar.chat(thread, "Two"), "move it back")
        refused(await sidecar.chat(another_thread, "Two"), "move it back")
        away.rename(database)
        assert "have said 2 things" in await sidecar.say(thread, "Two")
        await sidecar.say(another_thread, "Two")
        assert (await sidecar.http.get("/readyz")).status_code == 200
        assert logged(sidecar, "the session map can be used again") == 1


async def test_a_full_disk_refuses_what_must_be_kept_and_starts_nothing(
    a_sidecar: Make, disk: Volume, model: FaultyModel, thread: str, another_thread: str, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        await knows(sidecar, another_thread)
        unmapped, key = await sidecar.session_id(another_thread), {"thread_id": thread, "resource_id": "alice"}
        await sidecar.http.delete("/v1/session", params={**key, "thread_id": another_thread})
        before = (await sidecar.session(thread)).json()
        transcripts = list(sidecar.home.glob("claude/projects/*/*"))
        asked = len(model.requests)

        def writing() -> Iterator[Any]:
            yield sidecar.chat(another_thread, "Hello")
            yield sidecar.post("/v1/chat/fork", another_thread, from_thread_id=thread, message="Hello")
            yield sidecar.http.put("/v1/session", json={**key, "thread_id": another_thread, "sdk_session_id": unmapped})
            yield sidecar.http.delete("/v1/session", params=key)
            yield sidecar.http.delete("/v1/sessions", params={"resource_id": "alice"})

        disk.fill()
        for call in writing():
            refused(await call, "the disk is full: make room")
            refused(await sidecar.http.get("/readyz"), "the disk is full: make room")
        assert sidecar.cli_processes() == []
        assert len(model.requests) == asked
        assert list(sidecar.home.glob("claude/projects/*/*")) == transcripts
        assert (await sidecar.session(thread)).json() == before
        assert logged(sidecar, CANNOT) == 1
        disk.free()
        for call in writing():
            response: httpx.Response = await call
            assert response.status_code in (200, 201, 204, 409), response.text
        assert (await sidecar.http.get("/readyz")).status_code == 200


async def test_a_known_thread_goes_on_where_the_disk_has_no_room_for_the_end_of_its_turn(
    a_sidecar: Make, disk: Volume, thread: str, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        disk.fill()
        assert "have said 2 things" in await sidecar.say(thread, "Two")
        refused(await sidecar.http.get("/readyz"), "the disk is full")
        disk.free()
        assert "have said 3 things" in await sidecar.say(thread, "Three")
        assert (await sidecar.http.get("/readyz")).status_code == 200
        assert len(await sidecar.history(thread)) == 6


async def test_a_turn_whose_key_cannot_be_kept_is_not_run_and_may_be_sent_again(
    a_sidecar: Make, disk: Volume, model: FaultyModel, thread: str, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        disk.fill()
        refused(await sidecar.chat(thread, "Two", idempotency_key="k"), "the disk is full: make room")
        assert len(model.requests) == 0
        disk.free()
        assert "have said 2 things" in await sidecar.say(thread, "Two", idempotency_key="k")
