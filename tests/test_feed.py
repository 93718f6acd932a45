"""What happens to threads is told to whoever keeps a list of them: all of it, in order, and nothing that was said."""

import asyncio
import itertools
import random
import signal
import time
import typing
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from session_sidecar.api.models.feed import EVENTS
from session_sidecar.turns.feed import Feed
from session_store import ThreadKey
from tests.faults import FaultyModel
from tests.server import SECONDS, Event, Sidecar, Stream, a_moment, followed

Make = Callable[..., Sidecar]
NOWHERE = "00000000-0000-4000-8000-000000000000"
_numbers = itertools.count(1)


@pytest.fixture
def resource() -> str:
    """Somebody whose threads no other test has."""
    return f"person-{next(_numbers)}"


class Person:
    """Somebody with threads, who keeps an eye on them."""

    def __init__(self, sidecar: Sidecar, resource: str) -> None:
        self.sidecar, self.resource = sidecar, resource

    def key(self, thread: str) -> dict[str, str]:
        return {"thread_id": thread, "resource_id": self.resource}

    async def say(self, thread: str, message: str, **more: Any) -> str:
        return await self.sidecar.say(thread, message, resource_id=self.resource, **more)

    async def title(self, thread: str, title: str = "Trip to Jupiter") -> None:
        answer = await self.sidecar.http.patch("/v1/session", json={**self.key(thread), "title": title})
        assert answer.status_code == 200, answer.text

    async def fork(self, parent: str, thread: str, **more: Any) -> None:
        answer = await self.sidecar.post(
            "/v1/chat/fork", thread, resource_id=self.resource, from_thread_id=parent, **more
        )
        assert answer.is_success, answer.text

    async def delete(self, thread: str) -> None:
        answer = await self.sidecar.http.delete("/v1/session", params={**self.key(thread), "force": "true"})
        assert answer.status_code == 204

    async def session(self, thread: str) -> Any:
        return (await self.sidecar.session(thread, self.resource)).json()

    async def threads(self) -> dict[str, bool]:
        """The list as GET has it, and on which threads a turn runs."""
        query = {"resource_id": self.resource, "limit": "200"}
        listed = (await self.sidecar.http.get("/v1/sessions", params=query)).json()
        return {session["thread_id"]: session["status"] == "running" for session in listed["data"]}

    async def until(self, stream: Stream, name: str) -> Event:
        """The next event, which is of this name and says what it is documented to say."""
        async with asyncio.timeout(SECONDS):
            event = await anext(aiter(stream))
        assert event.name == event.data["type"] == name, event
        assert event.data.keys() == typing.cast("Any", EVENTS[name]).__required_keys__
        assert event.data.get("resource_id", self.resource) == self.resource
        return event


@pytest.fixture
def person(sidecar: Sidecar, resource: str) -> Person:
    return Person(sidecar, resource)


async def test_each_change_is_told_when_it_is_there_to_be_seen(person: Person, model: FaultyModel) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        assert (await person.until(stream, "reset")).data == {"type": "reset"}
        saying = asyncio.create_task(person.say("t", "My name is Ada [[hold 1]]"))
        created = await person.until(stream, "created")
        assert created.data["sdk_session_id"] == (await person.session("t"))["sdk_session_id"]
        started = await person.until(stream, "turn_started")
        assert (started.data["thread_id"], started.data["origin"]) == ("t", "message")
        assert (await person.session("t"))["status"] == "running"
        await model.requested()
        model.release()
        ended = await person.until(stream, "turn_ended")
        assert (await person.session("t"))["status"] == "idle"
        assert ended.data["turn_id"] == started.data["turn_id"]
        assert (ended.data["status"], ended.data["code"]) == ("completed", None)
        await saying

        await person.title("t")
        assert (await person.until(stream, "titled")).data["thread_id"] == "t"
        await person.fork("t", "copy")
        forked = await person.until(stream, "forked")
        made = await person.session("copy")
        assert {name: forked.data[name] for name in made.keys() & forked.data.keys()}.items() <= made.items()
        assert forked.data["parent_thread_id"] == "t"
        await person.fork("t", "branch", message="And I?")
        assert (await person.until(stream, "forked")).data["thread_id"] == "branch"
        await person.until(stream, "turn_started")
        await person.until(stream, "turn_ended")

        session_id = (await person.session("t"))["sdk_session_id"]
        await person.delete("t")
        assert (await person.until(stream, "deleted")).data["thread_id"] == "t"
        adoption = {**person.key("again"), "sdk_session_id": session_id}
        assert (await person.sidecar.http.put("/v1/session", json=adoption)).status_code == 201
        assert (await person.until(stream, "created")).data["sdk_session_id"] == session_id
        await person.sidecar.http.delete("/v1/sessions", params={"resource_id": person.resource})
        gone = {(await person.until(stream, "deleted")).data["thread_id"] for _ in range(3)}
        assert gone == {"copy", "branch", "again"}
        assert await person.threads() == {}
    numbers = [event.number for event in stream.events]
    assert numbers == sorted(set(numbers))


