"""CPU that one delta costs a server on its way from the CLI to the reader."""

import contextlib
from pathlib import Path
from typing import Any

from bench.names import MADE, OURS, SENT
from bench.samples import Samples
from bench.servers import Server, application, cpu, quiet, sidecar, stand_in

FEW, MANY = 10, 2000
TURNS = 10


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """What a turn of many deltas takes more than a turn of few, for each delta: the server alone, without its CLI."""
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(stand_in(home / "model.log"))
        ours = await stack.enter_async_context(sidecar(home / "warm", model.url, warm=1))
        env = {"BENCH_HOME": str(home / "asdict"), "BENCH_MODEL": model.url}
        theirs = await stack.enter_async_context(application(home / "asdict.log", "bench.apps:as_dict", env))
        ways: list[tuple[str, Server, str, dict[str, Any]]] = [
            (OURS, ours, "/v1/chat", {"thread_id": "t", "resource_id": "bench"}),
            (MADE, theirs, "/chat", {"send": False}),
            (SENT, theirs, "/chat", {"send": True}),
        ]
        for _ in range(rounds):
            for name, server, path, body in ways:
                few = await _cpu(server, path, {**body, "message": f"{FEW} deltas"})
                many = await _cpu(server, path, {**body, "message": f"{MANY} deltas"})
                samples.add("delta", name, "CPU µs", (many - few) / TURNS / (MANY - FEW) * 1e6)


async def _cpu(server: Server, path: str, body: dict[str, Any]) -> float:
    """CPU seconds of so many turns, after one that is not counted."""
    before = 0.0
    for number in range(1 + TURNS):
        if number == 1:
            await quiet()
            before = cpu(server.process, alone=True)
        async with server.http.stream("POST", path, json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_raw():
                pass
    return cpu(server.process, alone=True) - before
