"""Keys: sealing anew beside whoever runs, and forgetting one resource's for good."""

import asyncio
import base64
import json
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

from tests.conversations import conversation
from tests.modes import COLD
from tests.replicas import Know, Make, get, messages
from tests.server import Sidecar
from tests.terminal import CTRL_C, Ended, Terminal, command, installed

ONE, TWO = (f"{name}:{base64.b64encode(bytes([number]) * 32).decode()}" for number, name in enumerate(("k1", "k2")))
HAS_ONE, HAS_TWO, HAS_BOTH = ({"SIDECAR_ENCRYPTION_KEYS": keys} for keys in (ONE, TWO, f"{TWO},{ONE}"))


def rows(home: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(home / "transcripts.db")) as database:
        return database.execute("SELECT * FROM session_files ORDER BY sdk_session_id, path, seq").fetchall()


def sealed_with(home: Path) -> set[str | None]:
    with closing(sqlite3.connect(home / "transcripts.db")) as database:
        return {
            key
            for (key,) in database.execute(
                "SELECT key_id FROM session_files UNION ALL SELECT key_id FROM session_outlines"
            )
        }


def transcripts(home: Path) -> list[Path]:
    return sorted(home.glob("claude/projects/*/*.jsonl"))


async def rotate(
    home: Path, *options: str, code: int = 0, env: dict[str, str], run: Callable[..., Awaitable[Ended]] = command
) -> dict[str, Any]:
    """`session-sidecar rotate` in a pipe; what it says at last."""
    ended = await run("", "rotate", "--home", str(home), *options, **env)
    assert ended.code == code, ended
    said: dict[str, Any] = json.loads(ended.out.splitlines()[-1])
    return said


def refused(ended: Ended, code: int, why: str) -> None:
    assert (ended.code, ended.out) == (code, "")
    assert why in ended.err


async def test_a_home_whose_keys_were_just_set_is_sealed_and_goes_on(home: Path, model_env: dict[str, str]) -> None:
    texts = [path.read_bytes() for path in transcripts(home)]
    (transcripts(home)[0].with_suffix("") / "subagents").mkdir(parents=True)
    assert (await rotate(home, env=HAS_ONE, run=installed))["taken_in"] == 2
    assert transcripts(home) == []
    assert sealed_with(home) == {"k1"}
    assert not any(text[:40] in (home / "transcripts.db").read_bytes() for text in texts)
    assert (await rotate(home, env=HAS_ONE))["taken_in"] == 0
    async with Sidecar(home, {**model_env, **COLD, **HAS_ONE}) as sidecar:
        assert "First: My name is Ada; last: Who am I?" in await sidecar.say("t1", "Who am I?")
        assert ("user", "My name is Ada") in await messages(sidecar, "t2")


async def test_reading_what_is_not_sealed_yet_destroys_nothing(home: Path, model_env: dict[str, str]) -> None:
    async with Sidecar(home, {**model_env, **COLD, **HAS_ONE}) as sidecar:
        assert ("user", "My name is Ada") in await messages(sidecar, "t1")
        assert (await get(sidecar, "/v1/session", "t2")).json()["metadata"]["transcript"] == "present"
        assert "First: My name is Ada" in await sidecar.say("t2", "And?")


async def test_a_new_key_takes_over_from_an_old_one(home: Path, model_env: dict[str, str]) -> None:
    await rotate(home, env=HAS_ONE)
    said = await rotate(home, env=HAS_BOTH)
    assert (said["taken_in"], said["resealed"], said["of"]) == (0, 4, 4)
    assert sealed_with(home) == {"k2"}
    assert (await rotate(home, env=HAS_TWO))["of"] == 0
    async with Sidecar(home, {**model_env, **COLD, **HAS_TWO}) as sidecar:
        assert "First: My name is Ada; last: Who am I?" in await sidecar.say("t1", "Who am I?")


