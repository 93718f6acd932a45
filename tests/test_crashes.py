"""kill -9 at any instant: afterwards every mapping resumes, or restarts under its own ID, and no process is left."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from tests.copies import become_known
from tests.faults import FaultyModel
from tests.modes import COLD, NO_SPARE, in_both_modes
from tests.server import SECONDS, Sidecar, Stream, a_moment, gone, parting
from tests.transcripts import metadata

pytestmark = [pytest.mark.long, in_both_modes]

Make = Callable[..., Sidecar]


async def at_init(stream: Stream) -> None:
    await stream.until("session")


async def soon_after_init(stream: Stream) -> None:
    await stream.until("session")
    await asyncio.sleep(0.05)  # about when the transcript appears; any instant will do


async def in_mid_answer(stream: Stream) -> None:
    await stream.until_text("You have")


async def at_the_result(stream: Stream) -> None:
    await stream.until("result")


async def at_the_end(stream: Stream) -> None:
    await stream.until("end")


MOMENTS = [at_init, soon_after_init, in_mid_answer, at_the_result, at_the_end]


def prompt_for(moment: Callable[[Stream], object]) -> str:
    """A prompt whose answer waits where the blow is to fall."""
    return "Hello [[hold 3]]" if moment is in_mid_answer else "Hello"


async def goes_on(sidecar: Sidecar, thread: str, session_id: str, *, known: bool) -> None:
    """The next turn has the session that the thread had, and the history is one chain."""
    answer = (await sidecar.chat(thread, "Go on")).json()
    assert answer["status"] == "completed", answer
    assert answer["session"]["sdk_session_id"] == session_id == await sidecar.session_id(thread)
    if known:
        assert answer["session"]["outcome"] == "resumed"
        assert "First: My name is Ada" in answer["text"]
    history = await sidecar.history(thread)
    assert history[-2] == ("user", "Go on")


async def restart_for_what_is_there(sidecar: Sidecar) -> None:
    """Start it again without a spare: no new thread is to come."""
    sidecar.env |= NO_SPARE
    await sidecar.restart()


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    """An agents file: `deadly` has a CLI that kills the sidecar as soon as it is started."""
    cli = tmp_path / "claude"
    cli.write_text("#!/bin/sh\nkill -9 $PPID\nsleep 60\n")
    cli.chmod(0o700)
    agents = tmp_path / "agents.toml"
    agents.write_text(f'[default]\n[deadly]\ncli_path = "{cli}"\n')
    return agents


@pytest.mark.parametrize("moment", [pytest.param(moment, id=moment.__name__) for moment in MOMENTS])
@pytest.mark.parametrize("known", [False, True], ids=["new thread", "known thread"])
async def test_the_sidecar_is_killed(
    a_sidecar: Make, home: Path, thread: str, mode: str, moment: Callable[[Stream], object], known: bool
) -> None:
    async with a_sidecar(**(NO_SPARE if known else {})) as sidecar:
        if known:
            thread = await become_known(sidecar, thread, mode)
        with contextlib.suppress(httpx.HTTPError):
            async with sidecar.stream(thread, prompt_for(moment)) as stream:
                await moment(stream)  # type: ignore[misc]
                processes = sidecar.cli_processes()
                await sidecar.stop(signal.SIGKILL)
        assert await gone(processes, SECONDS)
        session_id = str(stream.events[0].data["sdk_session_id"])
        await restart_for_what_is_there(sidecar)
        await goes_on(sidecar, thread, session_id, known=known)


@pytest.mark.parametrize("known", [False, True], ids=["new thread", "known thread"])
async def test_the_sidecar_is_killed_when_the_mapping_is_committed_and_the_agent_not_begun(
    a_sidecar: Make, home: Path, thread: str, deadly: Path, mode: str, known: bool
) -> None:
    async with a_sidecar("--agents", str(deadly), **NO_SPARE) as sidecar:  # a spare would kill it
        if known:
            thread = await become_known(sidecar, thread, mode)
        with pytest.raises(httpx.HTTPError):
            await sidecar.chat(thread, "Hello", agent="deadly")
        await sidecar.wait()
        await sidecar.restart()
        await goes_on(sidecar, thread, await sidecar.session_id(thread), known=known)


async def test_a_crash_before_the_first_message_was_written_leaves_the_session_its_id(
    a_sidecar: Make, home: Path, thread: str, deadly: Path
) -> None:
    async with a_sidecar("--agents", str(deadly), **NO_SPARE) as sidecar:  # a spare would kill it
        example = sidecar.transcript(await sidecar.session_id("t1"))
        with pytest.raises(httpx.HTTPError):
            await sidecar.chat(thread, "Hello", agent="deadly")
        await sidecar.wait()
        await sidecar.restart()
        session_id = await sidecar.session_id(thread)
        # What the CLI writes first: bookkeeping, which it cannot resume and whose ID it does not take again.
        bookkeeping = b"".join(example.read_bytes().splitlines(keepends=True)[:2])
        example.with_name(f"{session_id}.jsonl").write_bytes(bookkeeping)
        await goes_on(sidecar, thread, session_id, known=False)


@pytest.mark.parametrize("known", [False, True], ids=["new thread", "known thread"])
async def test_the_sidecar_is_killed_at_any_instant_of_a_turn(
    a_sidecar: Make, home: Path, thread: str, mode: str, known: bool
) -> None:
    async with a_sidecar(**(NO_SPARE if known else {})) as sidecar:
        if known:
            thread = await become_known(sidecar, thread, mode)
        for milliseconds in (0, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 600):
            name = thread if known else f"{thread}-{milliseconds}"  # a known one has it happen again and again
            asking = asyncio.create_task(sidecar.chat(name, "Hello"))
            await asyncio.sleep(milliseconds / 1000)  # the instant itself is what is varied here
            processes = sidecar.cli_processes()
            await sidecar.stop(signal.SIGKILL)
            await asyncio.wait([asking])
            assert await gone(processes, SECONDS)
            await sidecar.restart()
            mapping = await sidecar.session(name)
            if mapping.status_code == 200:
                await goes_on(sidecar, name, mapping.json()["sdk_session_id"], known=known)
            else:
                assert not known
                assert await sidecar.say(name, "Hello") == "You have said 1 thing: Hello"


@pytest.mark.parametrize("moment", [pytest.param(moment, id=moment.__name__) for moment in MOMENTS])
@pytest.mark.parametrize("known", [False, True], ids=["new thread", "known thread"])
async def test_the_cli_is_killed(
    a_sidecar: Make, home: Path, thread: str, mode: str, moment: Callable[[Stream], object], known: bool
) -> None:
    async with a_sidecar(**(NO_SPARE if known else {})) as sidecar:
        if known:
            thread = await become_known(sidecar, thread, mode)
        async with sidecar.stream(thread, prompt_for(moment)) as stream:
            await moment(stream)  # type: ignore[misc]
            for pid in sidecar.cli_processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            end = (await stream.rest())[-1]
        assert end.name == "end"
        late = moment in (at_the_result, at_the_end)
        assert end.data["status"] in (("completed",) if late else ("failed", "completed"))
        turn_id = stream.events[0].data["turn_id"]
        line = await sidecar.until_logged("turn", thread_id=thread, turn_id=turn_id)
        assert line["status"] == end.data["status"]
        mapping = await sidecar.session(thread)
        if mapping.status_code == 200:
            await goes_on(sidecar, thread, str(stream.events[0].data["sdk_session_id"]), known=known)
        else:
            assert not known  # killed before the SDK had a transcript: nothing of it is left
            assert await sidecar.say(thread, "Go on") == "You have said 1 thing: Go on"


async def test_what_a_crash_left_running_is_ended_before_a_turn_may_touch_its_session(
    a_sidecar: Make, home: Path, thread: str, mode: str, tmp_path: Path
) -> None:
    # An agent whose CLI leaves the launcher's guard, as on a system that has none.
    import claude_agent_sdk  # noqa: PLC0415

    cli = tmp_path / "claude"
    bundled = f"{claude_agent_sdk.__path__[0]}/_bundled/claude"
    cli.write_text(f'#!/bin/sh\nexec setpriv --pdeathsig clear -- {bundled} "$@"\n')
    cli.chmod(0o700)
    agents = tmp_path / "agents.toml"
    agents.write_text(f'[default]\ncli_path = "{cli}"\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        thread = await become_known(sidecar, thread, mode)
        with contextlib.suppress(httpx.HTTPError):
            async with sidecar.stream(thread, "Hello [[hold 3]]") as stream:
                await stream.until_text()
                orphan, others = await sidecar.process_of(thread), sidecar.cli_processes()
                await sidecar.stop(signal.SIGKILL)
        assert not await gone([orphan], 0.2)
        await restart_for_what_is_there(sidecar)
        assert await gone([orphan], 0)
        session_id = await sidecar.session_id(thread)
        assert sidecar.logged(f"ending the CLI {orphan} that an earlier run left on session {session_id}")
        assert await gone(others, SECONDS)  # what had no prompt, and may have been starting, leaves by itself
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")


async def test_a_process_that_is_not_provably_ours_is_left_alone(
    a_sidecar: Make, home: Path, thread: str, mode: str
) -> None:
    async with a_sidecar(**NO_SPARE) as sidecar:
        thread = await become_known(sidecar, thread, mode)
        session_id = await sidecar.session_id(thread)
        await sidecar.stop(signal.SIGKILL)
        stranger = await asyncio.create_subprocess_exec("sleep", "60")
        registry = sidecar.home / "claude" / "sessions"
        (registry / f"{stranger.pid}.json").write_text(
            json.dumps({"pid": stranger.pid, "procStart": "1", "sessionId": session_id})
        )
        (registry / "torn.json").write_text('{"pid": ')
        await sidecar.restart()
        assert stranger.returncode is None
        stranger.kill()
        await stranger.wait()


@pytest.fixture(scope="module")
async def _told(model_env: dict[str, str], _model: FaultyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a sidecar that was stopped, with a thread of two turns."""
    _model.reset()
    async with Sidecar(tmp_path_factory.mktemp("told") / "home", model_env | COLD) as sidecar:
        await sidecar.say("t", "My name is Ada")
        await sidecar.say("t", "I like tea")
    return sidecar.home


