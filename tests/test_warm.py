"""Processes that are kept ready make turns faster and change nothing else."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.modes import KEPT
from tests.server import SECONDS, Sidecar, a_moment, gone, running

Make = Callable[..., Sidecar]
SPARE = {"SIDECAR_WARM_SESSIONS": "0", "SIDECAR_SPARE_PROCESSES": "1"}


@pytest.fixture(scope="session")
async def _warm(model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sidecar]:
    home = tmp_path_factory.mktemp("warm")
    agents = home / "agents.toml"
    agents.write_text('[default]\n[terse]\nsystem_prompt = "Be terse."\n')
    async with Sidecar(home / "home", {**model_env, **KEPT}, "--agents", str(agents)) as sidecar:
        yield sidecar


@pytest.fixture
def warm(_warm: Sidecar, model: FaultyModel) -> Sidecar:
    """A sidecar that keeps four sessions connected, and no spares."""
    return _warm


@pytest.fixture
async def two_kept(a_sidecar: Make) -> AsyncIterator[Sidecar]:
    """One that keeps two, so that few turns are more than it keeps."""
    async with a_sidecar(**KEPT | {"SIDECAR_WARM_SESSIONS": "2"}) as sidecar:
        yield sidecar


@pytest.mark.smoke
async def test_a_follow_up_turn_has_the_process_of_the_one_before(warm: Sidecar, thread: str) -> None:
    await warm.say(thread, "My name is Ada")
    process = await warm.process_of(thread)
    assert await warm.say(thread, "Who am I?") == "You have said 2 things. First: My name is Ada; last: Who am I?"
    assert await warm.process_of(thread) == process
    assert len(await warm.history(thread)) == 4


async def test_the_log_says_where_a_turn_had_its_process_from(warm: Sidecar, thread: str) -> None:
    for process in ("cold", "warm", "warm"):
        turn_id = (await warm.chat(thread, "Hello")).json()["session"]["turn_id"]
        assert (await warm.until_logged("turn", turn_id=turn_id))["process"] == process


async def test_what_another_program_wrote_to_the_session_is_not_lost(warm: Sidecar, thread: str) -> None:
    await warm.say(thread, "My name is Ada")
    process = await warm.process_of(thread)
    await talk_elsewhere(warm, thread, "I like tea")
    answer = await warm.say(thread, "What do I like?")
    assert answer == "You have said 3 things. First: My name is Ada; last: What do I like?"
    assert await gone([process])
    prompts = [text for role, text in await warm.history(thread) if role == "user"]
    assert prompts == ["My name is Ada", "I like tea", "What do I like?"]


async def talk_elsewhere(sidecar: Sidecar, thread: str, prompt: str) -> None:
    """Take a turn on the thread's session with the CLI itself, as a person at a shell would."""
    import claude_agent_sdk  # noqa: PLC0415

    cli = f"{claude_agent_sdk.__path__[0]}/_bundled/claude"
    env = {**sidecar.env, "CLAUDE_CONFIG_DIR": str(sidecar.home / "claude")}
    command = [cli, "-p", "--resume", await sidecar.session_id(thread), "--tools", "", "--", prompt]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=sidecar.home / "workspace",
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out


async def test_another_agent_gets_a_process_of_its_own(warm: Sidecar, thread: str, model: FaultyModel) -> None:
    await warm.say(thread, "Hello")
    process = await warm.process_of(thread)
    await warm.say(thread, "Hello", agent="terse")
    assert await warm.process_of(thread) != process
    assert await gone([process])


async def test_a_process_that_dies_while_idle_is_noticed_and_no_turn_pays_for_it(warm: Sidecar, thread: str) -> None:
    await warm.say(thread, "My name is Ada")
    process = await warm.process_of(thread)
    os.kill(process, signal.SIGKILL)
    assert "First: My name is Ada" in await warm.say(thread, "Who am I?")


async def test_a_title_and_a_tag_are_kept_whatever_was_warm(warm: Sidecar, thread: str) -> None:
    await warm.say(thread, "Hello")
    process = await warm.process_of(thread)
    body = {"thread_id": thread, "resource_id": "alice", "title": "Tea", "tag": "drinks"}
    assert (await warm.http.patch("/v1/session", json=body)).status_code == 200
    assert await gone([process], 0)
    await warm.say(thread, "Go on")
    key = {"thread_id": thread, "resource_id": "alice"}
    metadata = (await warm.http.get("/v1/session", params=key)).json()["metadata"]
    assert (metadata["title"], metadata["tag"]) == ("Tea", "drinks")


