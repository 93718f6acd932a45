"""Transcripts for the tests: the real CLI's own, and longer or damaged ones made of its lines."""

import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from tests.server import Sidecar

AGENTS = """
[commands]
verbatim_prompts = false

[tools]
tools = ["Agent", "Bash"]
allowed_tools = ["Agent", "Bash"]
"""


async def get(sidecar: Sidecar, path: str, thread: str, **query: object) -> httpx.Response:
    """GET something of a thread of Alice's."""
    params = {"thread_id": thread, "resource_id": "alice", **{name: str(value) for name, value in query.items()}}
    return await sidecar.http.get(path, params=params)


async def messages(sidecar: Sidecar, thread: str, **query: object) -> list[dict[str, Any]]:
    """The first page of a thread's messages."""
    response = await get(sidecar, "/v1/session/messages", thread, **query)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


async def metadata(sidecar: Sidecar, thread: str) -> dict[str, Any]:
    """What `GET /v1/session` tells of a thread's transcript."""
    found: dict[str, Any] = (await get(sidecar, "/v1/session", thread)).json()["metadata"]
    return found


def texts(data: Iterable[dict[str, Any]]) -> list[str]:
    """What is said in messages; the kinds of their blocks where nothing is."""
    found = []
    for message in data:
        content = message["message"]["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found.append(" ".join(block.get("text", f"[{block['type']}]") for block in blocks))
    return found


async def settled(sidecar: Sidecar, thread: str) -> Path:
    """A thread's transcript, after the last line that its process writes."""
    await sidecar.at_rest()
    return sidecar.transcript(await sidecar.session_id(thread))


def repeat(lines: list[bytes], number: int) -> bytes:
    """A transcript of `number` messages at least: its lines over and over, each time as new entries of one chain."""
    made: list[str] = []
    said, last = 0, None
    while said < number:
        renamed: dict[str, str] = {}
        for entry in map(json.loads, lines):
            if "parentUuid" in entry:
                renamed[entry["uuid"]] = str(uuid.uuid4())
                entry.update(uuid=renamed[entry["uuid"]], parentUuid=renamed.get(entry["parentUuid"], last))
                last = entry["uuid"]
            if entry["type"] in {"user", "assistant"}:
                said += 1
            if entry["type"] == "assistant":
                entry["message"]["id"] = f"msg_{uuid.uuid4().hex}"
            made.append(json.dumps(entry) + "\n")
    return "".join(made).encode()
