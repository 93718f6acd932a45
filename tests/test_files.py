"""Where a session's file lies: everybody goes by the same file, or nobody by any; and finding it takes no time."""

import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.modes import in_both_modes
from tests.replicas import Know
from tests.server import Sidecar, parting
from tests.transcripts import get, messages, metadata, texts

Make = Callable[..., Sidecar]


def stale(sidecar: Sidecar, session_id: str, directory: str = "-restored") -> Path:
    """A second file of a session in another project directory, as a partial restore leaves it."""
    copy = sidecar.home / "claude" / "projects" / directory / f"{session_id}.jsonl"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(sidecar.transcript(session_id).read_bytes())
    return copy


async def patch(sidecar: Sidecar, thread: str, **fields: str) -> httpx.Response:
    return await sidecar.http.patch("/v1/session", json={"thread_id": thread, "resource_id": "alice", **fields})


async def listed(sidecar: Sidecar, thread: str) -> str:
    """What the list with metadata says of a thread's transcript."""
    params = {"resource_id": "alice", "include": "metadata", "thread_id_prefix": thread}
    data = (await sidecar.http.get("/v1/sessions", params=params)).json()["data"]
    (found,) = [row for row in data if row["thread_id"] == thread]
    state: str = found["metadata"]["transcript"]
    return state


@in_both_modes
async def test_a_session_in_two_project_directories_is_refused_and_both_files_stay_as_they_are(
    sidecar: Sidecar, known: str, thread: str
) -> None:
    session_id = await sidecar.session_id(thread)
    own = sidecar.transcript(session_id)
    copy = stale(sidecar, session_id)
    aside = copy.rename(copy.with_suffix(".aside"))
    await sidecar.say(thread, "I live in London")
    assert await listed(sidecar, thread) == "present"
    aside.rename(copy)  # while the sidecar runs
    before = own.read_bytes(), copy.read_bytes()

    fork = {"from_thread_id": thread}
    for refused in (
        await sidecar.chat(thread, "Who am I?"),
        await sidecar.chat(thread, "Who am I?", if_missing="fail"),
        await get(sidecar, "/v1/session/messages", thread),
        await patch(sidecar, thread, title="Ada"),
        await sidecar.post("/v1/chat/fork", f"{thread}-fork", **fork),
        await sidecar.post("/v1/chat/fork", f"{thread}-fork", **fork, message="Who am I?"),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "session_ambiguous")
        assert "session-sidecar doctor" in refused.json()["detail"]
        assert str(sidecar.home) not in refused.text
    assert (await metadata(sidecar, thread))["transcript"] == "ambiguous"
    assert await listed(sidecar, thread) == "ambiguous"
    assert (await sidecar.session(f"{thread}-fork")).status_code == 404
    assert any(str(own) in line and str(copy) in line for line in sidecar.log)
    parting(before[0], own.read_bytes())  # a process that was kept has left
    assert copy.read_bytes() == before[1]

    copy.unlink()
    assert "You have said 3 things. First: My name is Ada" in await sidecar.say(thread, "Who am I?")
    assert len(await messages(sidecar, thread)) == 6
    assert await listed(sidecar, thread) == "present"


async def test_a_session_with_two_transcripts_is_not_adopted(sidecar: Sidecar, thread: str, knows: Know) -> None:
    await knows(sidecar, f"{thread}-before")
    session_id = await sidecar.session_id(f"{thread}-before")
    await sidecar.http.delete("/v1/session", params={"thread_id": f"{thread}-before", "resource_id": "alice"})
    copy = stale(sidecar, session_id)
    body = {"thread_id": thread, "resource_id": "alice", "sdk_session_id": session_id}
    refused = await sidecar.http.put("/v1/session", json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "session_ambiguous")
    assert (await sidecar.session(thread)).status_code == 404
    copy.unlink()
    assert (await sidecar.http.put("/v1/session", json=body)).status_code == 201


