"""A client that goes away at any moment: the answer, or what there was of it, is in the history; no process is left."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.copies import become_known
from tests.faults import Behaviour, FaultyModel, fail, hold, say, tool
from tests.modes import NO_SPARE, in_both_modes
from tests.server import SECONDS, Sidecar, Stream, a_moment

pytestmark = [pytest.mark.long, in_both_modes]

Make = Callable[..., Sidecar]


@pytest.fixture
async def with_tools(a_sidecar: Make, home: Path, tmp_path: Path) -> AsyncIterator[Sidecar]:
    """A sidecar whose agent may run shell commands."""
    agents = tmp_path / "agents.toml"
    agents.write_text('[default]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\n')
    async with a_sidecar("--agents", str(agents), **NO_SPARE) as sidecar:
        yield sidecar


async def at_the_first_delta(stream: Stream) -> None:
    await stream.until_text()


async def in_mid_text(stream: Stream) -> None:
    await stream.until_text("You have said")


async def in_a_tool(stream: Stream) -> None:
    await stream.until("assistant")


async def in_the_apis_backoff(stream: Stream) -> None:
    async with asyncio.timeout(SECONDS):
        async for event in stream:
            if event.data.get("subtype") == "api_retry":
                return


# What the model does, where the client leaves, what the history holds then when the turn is cancelled, and when not.
WHOLE = "You have said 2 things. First: My name is Ada; last: Hello"
SLEEP = tool("Bash", {"command": "sleep 1 && echo slept"})
TABLE = {
    "at the first delta": ([hold(1)], at_the_first_delta, "You ", WHOLE),
    "in mid-text": ([hold(3)], in_mid_text, "You have said ", WHOLE),
    "in a tool": ([SLEEP, say("It slept.")], in_a_tool, "", "It slept."),
    "in the API's backoff": ([fail(529)], in_the_apis_backoff, "", WHOLE),
}


@pytest.mark.parametrize("on_disconnect", ["continue", "cancel"])
@pytest.mark.parametrize("row", TABLE)
async def test_a_client_goes_away(
    with_tools: Sidecar, thread: str, model: FaultyModel, mode: str, row: str, on_disconnect: str
) -> None:
    sidecar = with_tools
    behaviours, moment, partial, whole = TABLE[row]
    thread = await become_known(sidecar, thread, mode)
    model.script(*behaviours)
    async with sidecar.stream(thread, "Hello", on_disconnect=on_disconnect) as stream:
        await moment(stream)
    if on_disconnect == "continue":
        model.release()
    turn_id = stream.events[0].data["turn_id"]
    line = await sidecar.until_logged("turn", thread_id=thread, turn_id=turn_id)
    await sidecar.at_rest(0, threads=1)
    assert line["status"] == ("completed" if on_disconnect == "continue" else "interrupted")
    answers = [text for role, text in await sidecar.history(thread) if role == "assistant" and text]
    if on_disconnect == "continue":
        assert answers[-1] == whole
    elif partial:
        assert answers[-1] == partial
    model.reset()
    assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")


@pytest.mark.parametrize("on_disconnect", ["continue", "cancel"])
async def test_a_client_goes_away_during_start_up(
    a_sidecar: Make, thread: str, model: FaultyModel, on_disconnect: str
) -> None:
    async with a_sidecar(**NO_SPARE) as sidecar:  # so that there is something to start
        asking = asyncio.create_task(sidecar.chat(thread, "Hello", on_disconnect=on_disconnect))
        while not sidecar.cli_processes():
            await a_moment()
        asking.cancel()
        line = await sidecar.until_logged("turn", thread_id=thread)
        await sidecar.at_rest(0, threads=1)
        if on_disconnect == "continue":
            assert line["status"] == "completed"
            assert (await sidecar.history(thread))[-1] == ("assistant", "You have said 1 thing: Hello")
        else:
            assert line["status"] == "interrupted"
        assert await sidecar.say(thread, "Hello again")


async def test_a_client_goes_away_twice_in_a_row(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.default = hold(3)
    for _ in range(2):
        async with sidecar.stream(thread, "Hello", on_disconnect="cancel", multitask_strategy="enqueue") as stream:
            await stream.until_text("You have")
    model.reset()
    assert "You have said 3 things." in await sidecar.say(thread, "Who am I?", multitask_strategy="enqueue")
    await sidecar.history(thread)


async def test_a_reader_that_takes_nothing_is_dropped_and_holds_up_nobody(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    model.default = Behaviour(text="word " * 100 + "x" * 8_000_000)
    async with a_sidecar(**NO_SPARE, SIDECAR_SEND_SECONDS="4") as sidecar:
        url = sidecar.http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
        body = f'{{"thread_id": "{thread}", "resource_id": "alice", "message": "Hello"}}'
        writer.write(
            f"POST /v1/chat HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        # From here on it reads nothing, and so the socket's buffers fill.
        line = await sidecar.until_logged("turn", thread_id=thread)
        assert line["status"] == "completed"
        async with sidecar.rejoin(thread) as other:
            events = await other.rest()
        assert events[-1].data["status"] == "completed"
        await sidecar.until_logged("request", path="/v1/chat", method="POST")
        writer.close()


async def test_what_a_turn_holds_in_memory_is_bounded_and_a_late_reader_is_told(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar(**NO_SPARE, SIDECAR_REPLAY_BYTES="200000") as sidecar:
        model.default = Behaviour(text="word " * 3000)
        async with sidecar.stream(thread, "Hello") as stream:
            events = await stream.rest()
        assert stream.text == "word " * 3000  # a reader that keeps up misses nothing
        async with sidecar.rejoin(thread, after=events[9].id) as late:
            assert late.response.status_code == 410
            assert '"replay_gone"' in late.response.text
        async with sidecar.rejoin(thread, after=events[-3].id) as recent:
            assert [event.id for event in await recent.rest()] == [events[-2].id, events[-1].id]


async def test_a_connection_that_was_idle_for_longer_than_clients_keep_one_is_still_open(sidecar: Sidecar) -> None:
    url = sidecar.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"GET /healthz HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode())
    assert b" 200 " in await reader.readline()
    with pytest.raises(TimeoutError):  # closing it would end the answer
        async with asyncio.timeout(7):
            await reader.read()
    writer.close()