@pytest.fixture
async def told(
    _told: Path, a_sidecar: Make, sidecar: Sidecar, thread: str, mode: str, tmp_path: Path
) -> AsyncIterator[tuple[Sidecar, str]]:
    """A thread of two turns and its sidecar: it has the thread's process, or has found it in its home."""
    if mode == "warm":
        await sidecar.say(thread, "My name is Ada")
        await sidecar.say(thread, "I like tea")
        yield sidecar, thread
    else:
        shutil.copytree(_told, tmp_path / "home")
        async with a_sidecar() as its:
            yield its, "t"


@pytest.mark.parametrize("damage", ["empty", "garbage", "torn", "bad byte", "bookkeeping only", "notes only"])
async def test_a_damaged_transcript_costs_no_more_than_it_must(
    told: tuple[Sidecar, str], damage: str, mode: str
) -> None:
    sidecar, thread = told
    await sidecar.at_rest()
    before = await sidecar.session_id(thread)
    transcript = sidecar.transcript(before)
    whole = transcript.read_bytes()
    lines = whole.split(b"\n")
    last = whole.rindex(b'"type":"assistant"')
    damaged = {
        "empty": b"",
        "garbage": b"\x00\xff garbage\n" * 20,
        "torn": whole[:last],
        "bad byte": whole.replace(b"I like tea", b"I like \xff tea", 1),
        "bookkeeping only": b"\n".join(lines[:2]) + b"\n",
        "notes only": b'{"type":"last-prompt","lastPrompt":"Hi"}\n{"type":"custom-title","customTitle":"Hi"}\n',
    }[damage]
    transcript.write_bytes(damaged)
    answer = (await sidecar.chat(thread, "Who am I?")).json()
    assert answer["status"] == "completed"
    if damage in ("torn", "bad byte"):
        assert answer["session"]["outcome"] == "resumed"
        assert "First: My name is Ada" in answer["text"]
    else:
        assert (answer["session"]["outcome"], answer["session"]["replaced_session_id"]) == ("restarted", before)
        # What can still be saved of it is left to a person.
        assert not parting(damaged, transcript.read_bytes()) or mode == "warm"
    refused = await sidecar.chat(thread, "And?", if_missing="fail")
    assert refused.status_code == 200


