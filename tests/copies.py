"""Threads that go on from a conversation that was had once: what the CLI wrote is copied, and costs no start of it."""

import uuid
from pathlib import Path

from tests.server import Sidecar


async def become_known(sidecar: Sidecar, thread: str, mode: str | None) -> str:
    """A thread with a completed turn "My name is Ada": one that is warm, or one that was in the `home` at the start."""
    if mode == "cold":
        return "t1"
    await sidecar.say(thread, "My name is Ada")
    await sidecar.until_logged("turn", thread_id=thread)
    return thread


async def adopted(sidecar: Sidecar, written: Path, thread: str, resource: str = "alice") -> None:
    """Have a thread with a copy of a transcript, to the byte but for its session ID. No turn is run for it."""
    session_id = str(uuid.uuid4())
    place = sidecar.home / "claude" / "projects" / written.parent.name
    place.mkdir(parents=True, exist_ok=True)
    copy = written.read_bytes().replace(written.stem.encode(), session_id.encode())
    (place / f"{session_id}.jsonl").write_bytes(copy)
    body = {"thread_id": thread, "resource_id": resource, "sdk_session_id": session_id}
    response = await sidecar.http.put("/v1/session", json=body)
    assert response.status_code == 201, response.text


async def copied(sidecar: Sidecar, original: str, thread: str) -> str:
    """The thread, with a copy of the transcript of another one that is at rest."""
    await adopted(sidecar, sidecar.transcript(await sidecar.session_id(original)), thread)
    return thread
