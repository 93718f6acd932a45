"""A retry under an `Idempotency-Key` runs nothing twice, whatever became of the sidecar that ran the first attempt."""

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from session_sidecar.turns.replay.keys import KEY_SECONDS, digest
from session_sidecar.turns.turn import TurnRequest
from session_store import ThreadKey
from tests.faults import FaultyModel
from tests.figures import figure, until
from tests.modes import KEPT
from tests.replicas import Know
from tests.server import SECONDS, Sidecar, gone

Make = Callable[..., Sidecar]


def is_refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem, which must be this one."""
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    return problem


def rows(sidecar: Sidecar, statement: str = "SELECT turn_id, expires_at FROM turn_keys") -> list[Any]:
    """What the file says, or is told, while the sidecar may have it."""
    with contextlib.closing(sqlite3.connect(sidecar.home / "sidecar.db", isolation_level=None)) as file:
        return file.execute(statement).fetchall()


# Over a restart


@pytest.mark.smoke
async def test_a_retry_after_a_crash_in_mid_answer_is_not_run_again(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar() as sidecar:
        asking = asyncio.create_task(sidecar.chat(thread, "My name is Ada [[hold 3]]", idempotency_key="k"))
        await (await model.requested()).holding()
        ((turn_id, _),) = rows(sidecar)
        processes = sidecar.cli_processes()
        await sidecar.stop(signal.SIGKILL)
        await asyncio.wait([asking])
        assert await gone(processes, SECONDS)
        await sidecar.restart()
        retries = [sidecar.chat(thread, "My name is Ada [[hold 3]]", idempotency_key="k") for _ in range(10)]
        for retry in await asyncio.gather(*retries):
            assert is_refused(retry, 410, "replay_gone")["turn_id"] == turn_id
        is_refused(await sidecar.chat(thread, "My name is Eve", idempotency_key="k"), 422, "idempotency_mismatch")
        assert len(model.requests) == 1
        assert [said for who, said in await sidecar.history(thread) if who == "user"] == ["My name is Ada [[hold 3]]"]
        assert await sidecar.say(thread, "Go on", idempotency_key="another")


async def test_a_retry_after_a_clean_restart_is_told_which_turn_it_was(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar() as sidecar:
        first = (await sidecar.chat(thread, "My name is Ada", idempotency_key="k")).json()
        await sidecar.stop(signal.SIGTERM)
        await sidecar.restart()
        again = await sidecar.chat(thread, "My name is Ada", idempotency_key="k")
        assert is_refused(again, 410, "replay_gone")["turn_id"] == first["session"]["turn_id"]
        is_refused(await sidecar.chat(thread, "My name is Eve", idempotency_key="k"), 422, "idempotency_mismatch")
        assert len(model.requests) == 1
        async with sidecar.rejoin(thread) as none:  # a refused retry is no turn of the thread
            assert none.response.status_code == 204
        assert [said for who, said in await sidecar.history(thread) if who == "user"] == ["My name is Ada"]
        mallory = await sidecar.chat(thread, "My name is Mallory", idempotency_key="k", resource_id="mallory")
        assert mallory.json()["status"] == "completed"  # keys are each resource's own


async def test_what_a_crash_left_before_the_agent_had_begun_is_not_run_under_its_key_either(
    a_sidecar: Make, thread: str, tmp_path: Path
) -> None:
    cli, agents = tmp_path / "claude", tmp_path / "agents.toml"
    cli.write_text("#!/bin/sh\nkill -9 $PPID\nsleep 60\n")
    cli.chmod(0o700)
    agents.write_text(f'[default]\n[deadly]\ncli_path = "{cli}"\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        with pytest.raises(httpx.HTTPError):
            await sidecar.chat(thread, "Hello", agent="deadly", idempotency_key="k")
        await sidecar.wait()
        await sidecar.restart()
        again = await sidecar.chat(thread, "Hello", agent="deadly", idempotency_key="k")
        assert "use a new key" in is_refused(again, 410, "replay_gone")["detail"]
        assert await sidecar.say(thread, "Hello", idempotency_key="another") == "You have said 1 thing: Hello"


async def test_a_fork_that_was_cut_off_is_not_made_again_under_its_key(
    a_sidecar: Make, thread: str, another_thread: str, model: FaultyModel, knows: Know
) -> None:
    fields = {"from_thread_id": thread, "message": "[[hold 3]]", "idempotency_key": "k"}
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        asking = asyncio.create_task(sidecar.post("/v1/chat/fork", another_thread, **fields))
        await (await model.requested()).holding()
        await sidecar.stop(signal.SIGKILL)
        await asyncio.wait([asking])
        await sidecar.restart()
        is_refused(await sidecar.post("/v1/chat/fork", another_thread, **fields), 410, "replay_gone")
        assert len(model.requests) == 1


async def test_a_deleted_threads_key_runs_nothing_after_a_restart_and_its_names_are_not_kept_for_that(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.chat(thread, "My name is Ada", idempotency_key="the caller's key")
        for path, query in (("/v1/session", {"thread_id": thread}), ("/v1/sessions", {})):
            await sidecar.http.delete(path, params={"resource_id": "alice", **query})
        await sidecar.stop(signal.SIGTERM)
        ((row,),) = rows(sidecar, "SELECT quote(key) || quote(digest) || turn_id FROM turn_keys")
        assert not any(word.encode().hex().upper() in row for word in ("alice", thread, "the caller's key"))
        await sidecar.restart()
        again = await sidecar.chat(thread, "My name is Ada", idempotency_key="the caller's key")
        is_refused(again, 410, "replay_gone")
        assert len(model.requests) == 1
        assert (await sidecar.session(thread)).status_code == 404


# Keys that are free


async def test_a_turn_that_never_reached_the_agent_leaves_its_key_free_over_a_restart_too(
    a_sidecar: Make, thread: str, another_thread: str, model: FaultyModel, knows: Know
) -> None:
    async def fork() -> httpx.Response:
        fields = {"from_thread_id": thread, "message": "Hello", "idempotency_key": "k"}
        return await sidecar.post("/v1/chat/fork", another_thread, **fields)

    async with a_sidecar() as sidecar:
        for _ in range(2):
            is_refused(await fork(), 404, "session_not_found")
            assert rows(sidecar) == []
        await sidecar.stop(signal.SIGKILL)
        await sidecar.restart()
        await knows(sidecar, thread)
        forked = await fork()
        assert forked.json()["status"] == "completed"
        assert (await fork()).json() == forked.json()
        assert len(model.requests) == 1


async def test_a_turn_that_was_stopped_while_it_waited_leaves_its_key_free(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar() as sidecar:
        async with sidecar.stream(thread, "[[hold 3]]") as stream:
            await stream.until_text()
            waits = sidecar.chat(thread, "Hello", multitask_strategy="enqueue", idempotency_key="k")
            waiting = asyncio.create_task(waits)
            await until(sidecar, "turns_queued", 1)
            await sidecar.stop(signal.SIGTERM)
        is_refused(await waiting, 503, "shutting_down")
        await sidecar.restart()
        again = await sidecar.chat(thread, "Hello", multitask_strategy="enqueue", idempotency_key="k")
        assert again.json()["status"] == "completed"


async def test_a_key_is_remembered_from_its_turns_end_for_ten_minutes_and_free_then(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar(SIDECAR_TURN_SECONDS="5000") as sidecar:
        asking = asyncio.create_task(sidecar.chat(thread, "One [[hold 3]]", idempotency_key="k"))
        await (await model.requested()).holding()
        ((_, runs),) = rows(sidecar)
        assert 5000 < runs / 1e6 - time.time() - KEY_SECONDS + SECONDS < 5000 + SECONDS  # should it be killed now
        model.release()
        await asking
        await sidecar.stop(signal.SIGTERM)
        ((_, ended),) = rows(sidecar)
        assert 0 < KEY_SECONDS - (ended / 1e6 - time.time()) < SECONDS
        rows(sidecar, "UPDATE turn_keys SET expires_at = 1")
        await sidecar.restart()
        assert await sidecar.say(thread, "One more", idempotency_key="k")
        assert len(model.requests) == 2


async def test_ten_thousand_keys_whose_time_is_over_are_gone_after_the_next_turn_with_a_key(
    a_sidecar: Make, thread: str
) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say(thread, "One", idempotency_key="k0")
        await sidecar.stop(signal.SIGTERM)
        many = "WITH RECURSIVE n(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM n WHERE n < 10000)"
        rows(sidecar, f"{many} INSERT INTO turn_keys SELECT CAST(n AS BLOB), x'00', n, 1 FROM n")
        await sidecar.restart()
        await sidecar.say(thread, "Two", idempotency_key="k1")
        async with asyncio.timeout(SECONDS):
            while len(rows(sidecar)) > 2:
                await sidecar.settle()
        is_refused(await sidecar.chat(thread, "One", idempotency_key="k0"), 410, "replay_gone")


# What it costs


async def test_a_turn_without_a_key_asks_the_keys_nothing(a_sidecar: Make, thread: str) -> None:
    async def asked() -> list[float]:
        of_keys = ("take_key", "end_key", "give_back_key", "sweep_keys")
        return [await figure(sidecar, "store_statement_seconds_count", operation=one) for one in of_keys]

    async with a_sidecar(**KEPT) as sidecar:
        await sidecar.say(thread, "One")
        assert (await sidecar.post("/v1/chat/fork", "b", from_thread_id="none", message="Hello")).status_code == 404
        assert await asked() == [0, 0, 0, 0]
        await sidecar.say(thread, "Two", idempotency_key="k")
        await sidecar.until_logged("turn", thread_id=thread)
        async with asyncio.timeout(SECONDS):
            while await asked() != [1, 1, 0, 1]:
                await sidecar.settle()


def test_what_was_asked_for_is_known_by_the_digest_that_an_earlier_version_has_kept() -> None:
    request = TurnRequest(ThreadKey("t", "alice"), "Hello", agent="other", idempotency_key="k", request_id="any")
    assert digest(request).hex() == "da1e60cbff3a5d9fff612830fa4f644b"