async def test_at_the_end_of_a_turn_the_thread_is_idle_for_whoever_asks(person: Person) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        for number in range(5):
            saying = asyncio.create_task(person.say("t", f"thing {number}"))
            await stream.until("turn_ended")
            assert (await person.session("t"))["status"] == "idle"
            await saying


async def test_how_a_turn_ended_is_told(person: Person) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        async with person.sidecar.stream("t", "[[hold 1]]", resource_id=person.resource) as turn:
            await turn.until_text()
            await person.sidecar.http.post("/v1/chat/interrupt", json=person.key("t"))
        stopped = await stream.until("turn_ended")
        assert (stopped.data["status"], stopped.data["code"]) == ("interrupted", None)
        await person.sidecar.post("/v1/chat", "t", resource_id=person.resource, message="[[fail 400]]")
        failed = await stream.until("turn_ended")
        assert (failed.data["status"], failed.data["code"]) == ("failed", "api_error")


async def test_nothing_is_told_of_what_is_refused_at_once(person: Person) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        await person.until(stream, "reset")
        refused = await person.sidecar.post(
            "/v1/chat", "t", resource_id=person.resource, message="Hi there", agent="nobody"
        )
        assert refused.status_code == 422
        async with person.sidecar.stream("u", "[[hold 1]]", resource_id=person.resource) as turn:
            await turn.until_text()
            busy = await person.sidecar.post("/v1/chat", "u", resource_id=person.resource, message="Me too, please")
            assert busy.status_code == 409
            await person.delete("u")
        await stream.until("deleted")
    names = [(event.name, event.data["thread_id"]) for event in stream.events[1:]]
    assert names == [("created", "u"), ("turn_started", "u"), ("turn_ended", "u"), ("deleted", "u")]


async def test_of_a_turn_that_comes_to_nothing_nothing_is_left_in_the_list(
    a_sidecar: Make, resource: str, tmp_path: Any
) -> None:
    (tmp_path / "claude").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "claude").chmod(0o700)
    (tmp_path / "agents.toml").write_text(f'[default]\ncli_path = "{tmp_path}/claude"\n')
    async with a_sidecar("--agents", str(tmp_path / "agents.toml")) as sidecar:
        person = Person(sidecar, resource)
        async with followed(sidecar, resource_id=resource) as stream:
            refused = await sidecar.post("/v1/chat", "t", resource_id=resource, message="Hello there")
            assert refused.status_code in (502, 503), refused.text
            ended = await stream.until("turn_ended")
        assert (ended.data["status"], ended.data["code"]) == ("failed", refused.json()["code"])
        assert [event.name for event in stream.events] == ["reset", "created", "turn_started", "deleted", "turn_ended"]
        assert await person.threads() == {}


@pytest.mark.smoke
async def test_all_who_read_are_told_the_same(person: Person) -> None:
    streams: list[Stream] = []
    async with (
        followed(person.sidecar, resource_id=person.resource) as one,
        followed(person.sidecar, resource_id=person.resource) as two,
        followed(person.sidecar, resource_id=person.resource) as three,
        followed(person.sidecar, resource_id=f"not {person.resource}") as other,
    ):
        streams += [one, two, three]
        for stream in (*streams, other):
            await stream.until("reset")
        await person.say("t", "Hello there")
        for stream in streams:
            await stream.until("turn_ended")
        await person.sidecar.say("t", "Hello there", resource_id=f"not {person.resource}")
        await other.until("turn_ended")
        assert [event.name for event in other.events] == ["reset", "created", "turn_started", "turn_ended"]
    told = [[(event.id, event.data) for event in stream.events[1:]] for stream in streams]
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 3


