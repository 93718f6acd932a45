"""Adopting a session that exists: a person's own, or one of an older backend."""

import asyncio
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.server import Sidecar

Make = Callable[..., Sidecar]


async def adopt(sidecar: Sidecar, thread: str, session_id: str, resource: str = "alice") -> httpx.Response:
    body = {"thread_id": thread, "resource_id": resource, "sdk_session_id": session_id}
    return await sidecar.http.put("/v1/session", json=body)


async def stray(sidecar: Sidecar, thread: str) -> str:
    """A session with a transcript that no thread has: a copy of `original`."""
    assert (await sidecar.post("/v1/chat/fork", thread, from_thread_id="the original")).status_code == 201
    session_id = await sidecar.session_id(thread)
    await sidecar.http.delete("/v1/session", params={"thread_id": thread, "resource_id": "alice"})
    return session_id


async def test_an_adopted_session_goes_on_where_it_was_left(sidecar: Sidecar, original: str, thread: str) -> None:
    session_id = await stray(sidecar, f"{thread}-before")
    project = sidecar.home / "claude" / "projects" / "-home-ada-work"
    project.mkdir()
    sidecar.transcript(session_id).rename(project / f"{session_id}.jsonl")  # a person works where she likes
    response = await adopt(sidecar, thread, session_id)
    assert response.status_code == 201
    assert response.json() == (await sidecar.session(thread)).json()
    assert response.json()["sdk_session_id"] == session_id
    answer = (await sidecar.chat(thread, "Who am I?")).json()
    assert (answer["session"]["outcome"], answer["session"]["sdk_session_id"]) == ("resumed", session_id)
    assert "First: My name is Ada" in answer["text"]


async def test_adopting_again_changes_nothing_and_no_other_session_or_thread_gets_in_between(
    sidecar: Sidecar, original: str, thread: str, another_thread: str
) -> None:
    session_id = await stray(sidecar, thread)
    assert (await adopt(sidecar, thread, session_id)).status_code == 201
    again = await adopt(sidecar, thread, session_id)
    assert (again.status_code, again.json()) == (200, (await sidecar.session(thread)).json())
    other = await stray(sidecar, another_thread)
    refused = await adopt(sidecar, thread, other)
    assert (refused.status_code, refused.json()["code"]) == (409, "thread_exists")
    for resource in ("alice", "bob"):
        refused = await adopt(sidecar, another_thread, session_id, resource)
        assert (refused.status_code, refused.json()["code"]) == (409, "session_taken")
    await sidecar.say(thread, "Go on")  # its process may be kept; that is no stranger's
    refused = await adopt(sidecar, another_thread, session_id)
    assert (refused.status_code, refused.json()["code"]) == (409, "session_taken")


async def test_a_session_without_a_transcript_is_not_adopted(sidecar: Sidecar, thread: str) -> None:
    refused = await adopt(sidecar, thread, str(uuid.uuid4()))
    assert (refused.status_code, refused.json()["code"]) == (410, "session_missing")
    assert (await sidecar.session(thread)).status_code == 404


@pytest.mark.smoke
@pytest.mark.parametrize(
    "session_id",
    [
        "",
        "a title",
        "../../etc/passwd",
        "/tmp/x.jsonl",
        "7B3F2C1E-9D4A-4E6B-8C5D-0A1B2C3D4E5F",
        "7b3f2c1e9d4a4e6b8c5d0a1b2c3d4e5f",
        "{7b3f2c1e-9d4a-4e6b-8c5d-0a1b2c3d4e5f}",
    ],
)
async def test_only_an_id_as_the_sdk_writes_it_is_taken(sidecar: Sidecar, thread: str, session_id: str) -> None:
    refused = await adopt(sidecar, thread, session_id)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "sdk_session_id")


async def test_a_session_that_a_cli_has_open_is_not_adopted(sidecar: Sidecar, original: str, thread: str) -> None:
    session_id = await stray(sidecar, thread)
    # A process with our config directory, and its entry as the CLI writes it.
    env = {**os.environ, "CLAUDE_CONFIG_DIR": str(sidecar.home / "claude")}
    process = await asyncio.create_subprocess_exec("sleep", "60", env=env)
    entry = sidecar.home / "claude" / "sessions" / f"{process.pid}.json"
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    entry.write_text(json.dumps({"pid": process.pid, "procStart": started, "sessionId": session_id}))
    refused = await adopt(sidecar, thread, session_id)
    assert (refused.status_code, refused.json()["code"]) == (409, "session_busy")
    assert (await sidecar.session(thread)).status_code == 404
    process.kill()
    await process.wait()
    entry.unlink()
    assert (await adopt(sidecar, thread, session_id)).status_code == 201