async def test_it_goes_on_beside_a_running_sidecar_and_leaves_it_what_lies_there_plain(
    home: Path, model_env: dict[str, str], tmp_path: Path
) -> None:
    plain = shutil.copytree(home, tmp_path / "plain")
    async with Sidecar(plain, {**model_env, **COLD}):
        refused(await command("", "rotate", "--home", str(plain), **HAS_ONE), 1, "is in use by process")
    await rotate(home, env=HAS_ONE)
    async with Sidecar(home, {**model_env, **COLD, **HAS_BOTH}) as sidecar:
        await sidecar.say("t1", "One")
        talking = asyncio.create_task(sidecar.say("t2", "[[pace 0.05]] a long answer"))
        said = await rotate(home, env=HAS_BOTH, code=1)
        assert str(sidecar.process.pid) in said["in_use"]
        await talking
        assert "You have said 3 things. First: My name is Ada" in await sidecar.say("t1", "Two")
        assert "You have said 3 things. First: My name is Ada" in await sidecar.say("t2", "Two")
    assert (await rotate(home, env=HAS_BOTH))["plain"] == 0
    assert sealed_with(home) == {"k2"}


async def test_what_does_not_open_is_named_and_kept_and_the_rest_is_sealed_anew(home: Path) -> None:
    await rotate(home, env=HAS_ONE)
    with closing(sqlite3.connect(home / "transcripts.db")) as database, database:
        (session, *_), _ = database.execute("SELECT sdk_session_id FROM session_files ORDER BY 1").fetchall()
        database.execute("UPDATE session_files SET data = zeroblob(99) WHERE sdk_session_id = ?", (session,))
    said = await rotate(home, env=HAS_BOTH, code=1)
    assert (said["resealed"], said["unreadable"], list(said["why"])) == (3, 1, [session])
    assert "does not open with the key 'k1'" in said["why"][session]
    before = rows(home)
    said = await rotate(home, env={"SIDECAR_ENCRYPTION_KEYS": f"k3:{TWO[3:]}"}, code=1)
    assert (said["resealed"], said["unreadable"]) == (0, 4)
    assert rows(home) == before


async def test_a_transcript_that_no_thread_has_is_not_sealed_and_that_is_said(home: Path) -> None:
    with closing(sqlite3.connect(home / "sidecar.db")) as database, database:
        database.execute("DELETE FROM session_mappings WHERE thread_id = 't1'")
    assert (await rotate(home, env=HAS_ONE, code=1))["plain"] == 1
    assert len(transcripts(home)) == 1


async def test_replicas_go_on_while_what_they_share_is_sealed_anew(
    database: str, some_replicas: Make, tmp_path: Path, knows: Know
) -> None:
    async with some_replicas(1) as (replica,):
        for number in range(3):
            await knows(replica, f"t{number}")
    async with some_replicas(2, **HAS_BOTH) as (one, other):
        assert "First: My name is Ada" in await one.say("t0", "One")
        said = await rotate(tmp_path, "--database", database, env=HAS_BOTH)
        assert said["resealed"] == said["of"] > 0
        assert "First: My name is Ada; last: Two" in await other.say("t0", "Two")
        assert "First: My name is Ada; last: One" in await other.say("t1", "One")
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT DISTINCT key_id FROM session_files").fetchall() == [("k2",)]


def many(home: Path, count: int) -> None:
    """Add threads to a home, with transcripts made up."""
    columns = "thread_id, resource_id, sdk_session_id, created_at, updated_at"
    with closing(sqlite3.connect(home / "sidecar.db")) as database, database:
        (home / "claude" / "projects" / "-made-up").mkdir()
        for number in range(count):
            lines = conversation(number)
            session = json.loads(lines[0])["sessionId"]
            (home / "claude" / "projects" / "-made-up" / f"{session}.jsonl").write_bytes(b"".join(lines))
            row = (f"made up {number}", "carol", session, number + 1, number + 1)
            database.execute(f"INSERT INTO session_mappings ({columns}) VALUES (?, ?, ?, ?, ?)", row)