@pytest.mark.smoke
async def test_a_deleted_thread_leaves_no_process(warm: Sidecar, thread: str) -> None:
    await warm.say(thread, "Hello")
    process = await warm.process_of(thread)
    await warm.http.delete("/v1/session", params={"thread_id": thread, "resource_id": "alice"})
    assert await gone([process], 0)


@pytest.mark.parametrize("message", [None, "Another way"])
async def test_forking_a_warm_thread_leaves_it_warm_and_as_it_was(
    warm: Sidecar, thread: str, another_thread: str, message: str | None
) -> None:
    await warm.say(thread, "My name is Ada")
    process = await warm.process_of(thread)
    transcript = warm.transcript(await warm.session_id(thread))
    before = transcript.read_bytes()
    fields = {} if message is None else {"message": message}
    response = await warm.post("/v1/chat/fork", another_thread, from_thread_id=thread, **fields)
    assert response.status_code in (200, 201)
    assert transcript.read_bytes() == before
    await warm.say(thread, "Go on")
    assert await warm.process_of(thread) == process


@pytest.mark.smoke
async def test_an_interrupted_turn_leaves_its_process_fit_for_the_next(
    warm: Sidecar, thread: str, model: FaultyModel
) -> None:
    await warm.say(thread, "My name is Ada")
    process = await warm.process_of(thread)
    async with warm.stream(thread, "Go on [[hold 3]]") as stream:
        await stream.until_text("You have")
        await warm.post("/v1/chat/interrupt", thread)
        assert (await stream.rest())[-1].data["status"] == "interrupted"
    assert "You have said 3 things." in await warm.say(thread, "And now?")
    assert await warm.process_of(thread) == process
    await warm.history(thread)


@pytest.mark.long
async def test_the_least_recently_used_makes_room(two_kept: Sidecar) -> None:
    names = [f"t{number}" for number in range(4)]
    for name in names:
        await two_kept.say(name, "Hello")
    async with asyncio.timeout(SECONDS):
        while len(two_kept.cli_processes()) > 2:
            await a_moment()
    for name in names[2:]:
        await two_kept.process_of(name)


