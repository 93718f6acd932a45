"""The applications that the sidecar is measured against, each as its own documentation would have it built."""

import dataclasses
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from claude_agent_sdk import ClaudeSDKClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.options import options

HOME = Path(os.environ["BENCH_HOME"])
MODEL = os.environ["BENCH_MODEL"]


def _options() -> Any:
    return options(HOME / "claude", HOME / "workspace", MODEL)


async def _bare(_: Request) -> Response:
    return JSONResponse({"object": "session", "status": "idle"})


class _AsDict:
    """One connected client; its messages go through `asdict` and `json.dumps`, as in most wrappers of the SDK."""

    def __init__(self) -> None:
        self._client: ClaudeSDKClient | None = None

    async def chat(self, request: Request) -> Response:
        """Stream the messages; without `send` only make their JSON, and answer with its size."""
        if self._client is None:
            self._client = ClaudeSDKClient(_options())
            await self._client.connect()
        asked = await request.json()
        await self._client.query(asked["message"])
        if not asked["send"]:
            return JSONResponse({"bytes": sum([len(line) async for line in self._lines(self._client)])})
        return StreamingResponse(self._lines(self._client), media_type="text/event-stream")

    async def _lines(self, client: ClaudeSDKClient) -> AsyncIterator[str]:
        async for message in client.receive_response():
            yield f"data: {json.dumps(dataclasses.asdict(message))}\n\n"


bare = Starlette(routes=[Route("/", _bare)])
as_dict = Starlette(routes=[Route("/chat", _AsDict().chat, methods=["POST"])])