async def test_ctrl_c_breaks_it_off_and_it_goes_on_where_it_was(home: Path) -> None:
    many(home, 200)
    async with Terminal("", "rotate", "--home", str(home), **HAS_ONE) as terminal:
        for _ in range(2):  # the second is of some
            await terminal.until("conversations taken in")
        terminal.type(CTRL_C)
        assert await terminal.ended() == 130
        assert "broken off; it goes on where it was" in terminal.screen
    left = len(transcripts(home))
    assert 0 < left < 200
    assert (await rotate(home, env=HAS_ONE))["taken_in"] == left
    assert sealed_with(home) == {"k1"}


async def test_without_keys_there_is_nothing_to_seal_with(home: Path, tmp_path: Path) -> None:
    refused(await command("", "rotate", "--home", str(home)), 1, "set SIDECAR_ENCRYPTION_KEYS")
    refused(await command("", "rotate", "--home", str(home), SIDECAR_ENCRYPTION_KEYS="k1:x"), 2, "is not base64")
    refused(await command("", "rotate", "--home", str(tmp_path / "no"), **HAS_ONE), 1, "no sidecar has run here")
    assert not (home / "transcripts.db").exists()


async def forget(home: Path, *options: str) -> Ended:
    return await command("", "forget-key", "alice", "--home", str(home), *options)


async def test_a_key_is_forgotten_only_on_demand_and_when_its_resource_has_no_thread(
    home: Path, model_env: dict[str, str]
) -> None:
    await rotate(home, env=HAS_ONE)
    refused(await forget(home), 2, "--yes says that it is meant")
    refused(await forget(home, "--yes"), 1, "'alice' has threads: delete them first")
    async with Sidecar(home, {**model_env, **COLD, **HAS_ONE}) as sidecar:
        refused(await forget(home, "--yes"), 1, "is in use by process")
        for thread in ("t1", "t2"):
            query = {"thread_id": thread, "resource_id": "alice", "transcript": "keep"}
            assert (await sidecar.http.delete("/v1/session", params=query)).status_code == 204
    assert len(rows(home)) == 2
    with closing(sqlite3.connect(home / "transcripts.db")) as database:
        ((salt,),) = database.execute("SELECT salt FROM resource_keys").fetchall()
    async with Terminal("", "forget-key", "alice", "--home", str(home)) as terminal:
        await terminal.prompted("unreadable, for good?")
        terminal.type("n\n")
        assert await terminal.ended() == 1
    assert json.loads((await forget(home, "--yes")).out) == {"resource_id": "alice", "forgotten": True}
    assert json.loads((await forget(home, "--yes")).out) == {"resource_id": "alice", "forgotten": False}
    assert not any(salt in path.read_bytes() for path in home.glob("transcripts.db*"))
    said = await rotate(home, env=HAS_BOTH, code=1)
    assert said["unreadable"] == 4
    assert all("was deleted" in why for why in said["why"].values())


async def test_a_thread_that_begins_while_a_key_is_forgotten_gets_one_of_its_own(
    database: str, some_replicas: Make, tmp_path: Path, knows: Know
) -> None:
    there = ("--database", database, "--yes")
    async with some_replicas(1, **HAS_ONE) as (replica,):
        await knows(replica, "t")
        refused(await forget(tmp_path, *there), 1, "has threads")
        for now, then in (("t", "t1"), ("t1", "t2")):
            query = {"thread_id": now, "resource_id": "alice"}
            assert (await replica.http.delete("/v1/session", params=query)).status_code == 204
            forgetting = asyncio.create_task(forget(tmp_path, *there))
            await replica.say(then, "My name is Eve")
            await forgetting
            assert "First: My name is Eve" in await replica.say(then, "And?")
    async with some_replicas(2, **HAS_ONE) as (_, other):  # and whoever has none of it here reads it
        assert ("user", "My name is Eve") in await messages(other, "t2")