async def test_nothing_of_what_is_said_is_told(person: Person) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        answer = await person.say("t", "a secret of mine")
        await person.title("t", "a title of mine")
        await stream.until("titled")
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store, no-transform"
    assert answer
    for said in ("secret", "title of mine", answer[:20]):
        assert said not in stream.raw


@pytest.mark.smoke
async def test_a_reader_who_comes_back_misses_nothing_and_has_nothing_twice(person: Person) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as first:
        await person.say("t", "one")
        started = await first.until("turn_started")
    await person.say("t", "two")
    async with followed(person.sidecar, resource_id=person.resource, after=started.id) as again:
        await person.title("t")
        await again.until("titled")
    assert [event.name for event in again.events] == ["turn_ended", "turn_started", "turn_ended", "titled"]
    async with followed(person.sidecar, resource_id=person.resource, after=first.events[0].id) as whole:
        await whole.until("titled")
    assert whole.events[:2] == first.events[1:]
    assert whole.events[2:] == again.events


@pytest.mark.smoke
async def test_who_comes_back_with_what_is_not_known_here_is_to_read_the_list(person: Person) -> None:
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        known = await stream.until("reset")
    feed_id = known.id.rpartition("-")[0]
    for after in (f"{NOWHERE}-1", f"{feed_id}-{known.number + 1_000_000}"):
        async with followed(person.sidecar, resource_id=person.resource, after=after) as stream:
            assert (await person.until(stream, "reset")).id.startswith(feed_id)
    async with followed(person.sidecar, resource_id=person.resource, after="an event") as stream:
        refused = stream.response
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Last-Event-ID")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_shutdown_ends_it_at_once_and_the_next_life_knows_nothing_of_this_one(
    a_sidecar: Make, resource: str, number: signal.Signals
) -> None:
    async with a_sidecar() as sidecar:
        async with followed(sidecar, resource_id=resource) as stream:
            await stream.until("reset")
            began = time.monotonic()
            sidecar.process.send_signal(number)
            last = (await stream.rest())[-1]  # to its end: nothing is broken off
            await sidecar.wait()
            assert time.monotonic() - began < 3
        await sidecar.restart()
        async with followed(sidecar, resource_id=resource, after=last.id) as stream:
            reset = await stream.until("reset")
        assert reset.id.rpartition("-")[0] != last.id.rpartition("-")[0]