@pytest.mark.smoke
async def test_who_asks_to_be_forgotten_is_forgotten_in_both_files(sidecar: Sidecar, thread: str) -> None:
    await sidecar.say(thread, "My name is Ada")
    session_id = await sidecar.session_id(thread)
    stale(sidecar, session_id)
    params = {"thread_id": thread, "resource_id": "alice", "transcript": "delete"}
    assert (await sidecar.http.delete("/v1/session", params=params)).status_code == 204
    assert list(sidecar.home.glob(f"claude/projects/*/{session_id}*")) == []


async def test_an_empty_file_and_a_link_are_no_second_transcript(cold: Sidecar, thread: str) -> None:
    await cold.say(thread, "My name is Ada")
    session_id = await cold.session_id(thread)
    own = cold.transcript(session_id)
    projects = own.parent.parent
    stale(cold, session_id, "-empty").write_bytes(b"")
    (projects / "-moved").symlink_to(own.parent)  # the workspace has moved, and its old name still leads to it
    try:
        assert "You have said 2 things." in await cold.say(thread, "Who am I?")
        assert (await patch(cold, thread, title="Ada")).status_code == 200
        assert (await metadata(cold, thread))["title"] == "Ada"
        assert texts(await messages(cold, thread))[0] == "My name is Ada"
        assert (projects / "-empty" / own.name).read_bytes() == b""
    finally:
        (projects / "-moved").unlink()


async def test_a_transcript_that_was_moved_is_found_where_it_is_now(sidecar: Sidecar, thread: str, knows: Know) -> None:
    await knows(sidecar, thread)
    own = sidecar.transcript(await sidecar.session_id(thread))
    for directory in ("-there", own.parent.name):
        assert await listed(sidecar, thread) == "present"
        target = own.parent.parent / directory
        target.mkdir(exist_ok=True)
        sidecar.transcript(own.stem).rename(target / own.name)
    assert await listed(sidecar, thread) == "present"


async def test_a_directory_that_cannot_be_looked_into_makes_no_transcript_a_lost_one(
    a_sidecar: Make, thread: str, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        session_id = await sidecar.session_id(thread)
        own = sidecar.transcript(session_id)
        kept = own.rename(sidecar.home / "kept")
        loop = own.parent.parent / "-loop"
        loop.symlink_to(loop)  # nobody can say what is behind it: as with a directory of another user
        refused = await sidecar.chat(thread, "Who am I?")
        assert (refused.status_code, refused.json()["code"]) == (503, "transcripts_unavailable")
        assert any("-loop" in line for line in sidecar.log)
        assert await sidecar.session_id(thread) == session_id
        kept.rename(own)
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")
        own.unlink()
        loop.unlink()
        assert (await sidecar.chat(thread, "Who am I?")).json()["session"]["outcome"] == "restarted"


@pytest.mark.long
async def test_a_list_with_metadata_takes_no_longer_among_3000_project_directories(
    a_sidecar: Make, knows: Know
) -> None:
    async def seconds(sidecar: Sidecar) -> float:
        began = time.perf_counter()
        params = {"resource_id": "alice", "include": "metadata"}
        data = (await sidecar.http.get("/v1/sessions", params=params)).json()["data"]
        took = time.perf_counter() - began
        assert [row["metadata"]["transcript"] for row in data] == ["present"] * 50
        return took

    async with a_sidecar() as sidecar:
        await knows(sidecar, "thread-0")
        for number in range(1, 50):
            await sidecar.post("/v1/chat/fork", f"thread-{number}", from_thread_id="thread-0")
        few = statistics.median([await seconds(sidecar) for _ in range(9)])
        projects = sidecar.transcript(await sidecar.session_id("thread-0")).parent.parent
        for number in range(3000):
            (projects / f"-srv-work-{number}").mkdir()
        many = statistics.median([await seconds(sidecar) for _ in range(9)])
        await sidecar.stop(signal.SIGTERM)
        await sidecar.restart()
        first = await seconds(sidecar)
        walks = []
        for _ in range(5):
            began = time.perf_counter()
            assert not list(projects.glob("*/no-such-session.jsonl"))
            walks.append(time.perf_counter() - began)
    assert many < 3 * few  # 0.17 s against 18.7 s it was
    assert first < 50 * statistics.median(walks) / 2  # before it knows where they are: not even half a walk for each
