"""A fleet on its bad days: nothing that was stored is lost, nothing runs twice, every client gets its ending."""

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest

from session_sidecar.replicas.leases.keeping import UNUSED_SECONDS
from tests.faults import FaultyModel, hold
from tests.modes import COLD, KEPT, WARM
from tests.postgres import PASSWORD, Postgres, free_port, through
from tests.replicas import (
    LEASE_SECONDS,
    SECRET,
    Balancer,
    Know,
    Make,
    Replica,
    Replicas,
    all_released,
    all_run_out,
    asked,
    get,
    let_go,
    messages,
    no_alarms,
    when_free,
)
from tests.server import SECONDS, Sidecar, Stream, a_moment

THREAD = {"thread_id": "t", "resource_id": "alice"}
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError)
LONG_LEASE = {"SIDECAR_LEASE_SECONDS": "30"}


@contextlib.asynccontextmanager
async def without(server: Postgres) -> AsyncIterator[None]:
    """While the block lasts there is no database."""
    await asyncio.to_thread(server.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


@contextlib.asynccontextmanager
async def hanging(server: Postgres) -> AsyncIterator[None]:
    """While the block lasts the database takes calls and answers none."""
    server.send(signal.SIGSTOP)
    try:
        yield
    finally:
        server.send(signal.SIGCONT)


WAYS = pytest.mark.parametrize("missing", [without, hanging], ids=["gone", "hung"])


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# The database


@WAYS
async def test_without_the_database_no_turn_is_begun(
    some_replicas: Make, knows: Know, server: Postgres, own: str, model: FaultyModel, missing: Any
) -> None:
    async with some_replicas(1, url=own) as (one,):
        await knows(one, "t")
        await all_released(own)
        async with missing(server):
            for answer in await asyncio.gather(one.chat("t", "who?"), one.chat("new", "who?"), one.http.get("/readyz")):
                assert problem(answer) == (503, "store_unavailable")
            assert len(model.requests) == 0
        assert "You have said 2 things" in await one.say("t", "who am I?")
        assert (await one.http.get("/readyz")).status_code == 200
        assert len(await messages(one, "t")) == 4


async def test_a_turn_does_not_notice_a_database_that_is_back_before_the_lease_is_over(
    some_replicas: Make, server: Postgres, own: str, model: FaultyModel
) -> None:
    async with some_replicas(2, url=own, **LONG_LEASE) as (one, other):
        async with one.stream("t", "I am Ada [[hold 1]]") as stream:
            await stream.until_text()
            async with without(server):
                await one.settle()
            model.release()
            end = (await stream.rest())[-1].data
        assert end["status"] == "completed"
        assert "You have said 2 things" in await when_free(other, "t", "who am I?")


@WAYS
async def test_a_turn_is_stopped_that_cannot_know_any_more_whether_its_thread_is_its_own(
    some_replicas: Make, server: Postgres, own: str, missing: Any
) -> None:
    async with some_replicas(2, url=own) as (one, other):
        async with one.stream("t", "I am Ada [[hold 1]]") as stream:
            await stream.until_text()
            async with missing(server):
                end = (await stream.rest())[-1].data
                assert (end["status"], end["error"]["code"], end["stored"]) == ("failed", "lease_lost", False)
                await one.until_logged("the lease on a thread is lost")
        assert "First: I am Ada" in await when_free(other, "t", "who am I?")
        await all_released(own)
        assert len(one.logged("the lease on a thread is lost")) == 1


@WAYS
async def test_what_could_not_be_stored_at_the_end_of_a_turn_is_stored_before_anybody_else_has_the_thread(
    some_replicas: Make, server: Postgres, own: str, model: FaultyModel, missing: Any
) -> None:
    async with some_replicas(2, url=own, **LONG_LEASE) as (one, other):
        async with one.stream("t", "I am Ada [[hold 1]]") as stream:
            await stream.until_text()
            async with missing(server):
                model.release()
                released = time.monotonic()
                end = (await stream.rest())[-1].data
                took = time.monotonic() - released
        assert (end["status"], end["stored"]) == ("completed", False)
        assert took < 5
        print(f"\nstored false after {took:.2f} s")
        assert "First: I am Ada" in await when_free(other, "t", "who am I?")
        assert await messages(one, "t") == await messages(other, "t")


async def test_nobody_notices_that_all_connections_were_cut(some_replicas: Make, own: str, model: FaultyModel) -> None:
    cut = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
    """
    async with some_replicas(2, url=own) as (one, other):
        async with one.stream("t", "I am Ada [[hold 1]]") as stream:
            await stream.until_text()
            assert await asked(own, cut)
            model.release()
            end = (await stream.rest())[-1].data
        assert (end["status"], end["stored"]) == ("completed", True)
        assert await asked(own, cut)
        assert "You have said 2 things" in await other.say("t", "who am I?")
        assert await asked(own, cut)
        assert (await get(one, "/v1/session", "t")).status_code == 200


# A replica


async def test_a_replica_that_stood_still_while_idle_goes_on_with_what_others_have_said(
    some_replicas: Make, database: str
) -> None:
    async with some_replicas(2, **KEPT) as (one, other):
        await one.say("t", "I am Ada")
        await all_released(database)
        with one.frozen():
            assert "You have said 2 things" in await when_free(other, "t", "who?")
        assert "You have said 3 things" in await when_free(one, "t", "and now?")
        assert await messages(one, "t") == await messages(other, "t")


async def test_a_message_that_waited_on_a_replica_that_stood_still_comes_after_what_others_have_said(
    some_replicas: Make, knows: Know, database: str, model: FaultyModel
) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        async with one.stream("t", "frozen [[hold 1]]") as stream:
            await stream.until_text()
            waiting = asyncio.create_task(one.chat("t", "at last", multitask_strategy="enqueue"))
            await one.settle()
            with one.frozen():
                await all_run_out(database)
                await when_free(other, "t", "meanwhile")
            end = (await stream.rest())[-1].data
        assert (end["status"], end["error"]["code"]) == ("failed", "lease_lost")
        assert "last: at last" in (await waiting).json()["text"]
        said = [text for role, text in await messages(other, "t") if role == "user"]
        assert said[-2:] == ["meanwhile", "at last"]
        assert said.count("at last") == 1


async def test_of_two_that_race_for_the_thread_of_a_dead_replica_one_gets_it(
    some_replicas: Make, model: FaultyModel
) -> None:
    async with some_replicas(3) as (one, *others):
        async with one.stream("t", "killed [[hold 1]]") as stream:
            await stream.until_text()
            await one.kill()
            killed = time.monotonic()

        async def race(replica: Replica) -> httpx.Response:
            while True:
                answer = await replica.chat("t", f"[[hold 1]] {replica.home.name}")
                if answer.status_code != 503:
                    return answer

        racing = [asyncio.create_task(race(replica)) for replica in others]
        done, waiting = await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        print(f"\nbusy for {time.monotonic() - killed:.2f} s after kill -9, of leases of {LEASE_SECONDS:g} s")
        assert [problem(task.result()) for task in done] == [(409, "thread_busy")]
        await (await model.requested(2)).holding()
        model.release()
        assert [(await task).status_code for task in waiting] == [200]
        assert len(model.requests) == 2


async def test_a_replica_goes_on_without_its_cache_and_so_does_one_with_a_home_of_its_own(
    some_replicas: Make, knows: Know, tmp_path: Path
) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        await let_go(other, "t")
        shutil.rmtree(one.home / "claude" / "projects")
        assert [text for role, text in await messages(one, "t") if role == "user"] == ["My name is Ada"]
        shutil.rmtree(one.home / "claude" / "projects")
        assert "You have said 2 things" in await one.say("t", "who?")
        await let_go(other, "t")
        await one.kill()
        async with Replica(tmp_path / "new", {**one.env, "SIDECAR_REPLICA_URL": "http://127.0.0.1:1"}) as new:
            assert "You have said 3 things" in await new.say("t", "and now?")


async def test_a_cache_that_goes_with_what_was_not_stored_yet_takes_nothing_else_with_it(
    some_replicas: Make, knows: Know, server: Postgres, own: str, model: FaultyModel
) -> None:
    async with some_replicas(2, url=own) as (one, other):
        await knows(one, "t")
        async with one.stream("t", "lost [[hold 1]]") as stream:
            await stream.until_text()
            async with without(server):
                model.release()
                assert (await stream.rest())[-1].data["stored"] is False
                shutil.rmtree(one.home / "claude" / "projects")
        await all_released(own)
        assert "First: My name is Ada" in await when_free(other, "t", "who?")
        assert await messages(one, "t") == await messages(other, "t")


async def test_what_a_crash_has_left_and_cannot_be_stored_keeps_nothing_else_from_being_stored(
    some_replicas: Make, database: str
) -> None:
    async with some_replicas(1) as (one,):
        async with one.stream("t", "killed [[hold 1]]") as stream:
            await stream.until_text()
            await one.kill()
        async with await psycopg.AsyncConnection.connect(database) as somebody:
            await somebody.execute("SELECT 1 FROM session_mappings FOR UPDATE")
            await one.restart()
            async with one.stream("u", "hello [[hold 1]]") as other:
                await other.until_text()
                session = await one.session_id("u")
                async with asyncio.timeout(SECONDS):
                    while not await asked(database, "SELECT 1 FROM session_files WHERE sdk_session_id = %s", session):
                        await a_moment()
        assert "First: killed" in await one.say("t", "who?")


# Who is asked


async def test_a_replica_that_lives_and_cannot_be_reached_is_not_passed_over(some_replicas: Make) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    async with some_replicas(2, SIDECAR_REPLICA_URL=nowhere) as (one, other):
        async with one.stream("t", "I am Ada [[hold 1]]") as stream:
            await stream.until_text()
            answers = [
                await other.chat("t", "who?"),
                await other.chat("t", "who?", multitask_strategy="interrupt"),
                await get(other, "/v1/chat", "t"),
                await other.http.post("/v1/chat/interrupt", json=THREAD),
                await other.http.delete("/v1/session", params={**THREAD, "force": "true"}),
            ]
            async with other.stream("t", "who?") as refused:
                answers.append(refused.response)
        for answer in answers:
            assert problem(answer) == (503, "replica_unreachable")
            assert int(answer.headers["retry-after"]) > 0
            assert "127.0.0.1" not in answer.text


async def test_what_a_dead_replica_had_said_is_gone_and_nothing_of_it_runs_again(
    some_replicas: Make, model: FaultyModel
) -> None:
    async with some_replicas(2) as (one, other):
        first = (await one.chat("t", "I am Ada", idempotency_key="k")).json()
        await let_go(other, "t")
        turn_id = first["session"]["turn_id"]
        await one.kill()
        async with other.rejoin("t") as none:
            assert none.response.status_code == 204
        again = await other.http.post(
            "/v1/chat", json={**THREAD, "message": "I am Ada"}, headers={"last-event-id": f"{turn_id}-3"}
        )
        assert problem(again) == (410, "replay_gone")
        retry = await other.chat("t", "I am Ada", idempotency_key="k")
        assert problem(retry) == (410, "replay_gone")
        assert retry.json()["turn_id"] == turn_id
        assert problem(await other.chat("t", "I am Eve", idempotency_key="k")) == (422, "idempotency_mismatch")
        assert len(model.requests) == 1


async def test_a_retry_joins_its_turn_wherever_that_runs_and_has_run(some_replicas: Make, model: FaultyModel) -> None:
    async with some_replicas(2) as (one, other):
        first = asyncio.create_task(one.chat("t", "I am Ada [[hold 1]]", idempotency_key="k"))
        await (await model.requested()).holding()
        mismatch = await other.chat("t", "I am Eve", idempotency_key="k")
        assert problem(mismatch) == (422, "idempotency_mismatch")
        second = asyncio.create_task(other.chat("t", "I am Ada [[hold 1]]", idempotency_key="k"))
        await other.settle()
        model.release()
        answers = [(await first).json(), (await second).json()]
        assert [answer.get("status") for answer in answers] == ["completed"] * 2, answers
        await let_go(other, "t")
        answers.append((await other.chat("t", "I am Ada [[hold 1]]", idempotency_key="k")).json())
        assert answers[-1]["status"] == "completed", answers
        assert len({answer["session"]["turn_id"] for answer in answers}) == 1
        assert {answer["text"] for answer in answers} == {answers[0]["text"]}
        assert problem(await other.chat("t", "I am Eve", idempotency_key="k")) == (422, "idempotency_mismatch")
        assert len(model.requests) == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["killed", "frozen"])
async def test_a_stream_from_another_replica_breaks_off_where_that_does(some_replicas: Make, frozen: bool) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "I am Ada [[hold 1]]") as stream:
        await stream.until_text()
        async with other.rejoin("t") as joined:
            await joined.until_text()
            with one.frozen() if frozen else contextlib.nullcontext():
                if not frozen:
                    await one.kill()
                began = time.monotonic()
                with pytest.raises(BROKEN):
                    await joined.rest()
                print(f"\nbroken off after {time.monotonic() - began:.2f} s")
        assert "end" not in [event.name for event in joined.events]


async def test_a_message_that_may_have_been_run_is_not_said_to_be_unsent(
    some_replicas: Make, model: FaultyModel
) -> None:
    async with some_replicas(2) as (one, other):
        async with one.stream("t", "I am Ada [[hold 1]]") as stream:
            await stream.until_text()
            waiting = asyncio.create_task(other.chat("t", "and Eve [[hold 1]]", multitask_strategy="interrupt"))
            await (await model.requested(2)).holding()
            await one.kill()
        answer = await waiting
        assert problem(answer) == (502, "replica_broke_off")
        assert "retry-after" not in answer.headers
        assert "127.0.0.1" not in answer.text


async def test_a_slow_reader_on_another_replica_does_not_hold_a_turn_up(some_replicas: Make) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "I am Ada [[hold 1]]") as stream:
        await stream.until_text()
        async with other.stream("t", "[[big 12000000]]", multitask_strategy="interrupt") as slow:
            await slow.until("session")
            await one.until_logged("turn", status="completed")


async def test_a_replica_that_ends_breaks_off_what_it_forwards(some_replicas: Make) -> None:
    async with (
        some_replicas(2, SIDECAR_SHUTDOWN_SECONDS="90") as (one, other),
        one.stream("t", "I am Ada [[hold 1]]") as stream,
    ):
        await stream.until_text()
        async with other.rejoin("t") as joined:
            await joined.until_text()
            await other.stop(signal.SIGTERM)
            with contextlib.suppress(*BROKEN):
                await joined.rest()
        assert (await one.session("t")).json()["status"] == "running"


# A conversation through it all


class Person:
    """Who talks through a load balancer, and asks again as the answers say: what was run is not sent again."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.stored: list[str] = []  # answers of which they were told that they are stored

    async def say(self, message: str, key: str | None = None) -> str | None:
        """The answer, to a retry under `key` too; None where the message was run, and the answer is not to be had."""
        key = key or str(uuid.uuid4())
        async with asyncio.timeout(4 * SECONDS):
            while True:
                answer = await self._ask(message, key)
                if answer is not None and answer.status_code == 200:
                    said = answer.json()
                    assert said["status"] == "completed", said
                    if said["stored"]:
                        self.stored.append(said["text"])
                    text: str = said["text"]
                    return text
                if answer is not None and answer.status_code == 410:
                    if message in await self.said():
                        return None
                    key = str(uuid.uuid4())
                assert answer is None or answer.status_code in (409, 410, 502, 503), answer.text
                await asyncio.sleep(LEASE_SECONDS / 8)

    async def _ask(self, message: str, key: str) -> httpx.Response | None:
        headers = {"accept": "application/json", "idempotency-key": key}
        with contextlib.suppress(httpx.TransportError):
            return await self._client.post("/v1/chat", json={**THREAD, "message": message}, headers=headers)
        return None

    async def said(self) -> list[str]:
        """All that the person has said, as any replica has it."""
        answer = await self._client.get("/v1/session/messages", params={**THREAD, "limit": "200"})
        assert answer.status_code == 200, answer.text
        contents = [one["message"]["content"] for one in answer.json()["data"] if one["type"] == "user"]
        return [content if isinstance(content, str) else content[0]["text"] for content in contents]

    async def fork(self, name: str) -> str:
        """Branch the thread, and say something there."""
        body = {"resource_id": "alice", "thread_id": name, "from_thread_id": "t", "message": f"in {name}"}
        async with asyncio.timeout(SECONDS):
            while True:
                answer = await self._client.post("/v1/chat/fork", json=body, headers={"accept": "application/json"})
                if answer.status_code == 200:
                    text: str = answer.json()["text"]
                    return text
                assert answer.status_code in (409, 503), answer.text
                await asyncio.sleep(LEASE_SECONDS / 8)

    @contextlib.asynccontextmanager
    async def stream(self, message: str, key: str) -> AsyncIterator[Stream]:
        """Say something that is not answered to its end."""
        async with asyncio.timeout(2 * SECONDS):
            while True:
                asking = self._client.stream(
                    "POST", "/v1/chat", json={**THREAD, "message": message}, headers={"idempotency-key": key}
                )
                async with asking as response:
                    if response.status_code == 200:
                        yield Stream(response)
                        return
                    await response.aread()
                    assert response.status_code in (409, 503), response.text
                await asyncio.sleep(LEASE_SECONDS / 8)

    async def interrupt(self) -> None:
        """Stop what runs, whoever runs it."""
        answer = await self._client.post("/v1/chat/interrupt", json=THREAD)
        assert (answer.status_code, answer.json()["status"]) == (200, "interrupted")


async def holder(replicas: Replicas, database: str) -> Replica:
    """The replica that has the thread."""
    ((url,),) = await asked(
        database, "SELECT url FROM session_mappings JOIN replicas ON id = holder WHERE thread_id = 't'"
    )
    return next(replica for replica in replicas if replica.env["SIDECAR_REPLICA_URL"] == url)


@pytest.mark.parametrize(("turns", "killed"), [(6, {3}), pytest.param(30, {10, 20, 29}, marks=pytest.mark.long)])
async def test_a_conversation_survives_its_replicas(
    some_replicas: Make, model: FaultyModel, database: str, turns: int, killed: set[int]
) -> None:
    kept = WARM if turns < 10 else KEPT  # what is made ahead has its chance in the shorter one
    async with some_replicas(3, **kept) as replicas, Balancer(replicas).client() as client:
        person, dead = Person(client), list[tuple[int, Replica]]()
        for number in range(1, turns + 1):
            message, key = f"thing number {number}", f"key {number}"
            if number in killed:
                model.script(hold(1))
                with contextlib.suppress(httpx.TransportError):
                    async with person.stream(message, key) as stream:
                        await stream.until_text()
                        victim = await holder(replicas, database)
                        await victim.kill()
                        dead.append((number + 2, victim))
                        await stream.rest()
                assert "end" not in [event.name for event in stream.events]
                await person.say(message, key)
            elif number % 5 == 2:
                model.script(hold(1))
                async with person.stream(message, key) as stream:
                    await stream.until_text()
                    await person.interrupt()
                    assert (await stream.rest())[-1].data["status"] == "interrupted"
            else:
                await person.say(message)
            if number % 6 == 4:
                assert f"last: in branch-{number}" in await person.fork(f"branch-{number}")
            for when, replica in dead:
                if when == number:
                    await replica.restart()
        assert await person.say("the last thing") is not None
        await all_released(database)
        told = [await messages(replica, "t") for replica in replicas if replica.process.returncode is None]
        assert all(one == told[0] for one in told)
        last = await holder(replicas, database)
        found = await last.history("t")
        said = [text for role, text in found if role == "user" and not text.startswith("[Request interrupted")]
        assert said == [*(f"thing number {number}" for number in range(1, turns + 1)), "the last thing"]
        answers = [text for role, text in found if role == "assistant"]
        assert [text for text in answers if text in person.stored] == person.stored
        assert len(person.stored) >= turns - len(killed) - turns // 5 - 1


async def test_of_first_messages_on_all_replicas_at_once_none_fails_in_a_way_that_nobody_foresaw(
    some_replicas: Make, model: FaultyModel
) -> None:
    async with some_replicas(3) as replicas:
        for number in range(8):
            thread = f"t{number}"
            answers = await asyncio.gather(*(replica.chat(thread, f"I am {replica.home.name}") for replica in replicas))
            assert {answer.status_code for answer in answers} <= {200, 409, 503}
            assert 200 in [answer.status_code for answer in answers]


# Encryption


def a_key(name: str) -> str:
    return f"{name}:{base64.b64encode(os.urandom(32)).decode()}"


SAID = "My name is Ada Lovelace of the sealed house"
PIECES = (b"Lovelace", b"sealed house")


async def test_nothing_that_was_said_can_be_read_in_the_database(some_replicas: Make, database: str) -> None:
    async with some_replicas(2, SIDECAR_ENCRYPTION_KEYS=a_key("k1")) as (one, other):
        await one.say("t", SAID)
        assert SAID in await when_free(other, "t", "who am I?")
        fork = {"resource_id": "alice", "from_thread_id": "t", "thread_id": "copy"}
        assert (await one.http.post("/v1/chat/fork", json=fork)).status_code == 201
        assert SAID in await when_free(other, "copy", "and here?")
        titled = await one.http.get("/v1/sessions", params={"resource_id": "alice", "include": "metadata"})
        assert "Lovelace" in titled.text
        await all_released(database)
        tables = await asked(database, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        for (table,) in tables:
            for row in await asked(database, f"SELECT * FROM {table}"):
                for value in row:
                    held = value if isinstance(value, bytes) else str(value).encode()
                    assert not any(piece in held for piece in PIECES), table


def readable(home: Path) -> list[Path]:
    """The files of a home in which something can be read that was said."""

    def holds_any(file: Path) -> bool:
        try:
            return file.is_file() and any(part in file.read_bytes() for part in PIECES)
        except FileNotFoundError:  # its CLI has just removed it
            return False

    return [file for file in home.rglob("*") if holds_any(file)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_on_one_machine_a_sealed_conversation_goes_on_after_its_end(a_sidecar: Any, how: signal.Signals) -> None:
    async with a_sidecar(SIDECAR_ENCRYPTION_KEYS=a_key("k1"), SIDECAR_WARM_SESSIONS="2") as sidecar:
        await sidecar.say("t", SAID)
        await sidecar.stop(how)
        await sidecar.restart()
        assert SAID in await sidecar.say("t", "who am I?")
        await sidecar.stop(signal.SIGTERM)
        assert readable(sidecar.home) == []
        await sidecar.restart()
        assert SAID in await sidecar.say("t", "and now?")
        no_alarms(sidecar)


@pytest.fixture(scope="module")
async def unused(
    model_env: dict[str, str], _model: FaultyModel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Sidecar]]:
    """Two sidecars with keys, by the processes they keep, in which something was said: time passes for both at once."""
    async with contextlib.AsyncExitStack() as stack:
        sidecars = {}
        for warm in ("0", "1"):
            env = {**model_env, **COLD, "SIDECAR_ENCRYPTION_KEYS": a_key("k1"), "SIDECAR_WARM_SESSIONS": warm}
            home = tmp_path_factory.mktemp("unused") / "home"
            sidecars[warm] = sidecar = await stack.enter_async_context(Sidecar(home, env))
            await sidecar.say("t", SAID)
            await sidecar.say("u", "Hello")  # whose process takes the place of the first
        yield sidecars


@pytest.mark.long
@pytest.mark.parametrize("warm", ["0", "1"])
async def test_what_was_said_is_not_left_where_it_can_be_read_once_nobody_uses_it(
    unused: dict[str, Sidecar], model: FaultyModel, warm: str
) -> None:
    sidecar = unused[warm]
    async with asyncio.timeout(3 * UNUSED_SECONDS):
        while readable(sidecar.home):  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.2)  # looking reads the whole home
    assert SAID in await sidecar.say("t", "who am I?")
    no_alarms(sidecar)


async def test_with_the_wrong_key_nothing_can_be_read_and_nothing_is_destroyed(a_sidecar: Any) -> None:
    right = a_key("k1")
    async with a_sidecar(SIDECAR_ENCRYPTION_KEYS=right) as sidecar:
        await sidecar.say("t", SAID)
        for wrong, code in ((a_key("k1"), "seal_broken"), (a_key("k2"), "key_missing")):
            await sidecar.stop(signal.SIGTERM)
            sidecar.env["SIDECAR_ENCRYPTION_KEYS"] = wrong
            await sidecar.restart()
            answer = await sidecar.chat("t", "who am I?")
            assert problem(answer) == (503, code), answer.text
            read = await get(sidecar, "/v1/session/messages", "t")
            assert problem(read) == (503, code), read.text
            assert await sidecar.say(f"new-{code}", "Hello")
            no_alarms(sidecar)
        await sidecar.stop(signal.SIGTERM)
        sidecar.env["SIDECAR_ENCRYPTION_KEYS"] = f"{a_key('k3')},{right}"
        await sidecar.restart()
        assert SAID in await sidecar.say("t", "who am I?")


async def test_a_home_whose_keys_are_set_later_is_sealed_in_the_background(a_sidecar: Any) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say("t", SAID)
        await sidecar.stop(signal.SIGTERM)
        assert readable(sidecar.home)
        sidecar.env["SIDECAR_ENCRYPTION_KEYS"] = a_key("k1")
        await sidecar.restart()
        session = await sidecar.session_id("t")
        async with asyncio.timeout(SECONDS):
            while not sealed(sidecar, session):
                await a_moment()
        await sidecar.stop(signal.SIGTERM)
        assert readable(sidecar.home) == []
        await sidecar.restart()
        assert SAID in await sidecar.say("t", "who am I?")
        no_alarms(sidecar)


def sealed(sidecar: Sidecar, session_id: str) -> bool:
    """Whether a session is in the file of sealed transcripts."""
    with contextlib.closing(sqlite3.connect(sidecar.home / "transcripts.db")) as file:
        found = file.execute("SELECT 1 FROM session_files WHERE sdk_session_id = ?", (session_id,))
        return found.fetchone() is not None


# One replica


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pgbouncer"])
async def test_one_replica_needs_neither_an_address_nor_a_secret(
    a_sidecar: Any, knows: Know, database: str, request: pytest.FixtureRequest, model: FaultyModel, pooled: bool
) -> None:
    url = through(request.getfixturevalue("pgbouncer"), database) if pooled else database
    async with a_sidecar(SIDECAR_DATABASE=url, SIDECAR_LEASE_SECONDS=str(LEASE_SECONDS)) as sidecar:
        await knows(sidecar, "t")
        fork = {"resource_id": "alice", "from_thread_id": "t", "thread_id": "copy"}
        assert (await sidecar.http.post("/v1/chat/fork", json=fork)).status_code == 201
        assert "First: My name is Ada" in await sidecar.say("copy", "who?")
        async with sidecar.stream("t", "killed [[hold 1]]") as stream:
            await stream.until_text()
            assert problem(await sidecar.chat("t", "me too")) == (409, "thread_busy")
            await sidecar.stop(signal.SIGKILL)
        await sidecar.restart()
        assert "First: My name is Ada" in await sidecar.say("t", "who?")
        deleted = await sidecar.http.delete("/v1/sessions", params={"resource_id": "alice", "transcript": "delete"})
        assert deleted.status_code == 200
        for table in ("session_mappings", "session_files", "session_outlines"):
            assert await asked(database, f"SELECT 1 FROM {table}") == []
        no_alarms(sidecar)


async def test_nothing_is_left_of_turns_of_every_kind_but_what_was_said(
    some_replicas: Make, model: FaultyModel, database: str
) -> None:
    async with some_replicas(2, **KEPT) as (one, other):
        await one.say("t", "I am Ada Lovelace")
        await other.chat("t", "[[fail 400]]")
        async with other.stream("t", "[[hold 1]]", on_disconnect="cancel") as stream:
            await stream.until_text()
        await one.chat("none", "hello", if_missing="fail")
        await one.chat("t", "queued", multitask_strategy="enqueue")
        async with one.stream("u", "[[hold 1]]") as stream:
            await stream.until_text()
            await other.http.post("/v1/chat/interrupt", json={**THREAD, "thread_id": "u"})
            await stream.rest()
        await all_released(database)
        for replica in (one, other):
            figures = (await replica.http.get("/metrics")).text
            assert not any(text in figures for text in (SECRET, PASSWORD, quote(PASSWORD, ""), "Lovelace"))
