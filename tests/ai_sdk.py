"""The AI SDK's own client: the `ai` package of a major version in node, whose chats are told what to do."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from tests.node import CLIENTS
from tests.server import SECONDS, Sidecar

Json = dict[str, Any]
MAJORS = ("ai-5", "ai-6", "ai-7")


class Node:
    """A node process with one major version of the client."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._one = asyncio.Lock()
        self._chats = 0

    async def tell(self, do: str, **asked: Any) -> Json:
        """Have it do one thing, and wait until that is done; what it says then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(SECONDS), self._one:
            self._process.stdin.write(json.dumps({"do": do, **asked}).encode() + b"\n")
            answer: Json = json.loads(await self._process.stdout.readline())
        assert "thrown" not in answer, answer["thrown"]
        return answer

    async def open(
        self, sidecar: Sidecar, chat: str, messages: list[Json] | None = None, *, resource: str = "alice", **more: Any
    ) -> "Chat":
        """A chat as a page has it: with `body`, what it sends beside the messages; it may `resubmit` tools' results."""
        self._chats += 1
        name = str(self._chats)
        url = f"{sidecar.http.base_url}/v1/ai-sdk/chat".replace("//v1", "/v1")
        headers = {"X-Resource-Id": resource}
        await self.tell("open", chat=name, id=chat, url=url, headers=headers, messages=messages or [], **more)
        return Chat(self, name, sidecar)

    async def check(self, chunks: list[Json], messages: list[Json]) -> None:
        """See that its own schemas take these chunks and messages."""
        assert await self.tell("check", chunks=chunks, messages=messages) == {"wrong": [], "messages": None}


class Chat:
    """A chat of the client's. Each call gives what there is of it afterwards."""

    def __init__(self, node: Node, name: str, sidecar: Sidecar) -> None:
        self._node = node
        self._name = name
        self._sidecar = sidecar

    async def _tell(self, do: str, **asked: Any) -> Json:
        return await self._node.tell(do, chat=self._name, **asked)

    async def send(self, text: str, edits: str | None = None, **options: Any) -> Json:
        """Send a message, or one in the place of another, and wait for the end of the answer."""
        self._sidecar.keep_secret(text)
        return await self._tell("send", message=_message(text, edits), options=options)

    async def start(self, text: str, edits: str | None = None, **options: Any) -> Json:
        """Send a message, and wait for nothing."""
        self._sidecar.keep_secret(text)
        return await self._tell("start", message=_message(text, edits), options=options)

    async def send_parts(self, *parts: Json) -> Json:
        return await self._tell("send", message={"parts": parts}, options={})

    async def regenerate(self, message_id: str | None = None) -> Json:
        return await self._tell("regenerate", options={"messageId": message_id} if message_id else {})

    async def resume(self) -> Json:
        return await self._tell("resume")

    async def begin_to_resume(self) -> Json:
        return await self._tell("begin_to_resume")

    async def until(self, text: str) -> Json:
        """Wait until this is somewhere in its messages."""
        return await self._tell("until", text=text)

    async def wait(self) -> Json:
        """Wait for the end of what was started."""
        return await self._tell("wait")

    async def stop(self) -> Json:
        return await self._tell("stop")

    async def look(self) -> Json:
        return await self._tell("look")


@contextlib.asynccontextmanager
async def running(major: str, place: Path) -> AsyncIterator[Node]:
    """A node process, for as long as the block lasts."""
    (place / "node_modules").symlink_to(CLIENTS / "node_modules")  # packages are looked for beside the program
    program = shutil.copy(CLIENTS / "ai-sdk.mjs", place)
    process = await asyncio.create_subprocess_exec(
        "node", program, major, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24
    )
    try:
        yield Node(process)
    finally:
        process.kill()
        await process.wait()


async def post(sidecar: Sidecar, chat: str, before: list[Json], text: str, **fields: Any) -> httpx.Response:
    """Send a message behind others, without the client; the whole answer."""
    message = {"id": "mine", "role": "user", "parts": [{"type": "text", "text": text}]}
    sidecar.keep_secret(text)
    body = {"id": chat, "resource_id": "alice", "messages": [*before, message], **fields}
    return await sidecar.http.post("/v1/ai-sdk/chat", json=body)


async def load(sidecar: Sidecar, chat: str, **query: Any) -> httpx.Response:
    """The chat as a page loads it."""
    path = f"/v1/ai-sdk/chat/{quote(chat, safe='')}"
    return await sidecar.http.get(path, params={"resource_id": "alice", **query})


def chunks(stream: str) -> list[Json]:
    """The chunks of a whole stream."""
    *frames, done = [frame.removeprefix("data: ") for frame in stream.split("\n\n") if frame.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(frame) for frame in frames]


def told(stream: str) -> str:
    """The text of a whole stream."""
    return "".join(chunk["delta"] for chunk in chunks(stream) if chunk["type"] == "text-delta")


def texts(messages: list[Json]) -> list[tuple[str, str]]:
    """Who has said what."""
    return [(m["role"], "".join(part.get("text", "") for part in m["parts"])) for m in messages]


def plain(messages: list[Json]) -> list[Json]:
    """Messages without what a stream alone has, to compare them with those of the history."""
    shown = []
    for message in messages:
        parts = [{name: value for name, value in part.items() if name != "rawInput"} for part in message["parts"]]
        shown.append({"id": message["id"], "role": message["role"], "parts": parts})
    return shown


def _message(text: str, edits: str | None) -> Json:
    return {"text": text, **({"messageId": edits} if edits else {})}
