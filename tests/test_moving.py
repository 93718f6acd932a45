"""Moving house: from a home into PostgreSQL and back, whole, whenever it is broken off, and nothing twice."""

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from session_sidecar.replicas.archive.local import files_of
from tests.conversations import conversation
from tests.faults import FaultyModel, say, tool
from tests.forked import Forked
from tests.modes import COLD, KEPT
from tests.replicas import Know, Make, get, messages
from tests.server import SECONDS, Sidecar, a_moment
from tests.terminal import CTRL_C, Ended, Terminal, command, environment, installed
from tests.transcripts import AGENTS

AGENT = {"description": "look", "prompt": "Look around", "subagent_type": "general-purpose", "run_in_background": False}
KEYS = f"k1:{base64.b64encode(bytes(32)).decode()}"
SEALED = {"SIDECAR_ENCRYPTION_KEYS": KEYS}
Files = dict[str, dict[str, bytes]]
Run = Callable[..., Awaitable[Ended]]
PIPE = 4096  # the least that a pipe takes: some 25 lines


def files(home: Path) -> Files:
    """All files of all sessions of a home, wherever in it they lie."""
    projects = home / "claude" / "projects"
    sessions = {row[2] for row in mappings(home)}
    return {session: {p: file.read_bytes() for p, file in files_of(projects, session).items()} for session in sessions}


def mappings(home: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(home / "sidecar.db")) as database:
        return database.execute("SELECT * FROM session_mappings ORDER BY created_at, thread_id").fetchall()


