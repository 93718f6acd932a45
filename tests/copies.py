"""Threads that go on from a conversation that was had once: what the CLI wrote is copied, and costs no start of it."""

import uuid

from tests.server import Sidecar

NO_SPARE = {"SIDECAR_SPARE_PROCESSES": "0"}


async def become_known(sidecar: Sidecar, thread: str, mode: str | None) -> str:
    """A thread with a completed turn "My name is Ada": one that is warm, or one that was in the `home` at the start."""
    if mode == "cold":
        return "t1"
    await sidecar.say(thread, "My name is Ada")
    await sidecar.until_logged("turn", thread_id=thread)
    return thread


async def copied(sidecar: Sidecar, original: str, thread: str) -> str:
    """Have another thread with the transcript that the CLI wrote of one at rest, to the byte but for its session ID."""
    session_id, new_id = await sidecar.session_id(original), str(uuid.uuid4())
    transcript = sidecar.transcript(session_id)
    whole = transcript.read_bytes().replace(session_id.encode(), new_id.encode())
    transcript.with_name(f"{new_id}.jsonl").write_bytes(whole)
    body = {"thread_id": thread, "resource_id": "alice", "sdk_session_id": new_id}
    response = await sidecar.http.put("/v1/session", json=body)
    assert response.status_code == 201, response.text
    return thread
