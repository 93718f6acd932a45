"""CPU that a short turn and one delta cost a server on their way from the CLI to the reader."""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

from claude_agent_sdk import ClaudeSDKClient

from bench.contenders import MESSAGE
from bench.names import CONNECTED, MADE, OURS, SENT, UI
from bench.options import options
from bench.samples import Samples
from bench.servers import Server, application, cpu, quiet, sidecar, stand_in

FEW, MANY = 10, 2000
TURNS = 10
_MESSAGE_ID = re.compile(rb'"messageId":"([^"]+)"')


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """What a turn of many deltas takes more than a turn of few, for each delta: the server alone, without its CLI."""
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(stand_in(home / "model.log"))
        ours = await stack.enter_async_context(sidecar(home / "warm", model.url, warm=1))
        env = {"BENCH_HOME": str(home / "asdict"), "BENCH_MODEL": model.url}
        theirs = await stack.enter_async_context(application(home / "asdict.log", "bench.apps:as_dict", env))
        ways: list[tuple[str, Server, str, _Reader]] = [
            (OURS, ours, "/v1/chat", _Reader({"thread_id": "t", "resource_id": "bench"})),
            (UI, ours, "/v1/ai-sdk/chat", _Page({"id": "page", "resource_id": "bench"})),
            (MADE, theirs, "/chat", _Reader({"send": False})),
            (SENT, theirs, "/chat", _Reader({"send": True})),
        ]
        for _ in range(rounds):
            for name, server, path, reader in ways:
                few = await _cpu(server, path, reader, f"{FEW} deltas")
                many = await _cpu(server, path, reader, f"{MANY} deltas")
                samples.add("delta", name, "CPU µs", (many - few) / TURNS / (MANY - FEW) * 1e6)
            samples.add("short turn", OURS, "CPU ms", await _cpu(ours, *ways[0][2:], MESSAGE) / TURNS * 1e3)
            samples.add("short turn", CONNECTED, "CPU ms", await _connected(home / "sdk", model.url) / TURNS * 1e3)


class _Reader:
    """Who asks and reads."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def body(self, message: str) -> dict[str, Any]:
        return {**self._fields, "message": message}

    def hear(self, piece: bytes) -> None:
        pass


class _Page(_Reader):
    """The same for a page with the AI SDK's client: it says behind which answer its message is."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self._before: list[dict[str, Any]] = []

    def body(self, message: str) -> dict[str, Any]:
        said = {"role": "user", "parts": [{"type": "text", "text": message}]}
        return {**self._fields, "messages": [*self._before, said]}

    def hear(self, piece: bytes) -> None:
        if (start := _MESSAGE_ID.search(piece)) is not None:
            self._before = [{"id": start[1].decode(), "role": "assistant"}]


async def _connected(home: Path, model: str) -> float:
    """CPU seconds that as many short turns take who uses a connected client directly, after one that is not counted."""
    before = 0.0
    async with ClaudeSDKClient(options(home / "claude", home / "workspace", model)) as client:
        for number in range(1 + TURNS):
            if number == 1:
                await quiet()
                before = time.process_time()
            await client.query(MESSAGE)
            async for _ in client.receive_response():
                pass
    return time.process_time() - before


async def _cpu(server: Server, path: str, reader: _Reader, message: str) -> float:
    """CPU seconds of so many turns, after one that is not counted."""
    before = 0.0
    for number in range(1 + TURNS):
        if number == 1:
            await quiet()
            before = cpu(server.process, alone=True)
        async with server.http.stream("POST", path, json=reader.body(message)) as response:
            response.raise_for_status()
            async for piece in response.aiter_raw():
                reader.hear(piece)
    return cpu(server.process, alone=True) - before