async def test_a_session_that_has_nothing_the_sdk_could_call_it_after_goes_on_after_a_crash(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    long = "I like tea. " * 10_000
    await sidecar.say(thread, f"My name is Ada. {long}")
    await sidecar.at_rest()
    transcript = sidecar.transcript(await sidecar.session_id(thread))
    async with sidecar.stream(thread, f"[[hold 1]] {long}") as stream:
        await (await model.requested(2)).holding()
        async with asyncio.timeout(SECONDS):
            while transcript.read_bytes().count(long.encode()) < 4:  # in the queue and said, twice
                await a_moment()
        for process in sidecar.cli_processes():
            os.kill(process, signal.SIGKILL)
        await stream.rest()
    assert (await metadata(sidecar, thread))["transcript"] == "present"
    answer = (await sidecar.chat(thread, "Who am I?")).json()
    assert answer["session"]["outcome"] == "resumed"
    assert "First: My name is Ada" in answer["text"]


@pytest.mark.parametrize("mount_point", ["gone", "empty"])
async def test_a_config_directory_that_is_not_mounted_changes_no_mapping(
    a_sidecar: Make, home: Path, thread: str, mode: str, mount_point: str
) -> None:
    async with a_sidecar() as sidecar:
        thread = await become_known(sidecar, thread, mode)
        before = (await sidecar.session(thread)).json()
        await sidecar.stop(signal.SIGTERM)
        volume = sidecar.home / "claude"
        volume.rename(sidecar.home / "unmounted")
        if mount_point == "empty":
            volume.mkdir()
        await sidecar.restart()
        for path, name, fields in (
            ("/v1/chat", thread, {}),
            ("/v1/chat", f"{thread}-new", {}),
            ("/v1/chat/fork", f"{thread}-fork", {"from_thread_id": thread}),
        ):
            response = await sidecar.post(path, name, message="Hello", **fields)
            assert (response.status_code, response.json()["code"]) == (503, "transcripts_unavailable")
        assert (await sidecar.session(thread)).json() == before
        assert (await sidecar.session(f"{thread}-new")).status_code == 404
        await sidecar.stop(signal.SIGTERM)
        for path_ in sorted(volume.rglob("*"), reverse=True):
            path_.rmdir() if path_.is_dir() else path_.unlink()
        volume.rmdir()
        (sidecar.home / "unmounted").rename(volume)
        await restart_for_what_is_there(sidecar)
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")