async def test_what_no_longer_fits_into_the_memory_for_them_is_closed(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar(SIDECAR_WARM_SESSIONS="32", SIDECAR_WARM_MEMORY="256MiB") as sidecar:
        kept = []
        for number in range(3):  # of some 100 MiB each
            await sidecar.say(f"{thread}-{number}", "Hello")
            kept.append(await sidecar.process_of(f"{thread}-{number}"))
        assert await gone(kept[:1], SECONDS)
        assert sorted(sidecar.cli_processes()) == sorted(kept[1:])


@pytest.mark.long
async def test_an_unused_process_is_closed_after_a_while(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar(SIDECAR_WARM_IDLE_SECONDS="0.5", **KEPT) as sidecar:
        await sidecar.say(thread, "Hello")
        assert await gone(sidecar.cli_processes(), SECONDS)
        assert await sidecar.say(thread, "Go on")


async def test_new_threads_get_processes_that_waited_for_them_from_the_first_on(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar(**SPARE) as sidecar:
        for number in range(3):
            (spare,) = await ready(sidecar, 1)
            async with sidecar.stream(f"{thread}-{number}", "[[hold 1]] My name is Bob") as stream:
                await stream.until_text()
                assert await sidecar.process_of(f"{thread}-{number}") == spare
                await ready(sidecar, 2)  # the next one waits already, while this one answers
                await sidecar.post("/v1/chat/interrupt", f"{thread}-{number}")
            assert await gone([spare], SECONDS)
            turn = await sidecar.until_logged("turn", thread_id=f"{thread}-{number}")
            assert turn["process"] == "spare"
        assert "First: [[hold 1]] My name is Bob" in await sidecar.say(f"{thread}-0", "Who am I?")


async def test_every_agent_of_a_file_has_a_spare_from_the_start(a_sidecar: Make, thread: str, tmp_path: Path) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text('[terse]\nsystem_prompt = "Be terse."\n')
    async with a_sidecar("--agents", str(agents), **SPARE) as sidecar:
        await ready(sidecar, 2)
        await sidecar.say(thread, "Hello", agent="terse")
        assert (await sidecar.until_logged("turn", thread_id=thread))["process"] == "spare"


async def test_a_spare_that_has_waited_for_long_is_replaced(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar(SIDECAR_WARM_IDLE_SECONDS="0.5", **SPARE) as sidecar:
        (spare,) = await ready(sidecar, 1)
        assert await gone([spare], SECONDS)
        await ready(sidecar, 1)


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A CLI, with an agents.toml beside it, that puts a line into `starts` for each start; or hangs if that says so."""
    import claude_agent_sdk  # noqa: PLC0415

    starts, cli = tmp_path / "starts", tmp_path / "claude"
    cli.write_text(
        f"#!/bin/sh\nif grep -q hang {starts}; then trap '' TERM; while :; do sleep 0.1; done; fi\n"
        f'echo started >>{starts}\nexec {claude_agent_sdk.__path__[0]}/_bundled/claude "$@"\n'
    )
    cli.chmod(0o700)
    starts.touch()
    (tmp_path / "agents.toml").write_text(f'[default]\ncli_path = "{cli}"\n')
    return cli


@pytest.mark.long
async def test_one_spare_is_started_however_many_turns_end_meanwhile(
    a_sidecar: Make, thread: str, counted: Path
) -> None:
    async with a_sidecar("--agents", str(counted.with_name("agents.toml")), **SPARE) as sidecar:
        await ready(sidecar, 1)
        await asyncio.gather(*(sidecar.say(f"{thread}-{number}", "Hello") for number in range(6)))
        await ready(sidecar, 1)
        # One for each thread and the one that waits, as the first thread had the one that waited before.
        assert len(counted.with_name("starts").read_text().splitlines()) == 6 + 1


@pytest.mark.long
async def test_a_shutdown_does_not_wait_for_a_spare_that_hangs(a_sidecar: Make, thread: str, counted: Path) -> None:
    async with a_sidecar("--agents", str(counted.with_name("agents.toml")), **SPARE) as sidecar:
        await ready(sidecar, 1)
        counted.with_name("starts").write_text("hang")
        await sidecar.say(thread, "Hello")
        async with asyncio.timeout(SECONDS):
            while not (hanging := running(counted)):
                await a_moment()
        await sidecar.stop(signal.SIGTERM)
        assert await gone(hanging, 0)


async def ready(sidecar: Sidecar, number: int) -> list[int]:
    """Wait until so many processes, and no others, are connected and idle."""
    async with asyncio.timeout(SECONDS):
        while len(sidecar.cli_processes()) != number or not all(registered(sidecar)):
            await a_moment()
    assert (await sidecar.http.get("/readyz")).status_code == 200  # it has heard of them, too
    return sidecar.cli_processes()


def registered(sidecar: Sidecar) -> list[bool]:
    """Of each process, whether it is far enough to have put itself into the CLI's registry."""
    return [(sidecar.home / f"claude/sessions/{pid}.json").exists() for pid in sidecar.cli_processes()]


async def test_an_opened_thread_is_warm_before_its_message_comes(a_sidecar: Make, home: Path, thread: str) -> None:
    async with a_sidecar(**KEPT) as sidecar:
        for _ in range(2):
            assert (await sidecar.post("/v1/session/warm", "t1")).status_code == 202
        (process,) = await ready(sidecar, 1)
        assert "First: My name is Ada" in await sidecar.say("t1", "Who am I?")
        assert await sidecar.process_of("t1") == process
        unknown = await sidecar.post("/v1/session/warm", f"{thread}-unknown")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "session_not_found")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_no_ready_process_outlives_the_sidecar(a_sidecar: Make, thread: str, number: signal.Signals) -> None:
    async with a_sidecar(SIDECAR_WARM_SESSIONS="4", SIDECAR_SPARE_PROCESSES="1") as sidecar:
        for name in (thread, f"{thread}-b"):
            await sidecar.say(name, "My name is Ada")
        processes = await ready(sidecar, 3)
        await sidecar.stop(number)
        assert await gone(processes, SECONDS if number is signal.SIGKILL else 0)
        await sidecar.restart()
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")


@pytest.mark.long
async def test_memory_is_bounded_with_more_threads_than_slots(two_kept: Sidecar) -> None:
    names = [f"t{number}" for number in range(4)]
    for text in ("My name is Ada", "Who am I?"):
        await asyncio.gather(*(two_kept.say(name, text) for name in names))
        assert len(await ready(two_kept, 2)) == 2
    for name in names:
        assert [t for role, t in await two_kept.history(name) if role == "user"] == ["My name is Ada", "Who am I?"]


async def test_a_thread_that_begins_anew_leaves_no_process_of_its_old_session(warm: Sidecar, thread: str) -> None:
    await warm.say(thread, "My name is Ada")
    process = await warm.process_of(thread)
    warm.transcript(await warm.session_id(thread)).unlink()
    assert await warm.say(thread, "Who am I?") == "You have said 1 thing: Who am I?"
    assert await gone([process], 0)


FAILS_THE_SECOND_TIME = """
import itertools
from session_sidecar.agent.agents import safe_options
asked = itertools.count(1)
def options(key, name):
    if next(asked) == 2:
        raise RuntimeError
    return safe_options()
"""


async def test_a_function_that_fails_costs_its_turn_and_neither_the_thread_nor_its_process(
    a_sidecar: Make, thread: str, tmp_path: Path
) -> None:
    (tmp_path / "forgetful.py").write_text(FAILS_THE_SECOND_TIME)
    async with a_sidecar("--agents", "forgetful:options", PYTHONPATH=str(tmp_path), **KEPT) as sidecar:
        await sidecar.say(thread, "My name is Ada")
        process = await sidecar.process_of(thread)
        failed = await sidecar.chat(thread, "Hello?")
        assert (failed.status_code, failed.json()["code"]) == (500, "agent_misconfigured")
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")
        assert await sidecar.process_of(thread) == process


@pytest.mark.long
async def test_a_kept_process_that_hangs_costs_its_turn_and_not_the_thread(a_sidecar: Make, thread: str) -> None:
    patience = {"SIDECAR_TURN_IDLE_SECONDS": "2", "SIDECAR_INTERRUPT_SECONDS": "0.5"}
    async with a_sidecar(**KEPT, **patience) as sidecar:
        await sidecar.say(thread, "My name is Ada")
        await sidecar.until_logged("turn", thread_id=thread)
        process = await sidecar.process_of(thread)
        os.kill(process, signal.SIGSTOP)
        response = await sidecar.chat(thread, "Hello?")
        assert (response.status_code, response.json()["code"]) == (504, "turn_timeout")
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?", multitask_strategy="enqueue")
        assert await gone([process], 0)


async def test_a_thread_is_changed_only_when_a_process_that_was_leaving_it_has_left(
    two_kept: Sidecar, thread: str
) -> None:
    await two_kept.say(thread, "My name is Ada")
    await two_kept.until_logged("turn", thread_id=thread)
    process = await two_kept.process_of(thread)
    os.kill(process, signal.SIGSTOP)  # it will take its time
    others = [f"{thread}-{number}" for number in range(2)]
    await asyncio.gather(*(two_kept.say(other, "Hello") for other in others))
    for other in others:
        await two_kept.until_logged("turn", thread_id=other)
    body = {"thread_id": thread, "resource_id": "alice", "title": "Tea"}
    assert (await two_kept.http.patch("/v1/session", json=body)).status_code == 200
    assert await gone([process], 0)


@pytest.mark.long
async def test_a_turn_that_waits_for_a_start_can_be_stopped(a_sidecar: Make, thread: str, counted: Path) -> None:
    counted.with_name("starts").write_text("hang")
    async with a_sidecar("--agents", str(counted.with_name("agents.toml"))) as sidecar:
        cores = os.cpu_count() or 1
        hanging = [asyncio.create_task(sidecar.chat(f"{thread}-{number}", "Hello")) for number in range(cores)]
        async with asyncio.timeout(SECONDS):
            while len(running(counted)) < cores:
                await a_moment()
        waiting = asyncio.create_task(sidecar.chat(thread, "Hello"))
        async with asyncio.timeout(SECONDS):
            while (await sidecar.post("/v1/chat/interrupt", thread)).json().get("turn_id") is None:
                await a_moment()
            assert (await waiting).json()["code"] == "turn_interrupted"
        await sidecar.stop(signal.SIGTERM)
        await asyncio.wait(hanging)
