"""Clients that repeat their POST where a stream broke, with the ID of the last event that they had."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.faults import FaultyModel
from tests.server import Sidecar, Stream


@asynccontextmanager
async def repeat(
    sidecar: Sidecar, thread: str, message: str, after: str, *, path: str = "/v1/chat", **more: Any
) -> AsyncIterator[Stream]:
    """The same POST again, as these clients send it."""
    headers = {"last-event-id": after, "accept": "text/event-stream", **more.pop("headers", {})}
    body = {"thread_id": thread, "resource_id": "alice", "message": message, **more}
    async with sidecar.http.stream("POST", path, json=body, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
        yield Stream(response)


def refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.smoke
async def test_a_running_turn_is_joined_where_the_stream_broke_and_none_is_started(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text()
        had = stream.events
    async with repeat(sidecar, thread, "[[hold 3]]", had[-1].id) as again:
        model.release()
        rest = await again.rest()
    assert [event.number for event in rest] == list(range(len(had) + 1, len(had) + 1 + len(rest)))
    assert rest[-1].data["status"] == "completed"
    assert [who for who, _ in await sidecar.history(thread)] == ["user", "assistant"]


async def test_an_ended_one_is_replayed_from_there_and_after_its_end_there_is_nothing(
    sidecar: Sidecar, thread: str
) -> None:
    async with sidecar.stream(thread, "Hello") as stream:
        events = await stream.rest()
    async with repeat(sidecar, thread, "Hello", events[-3].id) as again:
        assert [event.id for event in await again.rest()] == [event.id for event in events[-2:]]
    async with repeat(sidecar, thread, "Hello", events[-1].id) as again:
        assert again.response.status_code == 204
    assert [who for who, _ in await sidecar.history(thread)] == ["user", "assistant"]


@pytest.mark.smoke
async def test_another_body_is_refused(sidecar: Sidecar, thread: str) -> None:
    async with sidecar.stream(thread, "Hello") as stream:
        events = await stream.rest()
    async with repeat(sidecar, thread, "Hello!", events[3].id) as again:
        refused(again.response, 422, "idempotency_mismatch")
    assert [who for who, _ in await sidecar.history(thread)] == ["user", "assistant"]


@pytest.mark.smoke
async def test_one_that_is_not_held_is_told_and_nothing_is_started(sidecar: Sidecar, thread: str) -> None:
    async with repeat(sidecar, thread, "Hello", f"{uuid.uuid4()}-7") as again:
        refused(again.response, 410, "replay_gone")
    assert (await sidecar.session(thread)).status_code == 404


async def test_one_of_another_thread_is_none(sidecar: Sidecar, thread: str, another_thread: str) -> None:
    async with sidecar.stream(another_thread, "Hello") as stream:
        events = await stream.rest()
    async with repeat(sidecar, thread, "Hello", events[3].id) as again:
        refused(again.response, 410, "replay_gone")


@pytest.mark.parametrize("held", [True, False])
async def test_with_a_key_it_goes_on_after_the_id_too(sidecar: Sidecar, thread: str, held: bool) -> None:
    headers = {"idempotency-key": str(uuid.uuid4())}
    body = {"thread_id": thread, "resource_id": "alice", "message": "Hello"}
    async with sidecar.http.stream("POST", "/v1/chat", json=body, headers=headers) as response:
        events = await Stream(response).rest()
    after = events[-3].id if held else f"{uuid.uuid4()}-7"
    async with repeat(sidecar, thread, "Hello", after, headers=headers) as again:
        if held:
            assert [event.id for event in await again.rest()] == [event.id for event in events[-2:]]
        else:
            refused(again.response, 410, "replay_gone")


async def test_the_first_turn_of_a_branch_is_joined_the_same_way(
    sidecar: Sidecar, original: str, another_thread: str, model: FaultyModel
) -> None:
    how: dict[str, Any] = {"path": "/v1/chat/fork", "from_thread_id": original}
    async with sidecar.stream(another_thread, "[[hold 3]]", **how) as stream:
        await stream.until_text()
        had = stream.events
    async with repeat(sidecar, another_thread, "[[hold 3]]", had[-1].id, **how) as again:
        model.release()
        rest = await again.rest()
    assert rest[0].number == len(had) + 1
    assert rest[-1].data["status"] == "completed"