async def test_a_reader_that_takes_nothing_holds_up_no_turn(person: Person) -> None:
    address = person.sidecar.http.base_url
    _, writer = await asyncio.open_connection(address.host, address.port, limit=1)
    writer.write(f"GET /v1/events?resource_id={person.resource} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    await writer.drain()
    async with followed(person.sidecar, resource_id=person.resource) as stream:
        for number in range(3):
            await person.say("t", f"thing {number}")
            await stream.until("turn_ended")
    writer.close()


# A list that is kept by it


async def kept(person: Person, stream: Stream) -> AsyncIterator[tuple[str, dict[str, bool]]]:
    """A list as a page keeps it: read at `reset`, then changed by each event; with the thread that this was about."""
    threads: dict[str, bool] = {}
    async for event in stream:
        thread = event.data.get("thread_id", "")
        if event.name == "reset":
            threads = await person.threads()
        elif event.name in ("created", "forked"):
            threads.setdefault(thread, False)
        elif event.name == "deleted":
            threads.pop(thread, None)
        elif thread in threads and event.name in ("turn_started", "turn_ended"):
            threads[thread] = event.name == "turn_started"
        yield thread, threads


async def act(person: Person, rng: random.Random, new: str) -> None:
    """Something that people do; what is refused is refused."""
    post, key = person.sidecar.post, person.key(rng.choice("abcd"))
    kind = rng.choices(("say", "fork", "branch", "title", "delete", "stop", "erase"), (6, 2, 2, 2, 2, 2, 0.3))[0]
    if kind == "say":
        how = rng.choice(("reject", "enqueue", "interrupt"))
        body = {**key, "message": "Hello there", "multitask_strategy": how}
        await post("/v1/chat", key["thread_id"], **body)
    elif kind in ("fork", "branch"):
        more = {"message": "And now?"} if kind == "branch" else {}
        await post("/v1/chat/fork", new, resource_id=person.resource, from_thread_id=key["thread_id"], **more)
    elif kind == "title":
        await person.sidecar.http.patch("/v1/session", json={**key, "title": "Trip"})
    elif kind == "delete":
        await person.sidecar.http.delete("/v1/session", params={**key, "force": rng.choice(("true", "false"))})
    elif kind == "stop":
        await person.sidecar.http.post("/v1/chat/interrupt", json=key)
    else:
        await person.sidecar.http.delete("/v1/sessions", params={"resource_id": person.resource, "force": "true"})


@pytest.mark.long
async def test_a_list_that_is_kept_by_events_is_the_list(person: Person) -> None:
    rng = random.Random(14)
    for thread in "ab":
        await person.say(thread, "Hello there")
    async with followed(person.sidecar, resource_id=person.resource) as first:
        from_the_beginning = kept(person, first)
        for number in range(2):
            async with followed(person.sidecar, resource_id=person.resource) as stream:
                acting = [asyncio.create_task(act(person, rng, f"new-{number}-{n}")) for n in range(8)]
                begun_among_it = kept(person, stream)
                for task in acting:
                    await task
                while any((await person.threads()).values()):
                    await a_moment()
                await person.say("last", "a thread that is there no longer than it is told")
                await person.delete("last")
                truth = await person.threads()
                for one in (from_the_beginning, begun_among_it):
                    async with asyncio.timeout(SECONDS):
                        told = [thread async for thread, threads in _until(one, truth)]
                    assert "last" in told
    assert {event.name for event in first.events} >= {"created", "forked", "turn_started", "turn_ended", "deleted"}


async def _until(
    told: AsyncIterator[tuple[str, dict[str, bool]]], truth: dict[str, bool]
) -> AsyncIterator[tuple[str, dict[str, bool]]]:
    """What is told until the last of it, with which the list is what it should be."""
    last = False
    async for thread, threads in told:
        yield thread, threads
        last = last or thread == "last"
        if last and threads == truth:
            return


# The log by itself

ALICE = ThreadKey("t", "alice")


def names(events: list[Any]) -> list[str]:
    return [event.kind for event in events]


async def test_who_falls_behind_what_is_held_is_to_read_the_list_and_goes_on_from_there() -> None:
    feed = Feed(max_events=10)
    with feed.reader("alice", None) as reader, feed.reader(None, None) as everybodys:
        assert names(await reader.take()) == ["reset"]
        for _ in range(11):
            feed.tell("titled", ALICE)
        assert names(await everybodys.take()) == ["reset", "titled"]
        reset, *rest = await reader.take()
        assert (reset.kind, reset.number) == ("reset", rest[0].number - 1)
        feed.tell("deleted", ALICE)
        assert names(await reader.take()) == ["deleted"]
    with feed.reader("alice", (feed.id, reset.number)) as again:
        assert [event.number for event in await again.take()][: len(rest)] == [event.number for event in rest]
    with feed.reader("alice", (feed.id, 1)) as late:
        assert names(await late.take()) == ["reset"]


async def test_what_others_do_wakes_nobody() -> None:
    feed = Feed()
    with feed.reader("bob", None) as reader:
        await reader.take()
        taking = asyncio.create_task(reader.take())
        await asyncio.sleep(0)
        feed.tell("titled", ALICE)
        assert not reader.news.is_set()
        feed.tell("titled", ThreadKey("t", "bob"))
        assert names(await taking) == ["titled"]


def test_it_is_bounded_in_number_and_in_bytes() -> None:
    feed = Feed(max_events=1000, max_bytes=100_000)
    with feed.reader("alice", None) as reader:
        for _ in range(2000):
            feed.tell("titled", ThreadKey("t" * 256, "alice"))
        assert sum(len(event.line) for event in reader.waiting) < 200_000
    assert len(feed._log) < 1000
    assert feed._bytes <= 100_000
    assert not feed._readers


async def test_what_another_replica_has_told_is_told_to_no_replica() -> None:
    feed = Feed()
    with feed.reader(None, None, own_only=True) as replica, feed.reader("alice", None) as caller:
        await replica.take()
        await caller.take()
        feed.pass_on("titled", {"type": "titled", "thread_id": "t", "resource_id": "alice", "at": "then"})
        feed.reset()
        feed.tell("deleted", ALICE)
        assert names(await replica.take()) == ["deleted"]
        assert names(await caller.take()) == ["titled", "reset", "deleted"]
