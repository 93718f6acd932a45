"""The doctor: finds what the session map and the disk do not agree on, and mends it without losing anything unasked."""

import asyncio
import base64
import json
import os
import pty
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from session_store.postgres.migrations import migrate
from tests.faults import FaultyModel
from tests.forked import Forked, reading
from tests.modes import COLD
from tests.replicas import Know
from tests.replicas import Make as Fleet
from tests.server import SECONDS, Sidecar, gone
from tests.terminal import command, environment, installed

pytestmark = pytest.mark.long  # `make test-all`

Make = Callable[..., Sidecar]


async def run(home: Path, *options: str, stdin: int | None = None, **env: str) -> tuple[int, str]:
    """`session-sidecar doctor`: its exit status and what it printed."""
    out, its_out = os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    process = await Forked.start(
        *("doctor", "--home", str(home), *options),
        env=environment("", **env),
        streams=(nothing if stdin is None else stdin, its_out, its_out),
    )
    os.close(nothing)
    os.close(its_out)
    async with asyncio.timeout(SECONDS):
        said = await (await reading(out)).read()
        return await process.wait(), said.decode()


async def report(home: Path, *options: str, **env: Any) -> dict[str, Any]:
    """What `--json` says; its exit status tells the same."""
    ended = await command("", "doctor", "--home", str(home), "--json", *options, **env)
    found: dict[str, Any] = json.loads(ended.out)
    assert ended.code == (0 if found["healthy"] else 1)
    return found


def kinds(found: dict[str, Any]) -> list[str]:
    return [finding["kind"] for finding in found["findings"]]


def change(home: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(home / "sidecar.db")) as database, database:
        database.execute(statement, values)


def transcript(home: Path, thread: str) -> Path:
    with closing(sqlite3.connect(home / "sidecar.db")) as database:
        rows = database.execute("SELECT sdk_session_id FROM session_mappings WHERE thread_id = ?", (thread,))
        return next(home.glob(f"claude/projects/*/{rows.fetchone()[0]}.jsonl"))


@pytest.mark.smoke
async def test_a_home_that_was_left_in_order_is_healthy_and_stays_as_it_is(home: Path) -> None:
    found = await report(home)
    assert found == {
        "home": str(home),
        "healthy": True,
        "in_use": None,
        "mappings": 2,
        "transcripts": 2,
        "findings": [],
    }
    assert await run(home) == (0, "healthy (2 mappings, 2 transcripts)\n")
    ended = await installed("", "doctor", "--home", str(home), "--json", "--fix")
    assert (ended.code, json.loads(ended.out)["healthy"]) == (0, True)


