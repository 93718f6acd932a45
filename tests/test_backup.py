"""Backups: taken beside turns that run, whole or not there at all, and what is made of one goes on anywhere."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultyModel
from tests.forked import Forked
from tests.modes import COLD, KEPT, in_both_modes
from tests.replicas import Know
from tests.server import SECONDS, Sidecar, a_moment
from tests.terminal import Ended, command, environment, shell
from tests.transcripts import messages, texts
from tests.volume import mounted

Make = Callable[..., Sidecar]


async def back_up(home: Path, directory: Path) -> dict[str, Any]:
    """`session-sidecar backup`, which is expected to make one; what it says."""
    ended = await command("", "backup", "--home", str(home), str(directory))
    assert ended.code == 0, ended.err
    assert not list(directory.parent.glob(".*.partial"))
    made: dict[str, Any] = json.loads(ended.out)
    return made


async def restore(directory: Path, home: Path) -> dict[str, Any]:
    """`session-sidecar restore`, the same way."""
    ended = await command("", "restore", "--home", str(home), str(directory))
    assert ended.code == 0, ended.err
    held: dict[str, Any] = json.loads(ended.out)
    return held


async def findings(home: Path) -> list[dict[str, Any]]:
    """What the doctor finds in a home, or in a backup, as that is laid out as one."""
    found: list[dict[str, Any]] = json.loads((await command("", "doctor", "--json", "--home", str(home))).out)[
        "findings"
    ]
    return found


def refused(ended: Ended, why: str) -> None:
    assert ended.code == 1
    assert ended.out == ""
    assert re.fullmatch(f"Error: .*{why}.*\n", ended.err), ended.err


def transcripts(home: Path) -> dict[str, Path]:
    """All transcripts by session; it fails if a session has two."""
    found = list(home.glob("claude/projects/*/*.jsonl"))
    assert len({path.stem for path in found}) == len(found)
    return {path.stem: path for path in found}


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@in_both_modes
async def test_a_backup_taken_with_turns_running_goes_on_at_another_path(
    a_sidecar: Make, mode: str, knows: Know, model_env: dict[str, str], model: FaultyModel, tmp_path: Path
) -> None:
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    async with a_sidecar() as sidecar:
        for thread in ("at rest", "in its second turn"):
            if mode == "warm":
                await sidecar.say(thread, "My name is Ada")
            else:
                await knows(sidecar, thread)
        ids = {thread: await sidecar.session_id(thread) for thread in ("at rest", "in its second turn")}
        async with AsyncExitStack() as open_streams:
            streams = []
            for thread in ("in its second turn", "new"):
                stream = await open_streams.enter_async_context(sidecar.stream(thread, "[[hold 2]] Hello"))
                await stream.until_text()
                streams.append(stream)
            ids["new"] = streams[1].events[0].data["sdk_session_id"]
            made = await back_up(sidecar.home, copy)
            assert made["mappings"] == 3
            assert [finding for finding in await findings(copy) if finding["kind"] != "dead_mapping"] == []
            model.release()
            for stream in streams:
                assert (await stream.rest())[-1].data["status"] == "completed"
        assert texts(await messages(sidecar, "new"))[1].startswith("You have said 1 thing")
        before = {name: path.read_bytes() for name, path in transcripts(sidecar.home).items()}

        assert (await restore(copy, elsewhere))["mappings"] == 3
        async with Sidecar(elsewhere, {**sidecar.env, **model_env}) as restored:
            assert {thread: await restored.session_id(thread) for thread in ids} == ids
            for thread in ("at rest", "in its second turn"):
                answer = (await restored.chat(thread, "Who am I?")).json()
                assert (answer["session"]["outcome"], answer["session"]["sdk_session_id"]) == ("resumed", ids[thread])
                assert "First: My name is Ada; last: Who am I?" in answer["text"]
                assert "First: My name is Ada; last: And now?" in await restored.say(thread, "And now?")
            # Of the first turn of a thread there may be a part in the transcript, or not even that.
            assert (await restored.chat("new", "Go on")).json()["status"] == "completed"
            assert await restored.session_id("new") == ids["new"]
            assert transcripts(elsewhere).keys() == set(ids.values())
            assert (await restored.history("at rest"))[0] == ("user", "My name is Ada")
        assert await findings(elsewhere) == []
        assert all(path.read_bytes().startswith(before[name]) for name, path in transcripts(sidecar.home).items())
        assert "You have said 2 things" in await sidecar.say("at rest", "Who am I here?")


@pytest.mark.long
async def test_at_whatever_moment_of_many_turns_it_is_taken_each_of_its_mappings_can_go_on(
    a_sidecar: Make, model_env: dict[str, str], tmp_path: Path
) -> None:
    async def talk(number: int) -> None:
        for turn in range(1000):
            await sidecar.say(f"thread {number}, {turn // 3}", f"[[pace 0.01]] This is turn {turn % 3}")

    async with a_sidecar(**KEPT) as sidecar:
        await sidecar.say("the first", "My name is Ada")
        talks = [asyncio.create_task(talk(number)) for number in range(3)]
        for number in range(5):
            ended = len(sidecar.logged("turn"))
            while len(sidecar.logged("turn")) < ended + 2:
                await a_moment()
            await back_up(sidecar.home, tmp_path / f"copy-{number}")
        assert not any(talk.done() for talk in talks)
        for task in talks:
            task.cancel()
        await asyncio.wait(talks)
    resumed = 0
    copies = [tmp_path / f"copy-{number}" for number in range(5)]
    for copy in copies:
        for finding in await findings(copy):
            assert finding["kind"] == "dead_mapping" or finding["harmless"]
            assert finding["harmless"] or "first turn never came to an end" in finding["what"]
        for path in transcripts(copy).values():
            assert [json.loads(line) for line in path.read_bytes().splitlines()]  # none is torn
        resumed += len(transcripts(copy))
    assert resumed > 5  # else nothing was happening meanwhile
    await restore(copies[-1], tmp_path / "elsewhere")
    async with Sidecar(tmp_path / "elsewhere", {**sidecar.env, **model_env}) as restored:
        newest = (await restored.http.get("/v1/sessions", params={"limit": 12})).json()["data"]
        for row in newest:
            assert (await restored.chat(row["thread_id"], "Go on")).json()["status"] == "completed"
            assert await restored.session_id(row["thread_id"]) == row["sdk_session_id"]
        assert "First: My name is Ada" in await restored.say("the first", "Who am I?")


async def test_half_a_line_is_left_out_and_a_whole_one_without_its_end_is_not(home: Path, tmp_path: Path) -> None:
    torn, unended = sorted(transcripts(home).values())
    as_it_was = torn.read_bytes()
    torn.write_bytes(as_it_was + b'{"type":"user","uuid":"' + b"x" * 100_000)  # longer than what is read at once
    unended.write_bytes(unended.read_bytes().removesuffix(b"\n"))
    await back_up(home, tmp_path / "copy")
    copied = transcripts(tmp_path / "copy")
    assert copied[torn.stem].read_bytes() == as_it_was
    assert copied[unended.stem].read_bytes() == unended.read_bytes() + b"\n"
    assert copied[torn.stem].stat().st_mtime_ns == torn.stat().st_mtime_ns


async def test_it_holds_what_conversations_need_and_no_login_and_is_private(home: Path, tmp_path: Path) -> None:
    config, workspace = home / "claude", home / "workspace"
    session = next(iter(transcripts(home).values())).with_suffix("")
    kept = {
        session / "subagents" / "agent-1.jsonl": "{}\n",
        session / "tool-results" / "1.txt": "half a line",
        config / "settings.json": "{}",
        config / "skills" / "one" / "SKILL.md": "A skill",
        config / "file-history" / session.name / "1": "a file",
        workspace / "notes" / "a.jsonl": "half a line",
    }
    secret = (".credentials.json", ".claude.json", "backups/.claude.json.backup.1", "sessions/1.json", "debug/log")
    for path, text in {**kept, **{config / name: "s3cret" for name in secret}, home / "tmp" / "x": "s3cret"}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
    (workspace / "run.sh").write_text("#!/bin/sh\n")
    (workspace / "run.sh").chmod(0o755)
    (workspace / "link").symlink_to("run.sh")
    os.mkfifo(workspace / "pipe")

    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    ended = await command("", "backup", "--home", str(home), str(copy))
    assert ended.code == 0
    assert "left out of the CLI's directory: .claude.json, .credentials.json, backups, debug" in ended.err
    assert "s3cret" not in str(everything(copy))
    await restore(copy, elsewhere)
    for place in (copy, elsewhere):
        for path, text in kept.items():
            assert (place / path.relative_to(home)).read_text() == text
        assert (place / "workspace" / "link").readlink() == Path("run.sh")
        assert not (place / "workspace" / "pipe").exists()
        modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in place.rglob("*") if not path.is_symlink()}
        assert {name for name, mode in modes.items() if mode & 0o077} == set()
        assert modes["run.sh"] == 0o700
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [name for name in everything(elsewhere) if name.startswith("sidecar.db")] == [
        "sidecar.db",
        "sidecar.db.lock",
    ]


async def test_what_is_reached_by_two_links_is_copied_once(home: Path, tmp_path: Path) -> None:
    own = next(iter(transcripts(home).values()))
    projects, volume = own.parent.parent, tmp_path / "volume"
    (projects / "-moved").symlink_to(own.parent)
    projects.rename(volume)  # all of them lie elsewhere
    projects.symlink_to(volume)
    (volume / "-moved").unlink()
    (volume / "-moved").symlink_to(volume / own.parent.name)
    await back_up(home, tmp_path / "copy")
    assert len(transcripts(tmp_path / "copy")) == 2
    assert not (tmp_path / "copy" / "claude" / "projects").is_symlink()


def fill(home: Path) -> None:
    """So much that there is time to break off what copies it."""
    for directory in (home / "workspace", next(iter(transcripts(home).values())).with_suffix("")):
        directory.mkdir(exist_ok=True)
        for number in range(600):
            (directory / f"{number}.txt").write_text("x")


async def begun(*arguments: str) -> Forked:
    """A command that runs, and is there at once: looking for what it has done takes a whole core."""
    return await Forked.start(*arguments, env=environment(""), streams=(0, 1, 2))


async def killed(*arguments: str, when: Callable[[], bool]) -> None:
    """A command that is killed as soon as something is so."""
    process = await begun(*arguments)
    async with asyncio.timeout(SECONDS):
        while not when():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0)
    process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL


async def test_a_thread_that_begins_while_transcripts_are_copied_is_no_mapping_without_one(
    a_sidecar: Make, tmp_path: Path, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "t1")
        fill(sidecar.home)
        copy = tmp_path / "copies" / "copy"
        process = await begun("backup", "--home", str(sidecar.home), str(copy))
        async with asyncio.timeout(SECONDS):
            while not list(tmp_path.glob("copies/.copy.*.partial/claude/projects/*/*")):  # noqa: ASYNC110
                await asyncio.sleep(0)
        process.send_signal(signal.SIGSTOP)
        await sidecar.say("t2", "Hello")
        process.send_signal(signal.SIGCONT)
        assert await process.wait() == 0
    assert [finding for finding in await findings(copy) if not finding["harmless"]] == []
    assert json.loads((copy / "backup.json").read_text())["mappings"] == 1


@pytest.mark.parametrize("reached", ["sidecar.db", "workspace/1.txt", "claude/projects/*/*/1.txt"])
async def test_a_backup_that_is_killed_leaves_nothing_that_restore_takes(
    home: Path, tmp_path: Path, reached: str
) -> None:
    fill(home)
    copy = tmp_path / "copies" / "copy"
    arguments = ("backup", "--home", str(home), str(copy))
    await killed(*arguments, when=lambda: bool(list(tmp_path.glob(f"copies/.copy.*.partial/{reached}"))))
    (partial,) = copy.parent.iterdir()
    for directory in (copy, partial):
        ended = await command("", "restore", "--home", str(tmp_path / "elsewhere"), str(directory))
        refused(ended, "is no backup, or not a whole one")
    assert not (tmp_path / "elsewhere").exists()
    shutil.rmtree(partial)
    await back_up(home, copy)


async def test_in_a_home_whose_restore_was_killed_no_turn_is_run_and_no_mapping_changed(
    home: Path, tmp_path: Path, model_env: dict[str, str], model: FaultyModel
) -> None:
    fill(home)
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    await back_up(home, copy)
    (elsewhere / "claude").mkdir(parents=True)
    (elsewhere / "claude" / "session-sidecar.txt").touch()  # of a sidecar that has run there without any turn
    arguments = ("restore", "--home", str(elsewhere), str(copy))
    await killed(*arguments, when=lambda: bool(list(elsewhere.glob("claude/projects/*/*"))))
    refused(await command("", *arguments), "a restore has left that was broken off: .* move the directory away")
    async with Sidecar(elsewhere, model_env | COLD) as sidecar:
        before = await sidecar.session_id("t1")
        answer = await sidecar.chat("t1", "Who am I?")
        assert (answer.status_code, answer.json()["code"]) == (503, "transcripts_unavailable")
        assert await sidecar.session_id("t1") == before
    shutil.rmtree(elsewhere)
    await restore(copy, elsewhere)
    async with Sidecar(elsewhere, model_env | COLD) as sidecar:
        assert "First: My name is Ada" in await sidecar.say("t1", "Who am I?")


async def test_ctrl_c_leaves_nothing_of_a_backup(home: Path, tmp_path: Path) -> None:
    fill(home)
    copy = tmp_path / "copies" / "copy"
    process = await begun("backup", "--home", str(home), str(copy))
    async with asyncio.timeout(SECONDS):
        while not list(tmp_path.glob("copies/.copy.*.partial/workspace/1.txt")):  # noqa: ASYNC110
            await asyncio.sleep(0)
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 1
    assert list(copy.parent.iterdir()) == []


async def test_where_a_backup_cannot_be_it_says_so_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    for directory, why in {
        tmp_path / "full": "is there already: name a directory that is not, or is empty",
        home / "claude" / "copy": "is in the home",
        home: "is in the home",
        tmp_path / "file" / "copy": "File exists",
    }.items():
        refused(await command("", "backup", "--home", str(home), str(directory)), why)
    assert {name: text for name, text in everything(tmp_path).items() if "sidecar.db-" not in name} == before
    (tmp_path / "empty").mkdir()
    await back_up(home, tmp_path / "empty")


async def test_a_volume_is_not_taken_for_a_directory_and_a_full_one_is_told(home: Path, tmp_path: Path) -> None:
    (home / "workspace" / "large").write_bytes(b"x" * 2**20)
    with mounted(tmp_path / "volume") as volume:
        ended = await command("", "backup", "--home", str(home), str(tmp_path / "volume"))
        refused(ended, "is a mount point, which cannot be renamed to: name a directory in it")
        await back_up(home, tmp_path / "volume" / "first")
        volume.fill()
        ended = await command("", "backup", "--home", str(home), str(tmp_path / "volume" / "second"))
        refused(ended, "[Mm]ake room")
        assert {path.name for path in (tmp_path / "volume").iterdir()} == {"first", "ballast"}


async def test_a_home_that_is_not_whole_is_not_backed_up(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    nowhere = await command("", "backup", "--home", str(tmp_path / "nowhere"), str(copy))
    refused(nowhere, "no sidecar has run here, so name another --home")
    (home / "claude" / "session-sidecar.txt").unlink()  # as with a volume that is not mounted
    refused(await command("", "backup", "--home", str(home), str(copy)), f"Mount {home}/claude")
    (home / "claude" / "session-sidecar.txt").touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # nobody can say what is behind it: as with a directory of another user
    (home / "claude" / "projects" / "-loop").symlink_to(loop)
    refused(await command("", "backup", "--home", str(home), str(copy)), "-loop .*symbolic links")
    (home / "claude" / "projects" / "-loop").unlink()
    loop.unlink()
    with (home / "sidecar.db").open("r+b") as database:
        database.seek(4096)
        database.write(b"x" * 4096)
    refused(await command("", "backup", "--home", str(home), str(copy)), "damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


async def test_nothing_is_restored_over_conversations_or_from_what_is_not_whole(
    home: Path, tmp_path: Path, a_sidecar: Make, model_env: dict[str, str]
) -> None:
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    await back_up(home, copy)
    before = everything(home / "claude")
    refused(await command("", "restore", "--home", str(home), str(copy)), "holds conversations")
    (home / "sidecar.db").unlink()
    refused(await command("", "restore", "--home", str(home), str(copy)), "holds conversations")
    assert everything(home / "claude") == before
    async with Sidecar(tmp_path / "running", model_env | COLD) as sidecar:
        (sidecar.home / "sidecar.db").unlink()
        ended = await command("", "restore", "--home", str(sidecar.home), str(copy))
        refused(ended, f"is in use by process {sidecar.process.pid}")
        assert (sidecar.home / "claude" / "session-sidecar.txt").exists()
    lost = next(iter(transcripts(copy).values()))
    aside = lost.rename(tmp_path / "aside")
    refused(await command("", "restore", "--home", str(elsewhere), str(copy)), "does not hold what was backed up")
    refused(await command("", "restore", "--home", str(elsewhere), str(home)), "is no backup")
    assert not elsewhere.exists()
    aside.rename(lost)
    note = json.loads((copy / "backup.json").read_text())
    (copy / "backup.json").write_text(json.dumps({**note, "format": 3, "made_by": "9.9.9"}))
    refused(await command("", "restore", "--home", str(elsewhere), str(copy)), "made by version 9.9.9")


async def test_what_an_operator_has_put_into_the_new_home_stays(home: Path, tmp_path: Path) -> None:
    (home / "claude" / "settings.json").write_text('{"of": "the old home"}')
    await back_up(home, tmp_path / "copy")
    new = tmp_path / "elsewhere" / "claude"
    new.mkdir(parents=True)
    (new / "settings.json").write_text('{"of": "the new home"}')
    (new / ".credentials.json").write_text("{}")
    await restore(tmp_path / "copy", tmp_path / "elsewhere")
    assert (new / "settings.json").read_text() == '{"of": "the new home"}'
    assert (new / ".credentials.json").read_text() == "{}"
    assert await findings(tmp_path / "elsewhere") == []


async def test_what_was_committed_and_is_still_in_the_log_is_in_the_backup(home: Path, tmp_path: Path) -> None:
    """As it is beside a running sidecar, and after one that was killed."""
    with closing(sqlite3.connect(home / "sidecar.db", isolation_level=None)) as database:
        database.execute("DELETE FROM session_mappings WHERE thread_id = 't2'")
        assert (home / "sidecar.db-wal").stat().st_size
        assert (await back_up(home, tmp_path / "copy"))["mappings"] == 1
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        *("backup.json", "claude", "sidecar.db", "workspace"),
    ]


async def test_the_examples_of_the_help_work_as_they_stand(home: Path, tmp_path: Path) -> None:
    home.rename(tmp_path / "var")
    for name in ("backup", "restore"):
        told = (await command("", name, "--help")).out
        for example in re.findall(r"^ {4}(session-sidecar .*)", told, re.MULTILINE):
            ended = await shell("", f"cd {tmp_path} && {example}")
            assert ended.code == 0, (example, ended)
    assert transcripts(tmp_path / "elsewhere").keys() == transcripts(tmp_path / "var").keys()


async def test_what_is_stored_sealed_is_in_the_backup_taken_beside_turns(
    home: Path, model_env: dict[str, str], tmp_path: Path
) -> None:
    keys = {"SIDECAR_ENCRYPTION_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}"}
    assert (await command("", "rotate", "--home", str(home), **keys)).code == 0
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    async with Sidecar(home, {**model_env, **COLD, **keys}) as sidecar:
        await sidecar.say("t1", "I like tea")
        talking = asyncio.create_task(sidecar.say("t2", "[[pace 0.05]] a long answer"))
        made = await back_up(home, copy)
        await talking
    assert (made["mappings"], made["transcripts"], made["format"]) == (2, 2, 2)
    assert stat.S_IMODE((copy / "transcripts.db").stat().st_mode) == 0o600
    assert [path.name for path in copy.glob("transcripts.db*")] == ["transcripts.db"]
    ended = await command("", "doctor", "--json", "--home", str(copy), **keys)
    assert json.loads(ended.out)["findings"] == []
    assert (await restore(copy, elsewhere))["transcripts"] == 2
    async with Sidecar(elsewhere, {**model_env, **COLD, **keys}) as restored:
        assert "First: My name is Ada; last: And?" in await restored.say("t1", "And?")
        assert "First: My name is Ada; last: And?" in await restored.say("t2", "And?")
    (elsewhere / "sidecar.db").unlink()
    refused(await command("", "restore", "--home", str(elsewhere), str(copy)), "holds conversations")
    (copy / "transcripts.db").unlink()
    refused(
        await command("", "restore", "--home", str(tmp_path / "new"), str(copy)), "does not hold what was backed up"
    )


async def test_of_a_database_that_replicas_share_its_own_tools_make_copies(home: Path, tmp_path: Path) -> None:
    shared = {"SIDECAR_DATABASE": "postgresql://nobody@127.0.0.1:1/none"}
    copy = tmp_path / "copy"
    refused(await command("", "backup", "--home", str(home), str(copy), **shared), "use pg_dump")
    await back_up(home, copy)
    refused(await command("", "restore", "--home", str(tmp_path / "new"), str(copy), **shared), "use pg_restore")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "copy"}