def stored(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


async def move(
    way: str,
    home: Path,
    database: str,
    *options: str,
    code: int = 0,
    env: dict[str, str] | None = None,
    run: Run = command,
) -> list[dict[str, Any]]:
    """`session-sidecar import` or `export`, in a pipe: what it says, the counts as the last."""
    ended = await run("", way, "--home", str(home), "--database", database, *options, **(env or {}))
    assert ended.code == code, ended
    return [json.loads(line) for line in ended.out.splitlines()]


@pytest.fixture(scope="session")
async def _moving(model_env: dict[str, str], _model: FaultyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a fork, a subagent, a long tool result, a title, and a thread of somebody else."""
    _model.reset()
    place = tmp_path_factory.mktemp("moving")
    (place / "agents.toml").write_text(AGENTS)
    env = {**model_env, **KEPT, "SIDECAR_AGENTS": str(place / "agents.toml")}
    async with Sidecar(place / "home", env) as sidecar:
        await sidecar.say("trip", "My name is Ada")
        _model.script(tool("Bash", {"command": "yes a line of a long result | head -c 200000"}), say("That was long."))
        await sidecar.say("trip", "Do something long", agent="tools")
        _model.script(tool("Agent", AGENT), say("I see a room."), say("It has looked."))
        await sidecar.say("trip", "Have somebody look around", agent="tools")
        fork = {"resource_id": "alice", "from_thread_id": "trip", "thread_id": "by train"}
        assert (await sidecar.http.post("/v1/chat/fork", json=fork)).status_code == 201
        title = {"thread_id": "trip", "resource_id": "alice", "title": "A trip"}
        assert (await sidecar.http.patch("/v1/session", json=title)).status_code == 200
        await sidecar.say("trip", "Hello", resource_id="bob")
    return sidecar.home


@pytest.fixture
def home(_moving: Path, tmp_path: Path) -> Path:
    """That home, whose sidecar was stopped."""
    return shutil.copytree(_moving, tmp_path / "home")


def many(home: Path, count: int) -> None:
    """Add threads to a home, with transcripts made up."""
    columns = "thread_id, resource_id, sdk_session_id, created_at, updated_at"
    with closing(sqlite3.connect(home / "sidecar.db")) as database, database:
        for number in range(count):
            lines = conversation(number)
            session = json.loads(lines[0])["sessionId"]
            (home / "claude" / "projects" / "-made-up").mkdir(exist_ok=True)
            (home / "claude" / "projects" / "-made-up" / f"{session}.jsonl").write_bytes(b"".join(lines))
            row = (f"made up {number}", "carol", session, number + 1, number + 1)
            database.execute(f"INSERT INTO session_mappings ({columns}) VALUES (?, ?, ?, ?, ?)", row)


@pytest.mark.parametrize("env", [{}, SEALED], ids=["plain", "sealed"])
async def test_a_home_goes_into_the_database_and_back_and_is_what_it_was(
    home: Path, database: str, env: dict[str, str], tmp_path: Path, model_env: dict[str, str]
) -> None:
    was = files(home)
    assert {path.partition("/")[0] for session in was.values() for path in session} == {"", "subagents", "tool-results"}
    planned = await move("import", home, database, "--dry-run", env=env)
    assert [step["outcome"] for step in planned[:-1]] == ["to_move"] * 3
    assert planned[-1]["bytes"] == sum(len(data) for session in was.values() for data in session.values())
    with pytest.raises(psycopg.errors.UndefinedTable):
        stored(database, "SELECT 1 FROM session_mappings")

    done = await move("import", home, database, env=env, run=command if env else installed)
    assert done[-1] == {"threads": 3, "moved": 3, "bytes": planned[-1]["bytes"]}
    assert (await move("import", home, database, env=env))[-1] == {"threads": 3, "there": 3, "bytes": 0}
    assert {row[0] for row in stored(database, "SELECT key_id FROM session_files")} == {"k1" if env else None}
    assert files(home) == was

    again = tmp_path / "again"
    planned = await move("export", again, database, "--dry-run", env=env)
    assert not again.exists()
    assert not list(tmp_path.glob(".*"))
    done = await move("export", again, database, env=env, run=command if env else installed)
    assert (done[-1], planned[-1]["to_move"]) == ({"threads": 3, "moved": 3, "bytes": planned[-1]["bytes"]}, 3)
    assert mappings(again) == mappings(home)
    if not env:
        assert files(again) == was
    assert (again / "transcripts.db").exists() == bool(env)
    assert list(again.glob("claude/projects/*/*")) == [] if env else True
    async with Sidecar(again, {**model_env, **COLD, **env}) as sidecar:
        assert await messages(sidecar, "by train") == await messages(sidecar, "trip")
        answer = (await sidecar.chat("trip", "Who am I?")).json()
        assert answer["session"]["outcome"] == "resumed"
        assert "First: My name is Ada; last: Who am I?" in answer["text"]
        shown = (await get(sidecar, "/v1/session", "trip")).json()
        assert shown["metadata"]["title"] == "A trip"


async def test_a_conversation_goes_on_in_the_fleet_that_it_was_taken_to(
    home: Path, database: str, some_replicas: Make
) -> None:
    await move("import", home, database)
    async with some_replicas(2) as (one, other):
        assert "First: My name is Ada; last: Who am I?" in await one.say("trip", "Who am I?")
        assert "First: My name is Ada; last: And now?" in await other.say("trip", "And now?")
        query = {"resource_id": "alice", "include": "metadata"}
        listed = (await other.http.get("/v1/sessions", params=query)).json()["data"]
        assert {session["metadata"]["title"] for session in listed} >= {"A trip"}
        branches = await get(other, "/v1/session/branches", "by train")
        assert branches.json()["root"]["thread_id"] == "trip"
    # Threads that have gone on there are not in the way of those that are yet to come.
    many(home, 1)
    done = await move("import", home, database)
    assert done[-1] == {"threads": 4, "moved": 1, "there": 3, "bytes": done[0]["bytes"]}


async def test_what_is_in_the_way_is_named_and_all_else_is_moved(home: Path, database: str) -> None:
    many(home, 1)
    await move("import", home, database)
    with psycopg.connect(database) as connection:
        connection.execute("DELETE FROM session_mappings WHERE resource_id = 'bob' OR thread_id = 'by train'")
        connection.execute("UPDATE session_mappings SET sdk_session_id = 'another' WHERE thread_id = 'trip'")
        connection.execute(
            "INSERT INTO session_mappings (thread_id, resource_id, sdk_session_id, created_at, updated_at, fence)"
            " SELECT 'else', 'alice', sdk_session_id, 0, 0, 1 FROM session_files WHERE resource_id = 'bob' LIMIT 1"
        )
    with closing(sqlite3.connect(home / "sidecar.db")) as local, local:  # has gone on here
        local.execute("UPDATE session_mappings SET version = 1, updated_at = 9 WHERE resource_id = 'carol'")
    (gone_on,) = home.glob("claude/projects/-made-up/*.jsonl")
    gone_on.write_bytes(gone_on.read_bytes() + b'{"type": "last-prompt"}\n')
    *steps, counts = await move("import", home, database, code=1)
    why = {(step["thread_id"], step["resource_id"]): step["why"] for step in steps if step["outcome"] == "refused"}
    assert why.keys() == {("trip", "alice"), ("trip", "bob"), ("made up 0", "carol")}
    assert "another session there" in why["trip", "alice"]
    assert "another thread has this session" in why["trip", "bob"]
    assert "gone on here" in why["made up 0", "carol"]
    assert counts == {"threads": 4, "refused": 3, "moved": 1, "bytes": counts["bytes"]}


@contextlib.asynccontextmanager
async def begun(way: str, home: Path, database: str, **env: str) -> AsyncIterator[Forked]:
    """One that has moved some threads, and has more before it: it waits for somebody to read what it says."""
    out, its_out = os.pipe()
    fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, PIPE)
    os.set_blocking(out, False)
    arguments = (way, "--home", str(home), "--database", database)
    process = await Forked.start(*arguments, env=environment("", **env), streams=(0, its_out, 2))
    os.close(its_out)
    said = b""
    async with asyncio.timeout(SECONDS):
        while said.count(b"\n") < 20:
            await a_moment()
            with contextlib.suppress(BlockingIOError):
                more = os.read(out, 64)
                assert more, "it ended"
                said += more
    yield process
    async with asyncio.timeout(SECONDS):
        await process.wait()
    os.close(out)


@pytest.mark.parametrize("env", [{}, SEALED], ids=["plain", "sealed"])
async def test_killed_in_the_middle_it_goes_on_where_it_was(
    home: Path, database: str, env: dict[str, str], tmp_path: Path
) -> None:
    count = 64  # whose lines are more than the pipe takes
    many(home, count)
    moved = 0
    for times in (1, 2):
        async with begun("import", home, database, **env) as process:
            process.kill()
        ((moved,),) = stored(database, "SELECT count(*) FROM session_mappings")
        assert 0 < moved < count + 3, times
        whole = "SELECT count(DISTINCT sdk_session_id) FROM session_files JOIN session_mappings USING (sdk_session_id)"
        assert stored(database, whole) == [(moved,)]  # what is mapped is stored
    *_, counts = await move("import", home, database, env=env)
    assert (counts["threads"], counts["there"]) == (count + 3, moved)

    again = tmp_path / "again"
    for _ in range(2):
        async with begun("export", again, database, **env) as process:
            process.kill()
        assert not again.exists()
    with psycopg.connect(database) as connection:  # deleted meanwhile
        connection.execute("DELETE FROM session_mappings WHERE thread_id = 'made up 0'")
    *_, counts = await move("export", again, database, env=env)
    assert counts["there"] >= 19
    assert not list(tmp_path.glob(".*"))
    left = [row for row in mappings(home) if row[0] != "made up 0"]
    assert mappings(again) == left
    if not env:
        was = files(home)
        assert files(again) == {row[2]: was[row[2]] for row in left}
    else:
        with closing(sqlite3.connect(again / "transcripts.db")) as sealed:
            found = sealed.execute("SELECT DISTINCT sdk_session_id FROM session_files").fetchall()
        assert {session for (session,) in found} == {row[2] for row in left}


async def test_ctrl_c_breaks_it_off_and_a_person_sees_how_far_it_is(home: Path, database: str) -> None:
    many(home, 200)
    async with Terminal("", "import", "--home", str(home), "--database", database) as terminal:
        for _ in range(2):  # the second is of some
            await terminal.until("moved ")
        terminal.type(CTRL_C)
        assert await terminal.ended() == 130
        assert "broken off; it goes on where it was" in terminal.screen
    async with Terminal("", "import", "--home", str(home), "--database", database) as terminal:
        assert await terminal.ended() == 0
        assert "threads  203" in terminal.screen


def refused(ended: Ended, code: int, why: str) -> None:
    assert (ended.code, ended.out) == (code, "")
    assert why in ended.err
    assert "Traceback" not in ended.err


async def test_what_cannot_be_moved_is_refused_in_a_line(
    home: Path, database: str, tmp_path: Path, a_sidecar: Callable[..., Sidecar]
) -> None:
    refused(await command("", "import", "--home", str(home)), 2, "which database?")
    nowhere = ("--database", "postgresql://nobody@127.0.0.1:1/none")
    refused(await command("", "import", "--home", str(home), *nowhere), 1, "cannot be reached")
    there = ("--database", database)
    refused(await command("", "import", "--home", str(tmp_path / "no"), *there), 1, "no sidecar has run here")
    refused(await command("", "export", "--home", str(home), *there), 1, "is there already")
    refused(await command("", "export", "--home", str(tmp_path / "new"), *there), 1, "no session map in this database")
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    async with Sidecar(home, {**os.environ, **COLD, "SIDECAR_MODEL": "offline"}):
        refused(await command("", "import", "--home", str(home), *there), 1, "is in use by process")
    (home / "claude" / "session-sidecar.txt").unlink()
    refused(await command("", "import", "--home", str(home), *there), 1, "Mount ")


async def test_a_key_that_is_not_there_is_named_and_no_half_home_is_made(
    home: Path, database: str, tmp_path: Path
) -> None:
    await move("import", home, database, env=SEALED)
    ended = await command("", "export", "--home", str(tmp_path / "new"), "--database", database)
    assert ended.code == 1
    steps = [json.loads(line) for line in ended.out.splitlines()]
    assert ["'k1'" in step["why"] for step in steps] == [True] * 3
    assert "was not made, for want of 3 threads" in ended.err
    assert not (tmp_path / "new").exists()
    counts = (await move("export", tmp_path / "new", database, env=SEALED))[-1]
    assert counts["moved"] == 3


async def test_a_home_that_is_sealed_is_read_through_its_keys(
    home: Path, database: str, tmp_path: Path, model_env: dict[str, str]
) -> None:
    was = files(home)
    env = SEALED
    assert (await command("", "rotate", "--home", str(home), **env)).code == 0
    assert not any(files(home).values())
    *steps, _ = await move("import", home, database, code=1)
    assert ["'k1'" in step["why"] for step in steps] == [True] * 3
    assert stored(database, "SELECT 1 FROM session_files") == []
    counts = (await move("import", home, database, env=env))[-1]
    assert (counts["moved"], counts["bytes"]) == (3, sum(len(d) for s in was.values() for d in s.values()))
    assert not any(files(home).values())  # nothing of it is left there plain
    await move("export", tmp_path / "new", database, env=env)
    async with Sidecar(tmp_path / "new", {**model_env, **COLD, **env}) as sidecar:
        assert "First: My name is Ada; last: And?" in await sidecar.say("by train", "And?")


async def test_beside_replicas_what_is_stored_of_a_running_turn_is_copied_and_named(
    database: str, some_replicas: Make, knows: Know, model: FaultyModel, tmp_path: Path, model_env: dict[str, str]
) -> None:
    new = tmp_path / "new"
    async with some_replicas(1) as (replica,):
        await knows(replica, "at rest")
        await replica.say("t", "My name is Eve")
        async with replica.stream("t", "[[hold 1]]") as stream:
            await stream.until_text()
            *steps, counts = await move("export", new, database, code=1)
            model.release()
            await stream.rest()
    assert {step["thread_id"]: step["outcome"] for step in steps} == {"at rest": "moved", "t": "running"}
    assert (counts["moved"], counts["running"]) == (1, 1)
    async with Sidecar(new, {**model_env, **COLD}) as sidecar:
        assert "First: My name is Eve" in await sidecar.say("t", "Who am I?")