@pytest.mark.smoke
async def test_a_mapping_whose_transcript_is_gone_is_removed_only_if_a_person_says_so(home: Path) -> None:
    transcript(home, "t1").unlink()
    for options in ((), ("--fix",)):
        found = await report(home, *options)
        assert kinds(found) == ["dead_mapping"]
        assert (found["findings"][0]["thread_id"], found["findings"][0]["fixed"]) == ("t1", False)
    status, out = await run(home, "--fix")
    assert status == 1
    assert "on a terminal to be asked" in out
    for answer, left in ((b"n\n", 1), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        status, out = await run(home, "--fix", stdin=theirs)
        os.close(ours)
        os.close(theirs)
        assert "Remove 1 mapping(s) whose conversation is gone?" in out
        assert status == left
    assert (await report(home))["mappings"] == 1


async def test_a_mapping_whose_first_turn_never_ended_is_removed(home: Path) -> None:
    columns = "(thread_id, resource_id, sdk_session_id, created_at, updated_at)"
    change(home, f"INSERT INTO session_mappings {columns} VALUES ('new', 'alice', ?, 0, 0)", str(uuid.uuid4()))
    assert kinds(await report(home)) == ["dead_mapping"]
    found = await report(home, "--fix")
    assert (found["healthy"], found["findings"][0]["fixed"]) == (True, True)
    assert (await report(home))["findings"] == []


async def test_a_transcript_that_cannot_be_resumed_is_left_to_a_person(home: Path) -> None:
    transcript(home, "t1").write_text("garbage\n")
    for _ in range(2):
        found = await report(home, "--fix")
        assert kinds(found) == ["dead_mapping"]
        assert "cannot resume" in found["findings"][0]["what"]


async def test_a_session_with_two_transcripts_is_left_to_a_person(home: Path) -> None:
    own = transcript(home, "t1")
    copy = own.parent.parent / "-restored" / own.name
    copy.parent.mkdir()
    copy.write_bytes(own.read_bytes()[:-10])
    for _ in range(2):
        (finding,) = (await report(home, "--fix"))["findings"]
        assert (finding["kind"], finding["thread_id"], finding["fixed"]) == ("session_ambiguous", "t1", False)
        assert finding["paths"] == sorted([str(own), str(copy)])
        assert f"{copy} ({copy.stat().st_size} bytes" in finding["what"]
    copy.unlink()
    assert (await report(home))["healthy"]


async def test_what_no_thread_has_is_deleted_only_if_a_person_says_so(home: Path) -> None:
    kept = transcript(home, "t2")
    stray = transcript(home, "t1")
    change(home, "DELETE FROM session_mappings WHERE thread_id = 't1'")
    aside = kept.with_suffix(".unreadable-1")
    aside.write_text("old")
    alone = kept.with_name(str(uuid.uuid4())) / "subagents"
    alone.mkdir(parents=True)
    found = await report(home, "--fix")
    assert kinds(found) == ["unmapped_transcript", "leftover", "leftover"]
    assert found["findings"][0]["sdk_session_id"] == stray.stem
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\n")
    status, _ = await run(home, "--fix", stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert status == 0
    assert [path.exists() for path in (stray, aside, alone, kept)] == [False, False, False, True]


async def test_what_a_deletion_has_kept_is_nothing_to_complain_of(home: Path) -> None:
    stray = transcript(home, "t1")
    change(home, "DELETE FROM session_mappings WHERE thread_id = 't1'")
    found = await report(home)
    assert (found["healthy"], kinds(found), found["findings"][0]["harmless"]) == (True, ["unmapped_transcript"], True)
    status, out = await run(home)
    assert status == 0
    assert f"kept: 1 transcript(s) that no thread has, as deletions leave them by default ({stray.stem})" in out
    assert out.endswith("healthy (1 mappings, 2 transcripts)\n")
    status, out = await run(home, "--fix")
    assert (status, stray.exists()) == (0, True)
    assert "on a terminal to be asked" in out


async def test_a_config_directory_that_is_not_mounted_is_one_finding_and_not_one_a_mapping(home: Path) -> None:
    (home / "claude").rename(home / "unmounted")
    (home / "claude").mkdir()
    found = await report(home, "--fix")
    assert kinds(found) == ["no_marker"]
    assert found["mappings"] == 2


@pytest.mark.parametrize(("written", "expected"), [('{"cleanupPeriodDays": 30}', ["sweeping"]), ("{}", []), ("{", [])])
async def test_a_config_directory_that_a_cli_would_sweep_is_found(
    home: Path, written: str, expected: list[str]
) -> None:
    (home / "claude" / "settings.json").write_text(written)
    assert kinds(await report(home)) == expected


async def test_a_cli_that_runs_without_a_sidecar_is_ended(home: Path) -> None:
    env = {**os.environ, "CLAUDE_CONFIG_DIR": str(home / "claude")}
    process = await asyncio.create_subprocess_exec("sleep", "60", env=env)
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    entry = {"pid": process.pid, "procStart": started, "sessionId": transcript(home, "t1").stem}
    (home / "claude" / "sessions" / f"{process.pid}.json").write_text(json.dumps(entry))
    found = await report(home)
    assert (kinds(found), found["findings"][0]["pid"]) == (["live_cli"], process.pid)
    assert process.returncode is None
    assert (await report(home, "--fix"))["healthy"]
    assert await gone([process.pid])
    await process.wait()


async def test_a_damaged_database_is_a_finding(home: Path) -> None:
    (home / "sidecar.db").write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    found = await report(home, "--fix")
    assert kinds(found) == ["database"]


async def test_a_home_where_no_sidecar_ran_is_not_made_one(tmp_path: Path) -> None:
    status, out = await run(tmp_path / "nowhere")
    assert status == 2
    assert "no sidecar has run here" in out
    assert not (tmp_path / "nowhere").exists()


async def test_beside_a_running_sidecar_it_reads_and_does_not_mend(
    a_sidecar: Make, thread: str, model: FaultyModel, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "t1")
        await knows(sidecar, "t2")
        async with sidecar.stream("new", "Hello [[hold 1]]") as stream:
            await stream.until_text()
            found = await report(sidecar.home)
            assert (found["healthy"], found["mappings"], found["findings"]) == (True, 3, [])
            assert str(sidecar.process.pid) in found["in_use"]
            status, out = await run(sidecar.home, "--fix")
            assert status == 2
            assert "is in use by process" in out
            model.release()
            await stream.rest()
        assert "First: Hello" in await sidecar.say("new", "And?")
        (sidecar.home / "claude" / "settings.json").write_text('{"cleanupPeriodDays": 1}')
        assert kinds(await report(sidecar.home)) == ["sweeping"]


async def test_what_is_stored_sealed_is_not_gone(home: Path) -> None:
    keys = {"SIDECAR_ENCRYPTION_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}"}
    assert (await command("", "rotate", "--home", str(home), **keys)).code == 0
    for options in ((), ("--fix",)):
        found = await report(home, *options, **keys)
        assert (found["healthy"], found["mappings"], found["transcripts"], found["findings"]) == (True, 2, 2, [])
        (finding,) = (await report(home, *options))["findings"]
        assert (finding["kind"], finding["key_id"], finding["conversations"]) == ("key_missing", "k1", 2)
    with closing(sqlite3.connect(home / "transcripts.db")) as database, database:
        database.execute("DELETE FROM session_files WHERE rowid = 1")
    assert kinds(await report(home, **keys)) == ["dead_mapping"]
    change(home, "UPDATE session_mappings SET updated_at = 0")  # beside a running one, what was just used is left out
    async with Sidecar(home, {**os.environ, **COLD, **keys, "SIDECAR_MODEL": "offline"}):
        assert kinds(await report(home, **keys)) == ["dead_mapping"]


async def test_of_a_replica_it_knows_what_is_stored_and_destroys_nothing(
    home: Path, database: str, some_replicas: Fleet, model: FaultyModel, knows: Know
) -> None:
    shared: dict[str, Any] = {"SIDECAR_DATABASE": database}
    status, out = await run(home, **shared)
    assert (status, "no sidecar has run here" in out) == (2, True)
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        async with one.stream("new", "Hello [[hold 1]]") as stream:
            await stream.until_text()
            for replica in (one, other):
                found = await report(replica.home, **shared)
                assert (found["healthy"], found["mappings"], found["findings"]) == (True, 2, [])
                assert "is in use by another process" in found["in_use"]
            assert (await run(one.home, "--fix", **shared))[0] == 2
            model.release()
            await stream.rest()
    found = await report(one.home, "--fix", **shared)
    assert (found["healthy"], found["mappings"], found["transcripts"], found["in_use"]) == (True, 2, 2, None)
    with psycopg.connect(database) as connection:
        connection.execute("DELETE FROM session_files")
    assert (await report(one.home, "--fix", **shared))["healthy"]  # it has them here, and stores them again
    (finding, _) = (await report(other.home, "--fix", **shared))["findings"]
    assert (finding["kind"], finding["fixed"]) == ("dead_mapping", False)
    assert "no transcript of it is stored" in finding["what"]


async def test_threads_that_are_yet_to_be_imported_have_their_transcripts(home: Path, database: str) -> None:
    (home / "replica").touch()
    env = {"SIDECAR_DATABASE": database}
    assert kinds(await report(home, **env)) == ["database"]  # there is nothing in it yet
    async with await psycopg.AsyncConnection.connect(database) as connection:
        await migrate(connection)
    found = await report(home, "--fix", **env)
    assert (found["healthy"], found["mappings"], found["findings"]) == (True, 0, [])
    assert len(list(home.glob("claude/projects/*/*.jsonl"))) == 2
