"""Whatever the model's API does, the turn ends with one terminal event, and the thread is free and sound after it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.copies import become_known
from tests.faults import Behaviour, FaultyModel, big, burst, cut, fail, silent
from tests.modes import NO_SPARE, in_both_modes
from tests.server import Sidecar, Stream

pytestmark = [pytest.mark.long, in_both_modes]

Make = Callable[..., Sidecar]


async def ended(stream: Stream) -> dict[str, object]:
    """Read to the end; the one terminal event."""
    events = await stream.rest()
    assert [event.name for event in events].count("end") == 1
    assert events[-1].name == "end"
    return events[-1].data


async def is_sound(sidecar: Sidecar, thread: str) -> None:
    """The thread takes the next message, and its history is one chain from the first on."""
    assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")
    await sidecar.history(thread)


@pytest.mark.parametrize("status", [400, 401, 413, 429, 500, 529])
async def test_an_api_error_is_reported_with_its_status(
    sidecar: Sidecar, known: str, model: FaultyModel, status: int
) -> None:
    model.default = fail(status)
    async with sidecar.stream(known, "Hello") as stream:
        end = await ended(stream)
    assert end["status"] == "failed"
    error = end["error"]
    assert isinstance(error, dict)
    assert (error["code"], error["status"], error["api_status"]) == ("api_error", 502, status)
    model.reset()
    await is_sound(sidecar, known)


async def test_an_api_error_is_a_real_status_where_there_is_no_stream(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.default = fail(529)
    response = await sidecar.chat(thread, "Hello")
    assert (response.status_code, response.json()["code"], response.json()["api_status"]) == (502, "api_error", 529)
    assert (await sidecar.session(thread)).status_code == 200


async def test_how_long_the_api_asked_to_wait_goes_through(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.default = fail(429, retry_after=1)
    response = await sidecar.chat(thread, "Hello")
    assert response.json()["api_status"] == 429
    assert 1 <= int(response.headers["retry-after"]) <= 3
    assert response.json()["retry_after"] == int(response.headers["retry-after"])


async def test_an_error_that_passes_is_no_error(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(fail(529))
    assert await sidecar.say(thread, "Hello") == "You have said 1 thing: Hello"


async def test_an_api_that_refuses_connections_is_reported(
    a_sidecar: Make, home: Path, thread: str, model: FaultyModel, mode: str
) -> None:
    async with a_sidecar(**NO_SPARE) as sidecar:
        thread = await become_known(sidecar, thread, mode)
        await model.hang_up()
        try:
            response = await sidecar.chat(thread, "Hello")
        finally:
            await model.listen()
        assert (response.status_code, response.json()["code"]) == (502, "api_error")
        await is_sound(sidecar, thread)


async def test_a_stream_that_the_api_cuts_is_begun_again(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(cut(3))
    assert await sidecar.say(thread, "Hello") == "You have said 1 thing: Hello"


async def test_a_stream_that_the_api_always_cuts_is_had_in_one_piece(
    sidecar: Sidecar, known: str, model: FaultyModel
) -> None:
    model.default = cut(3)  # of streams: the CLI then asks for the answer without one
    async with sidecar.stream(known, "Hello") as stream:
        assert (await ended(stream))["status"] == "completed"
    model.reset()
    await is_sound(sidecar, known)


@pytest.mark.parametrize("behaviour", [silent(), Behaviour(hold_after=3)], ids=["from the start", "in mid-answer"])
async def test_an_api_that_falls_silent_ends_the_turn_at_its_idle_deadline(
    a_sidecar: Make, home: Path, thread: str, model: FaultyModel, behaviour: Behaviour, mode: str
) -> None:
    async with a_sidecar(**NO_SPARE, SIDECAR_TURN_IDLE_SECONDS="4") as sidecar:
        thread = await become_known(sidecar, thread, mode)
        model.script(behaviour)
        async with sidecar.stream(thread, "Hello") as stream:
            end = await ended(stream)
        assert end["status"] == "failed"
        assert isinstance(end["error"], dict)
        assert end["error"]["code"] == "turn_timeout"
        assert "said nothing for 4 seconds" in end["error"]["detail"]
        await sidecar.at_rest(1, threads=0)
        await is_sound(sidecar, thread)


async def test_a_turn_that_never_falls_silent_ends_at_its_total_deadline(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar(**NO_SPARE, SIDECAR_TURN_SECONDS="4") as sidecar:
        async with sidecar.stream(thread, "[[slow 1000 0.02]]") as stream:
            await stream.until_text("word word")
            beside = asyncio.create_task(sidecar.chat(f"{thread}-json", "[[slow 1000 0.02]]"))
            end = await ended(stream)
        assert isinstance(end["error"], dict)
        assert (end["status"], end["error"]["code"]) == ("failed", "turn_timeout")
        assert stream.text.startswith("word word")
        kept = (await sidecar.history(thread))[1]
        assert kept[1].startswith("word word")
        response = await beside
        assert (response.status_code, response.json()["code"]) == (504, "turn_timeout")


async def test_two_thousand_deltas_in_a_burst_all_arrive(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(burst(2000))
    async with sidecar.stream(thread, "Hello") as stream:
        assert (await ended(stream))["status"] == "completed"
    assert stream.text == "word " * 2000


async def test_a_delta_of_more_than_a_megabyte_arrives(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(big(1_200_000))
    async with sidecar.stream(thread, "Hello") as stream:
        assert (await ended(stream))["status"] == "completed"
    assert stream.text == "x" * 1_200_000


async def test_a_line_longer_than_the_agent_allows_ends_the_turn(
    a_sidecar: Make,
    home: Path,
    thread: str,
    model: FaultyModel,
    mode: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    agents = tmp_path_factory.mktemp("agents") / "agents.toml"
    agents.write_text("[default]\nmax_buffer_size = 1000000\n")
    async with a_sidecar("--agents", str(agents), **NO_SPARE) as sidecar:
        thread = await become_known(sidecar, thread, mode)
        model.script(big(1_200_000))
        async with sidecar.stream(thread, "Hello") as stream:
            end = await ended(stream)
        assert isinstance(end["error"], dict)
        assert (end["status"], end["error"]["code"]) == ("failed", "agent_failed")
        await sidecar.at_rest(1, threads=0)
        await is_sound(sidecar, thread)


async def test_the_log_has_a_line_a_turn_and_nothing_of_what_was_said(
    a_sidecar: Make, thread: str, model: FaultyModel, mode: str
) -> None:
    async with a_sidecar() as sidecar:
        model.script(Behaviour(text="the answer is secret"))
        await sidecar.say(thread, "the question is secret")
        model.default = fail(500)
        await sidecar.chat(thread, "another secret")
        line = await sidecar.until_logged("turn", thread_id=thread, status="failed")
        first = sidecar.logged("turn", thread_id=thread, status="completed")[0]
        assert first["outcome"] == "started"
        assert first["exit"] == (0 if mode == "cold" else None)  # None: it has not left
        assert 0 < first["ms"]["running"] < first["ms"]["init"] < first["ms"]["first_delta"] < first["ms"]["end"]
        assert (line["code"], line["outcome"]) == ("api_error", "resumed")
        request = sidecar.logged("request", path="/v1/chat")[0]
        assert (request["thread_id"], request["status"]) == (thread, 200)
        assert request["request_id"] == first["request_id"]
        assert "secret" not in "".join(sidecar.log)
