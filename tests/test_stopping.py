"""However a turn is stopped: its partial answer is kept, its stream says how it ended, and no process is left."""

import asyncio
import json
import signal
import socket
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from claude_agent_sdk._cli_version import __cli_version__

from tests.faults import FaultyModel
from tests.server import Sidecar, gone

Make = Callable[..., Sidecar]


@pytest.mark.smoke
async def test_an_interrupted_turn_says_so_and_keeps_what_it_said(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text("You have said")
        response = await sidecar.post("/v1/chat/interrupt", thread)
        end = (await stream.rest())[-1]
    assert response.json() == {
        "object": "interrupt",
        "turn_id": stream.events[0].data["turn_id"],
        "status": "interrupted",
    }
    assert (end.name, end.data["status"], end.data["error"]) == ("end", "interrupted", None)
    partial, marker = (await sidecar.history(thread))[-2:]
    assert partial == ("assistant", "You have said ")
    assert marker[1].startswith("[Request interrupted")
    assert await sidecar.say(thread, "Go on") == "You have said 2 things. First: [[hold 3]]; last: Go on"


@pytest.mark.smoke
async def test_interrupting_an_idle_thread_is_no_error(sidecar: Sidecar, original: str) -> None:
    response = await sidecar.post("/v1/chat/interrupt", original)
    assert response.json() == {"object": "interrupt", "turn_id": None, "status": "idle"}


async def test_an_interrupt_that_comes_too_early_is_remembered(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    turn = asyncio.create_task(sidecar.chat(thread, "[[hold 3]]"))
    while (await sidecar.post("/v1/chat/interrupt", thread)).status_code == 404:
        pass  # it has not reached the sidecar yet
    response = await turn
    # Before the prompt was given nothing has happened; after it, the turn is a turn, and interrupted.
    assert response.status_code in (200, 409)
    assert response.json().get("status") == "interrupted" or response.json()["code"] == "turn_interrupted"
    assert await sidecar.say(thread, "Go on")


async def test_a_turn_that_never_began_leaves_no_mapping(
    a_sidecar: Make, thread: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agents = tmp_path_factory.mktemp("agents") / "agents.toml"
    agents.write_text('[default]\ncli_path = "/bin/false"\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        response = await sidecar.chat(thread, "Hello")
        assert (response.status_code, response.json()["code"]) == (502, "agent_start_failed")
        assert (await sidecar.session(thread)).status_code == 404


async def test_a_reader_that_leaves_cancels_the_turn_if_it_asked_for_that(
    cold: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with cold.stream(thread, "[[hold 3]]", on_disconnect="cancel") as stream:
        await stream.until_text("You have said")
        processes = cold.cli_processes()
    await model.gone()
    assert await gone(processes)
    async with cold.rejoin(thread) as rest:
        assert (await rest.rest())[-1].data["status"] == "interrupted"
    assert ("assistant", "You have said ") in await cold.history(thread)


async def test_a_turn_is_not_cancelled_while_somebody_else_reads_it(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 3]]", on_disconnect="cancel") as first:
        await first.until_text()
        second = sidecar.rejoin(thread)
        stream = await second.__aenter__()
        await stream.until_text()
    model.release()
    assert (await stream.rest())[-1].data["status"] == "completed"
    await second.__aexit__(None, None, None)


@pytest.mark.smoke
async def test_a_second_message_is_refused_while_a_turn_runs_and_the_thread_is_free_after_it(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text()
        response = await sidecar.chat(thread, "And?")
        assert (response.status_code, response.json()["code"]) == (409, "thread_busy")
        assert response.headers["retry-after"] == "1"
        model.release()
        await stream.until("end")
    # At once: the process of the turn before may still be on its way out.
    assert await sidecar.say(thread, "And?") == "You have said 2 things. First: [[hold 3]]; last: And?"


@pytest.mark.smoke
async def test_a_message_can_interrupt_the_one_before_it(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text()
        answer = await sidecar.say(thread, "Rather this", multitask_strategy="interrupt")
        assert (await stream.rest())[-1].data["status"] == "interrupted"
    assert answer == "You have said 2 things. First: [[hold 3]]; last: Rather this"
    await sidecar.history(thread)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_shutdown_ends_every_stream_and_every_process(
    a_sidecar: Make, home: Path, thread: str, number: signal.Signals
) -> None:
    async with a_sidecar() as sidecar:
        async with (
            sidecar.stream("t1", "[[hold 3]]") as one,
            sidecar.stream(thread, "[[hold 3]]") as two,
        ):
            await one.until_text()
            await two.until_text()
            processes = sidecar.cli_processes()
            assert len(processes) == 2
            waiting = asyncio.create_task(sidecar.wait())
            sidecar.process.send_signal(number)
            for stream in (one, two):
                end = (await stream.rest())[-1].data
                assert (end["status"], end["error"]["code"]) == ("interrupted", "shutting_down")
            assert await waiting == (0 if number == signal.SIGINT else -number)
        assert await gone(processes, 0)
        assert not [line for line in sidecar.log if not line.startswith("{") or '"level": "error"' in line]
        await sidecar.restart()
        assert "First: My name is Ada" in await sidecar.say("t1", "Who am I?")


async def test_a_database_that_cannot_be_used_is_refused_in_a_line_and_left_alone(a_sidecar: Make) -> None:
    refusing = a_sidecar()
    refusing.home.mkdir()
    database = refusing.home / "sidecar.db"
    database.write_text("This is a letter, not a database. " * 100)
    before = database.read_bytes()
    with pytest.raises(AssertionError, match="did not start"):
        await refusing.start()
    await refusing.wait()
    complaint = [line for line in refusing.log if "sidecar.db" in line]
    assert len(complaint) == 1
    assert "Traceback" not in "".join(refusing.log)
    assert database.read_bytes() == before
    assert [path.name for path in refusing.home.glob("sidecar.db*") if path.suffix != ".lock"] == ["sidecar.db"]


@pytest.mark.smoke
async def test_a_second_sidecar_in_the_same_home_is_refused_with_the_way_out(a_sidecar: Make) -> None:
    async with a_sidecar():
        second = a_sidecar()
        with pytest.raises(AssertionError, match="SIDECAR_HOME"):
            await second.start()
        await second.wait()


async def test_a_wrong_setting_or_agent_is_refused_in_a_line(a_sidecar: Make) -> None:
    for sidecar in (a_sidecar(SIDECAR_PING_SECONDS="never"), a_sidecar("--agents", "/nowhere.toml")):
        with pytest.raises(AssertionError, match=r"SIDECAR_(PING_SECONDS|AGENTS): "):
            await sidecar.start()
        assert await sidecar.wait() != 0
        assert "Traceback" not in "".join(sidecar.log)


async def test_a_port_that_is_taken_is_told_in_a_line_before_anything_is_opened(a_sidecar: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sidecar = a_sidecar("--port", str(port))
        with pytest.raises(AssertionError, match=rf"port {port} .*choose another one"):
            await sidecar.start()
        assert await sidecar.wait() == 1
    assert len(sidecar.log) == 1
    assert not sidecar.home.exists()


async def test_a_home_that_cannot_be_made_is_told_in_a_line(a_sidecar: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sidecar = a_sidecar("--home", str(tmp_path / "file" / "home"))
    with pytest.raises(AssertionError, match=r"SIDECAR_HOME: .*file.* cannot be made .*choose another one"):
        await sidecar.start()
    assert await sidecar.wait() != 0
    assert "Traceback" not in "".join(sidecar.log)
    assert "startup complete" not in "".join(sidecar.log)


async def test_it_listens_on_loopback_only(a_sidecar: Make) -> None:
    sidecar = a_sidecar("--host", "0.0.0.0")
    with pytest.raises(AssertionError, match="loopback"):
        await sidecar.start()
    assert await sidecar.wait() != 0


@pytest.mark.smoke
async def test_health_readiness_and_versions_are_told(sidecar: Sidecar) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await sidecar.http.get(path)).status_code == 200
    told = json.loads((await sidecar.http.get("/version")).text)
    assert told == {
        "version": version("session-sidecar"),
        "claude_agent_sdk": version("claude-agent-sdk"),
        "cli": __cli_version__,
        "model": "live",
    }
