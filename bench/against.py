"""This checkout beside another one, in one run: `.venv/bin/python -m bench.against ../other`.

Both run with the packages that are installed here, and take turns within each round, in a new order each time. For a
change that should cost nothing: what it says is a ratio.
"""

import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from bench.samples import Samples
from bench.servers import Server, credentials, serving, stand_in

HERE = Path(__file__).parent.parent
ROUNDS, GETS, DELTAS = 60, 200, 2000
Measure = Callable[[Server, int], Awaitable[dict[str, float]]]


def checkout(path: Path, home: Path, model: str) -> contextlib.AbstractAsyncContextManager[Server]:
    """The sidecar of a checkout, whatever its packages are called."""
    home.mkdir()
    script = tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, name = script["session-sidecar"].split(":")
    start = f"import os; os.chdir({str(path)!r}); from {module} import {name}; {name}()"
    env = {**credentials(model), "SIDECAR_HOME": str(home), "PYTHONPATH": str(path)}
    return serving(home / "server.log", sys.executable, "-P", "-c", start, "serve", "--port", "0", env=env)


def cpu_ms(server: Server) -> float:
    """Milliseconds of CPU that a server itself has used, to the microsecond; its clock in /proc only ticks."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks) / 1e6


async def turn(server: Server, thread: str, message: str = "Hello") -> dict[str, float]:
    """One turn: ms to its first delta and to its end, and the sidecar's own CPU."""
    before, began, first = cpu_ms(server), time.perf_counter(), 0.0
    body = {"thread_id": thread, "resource_id": "bench", "message": message}
    async with server.http.stream("POST", "/v1/chat", json=body) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            if not first and b"content_block_delta" in chunk:
                first = time.perf_counter() - began
    whole = time.perf_counter() - began
    return {"first delta, ms": first * 1e3, "end, ms": whole * 1e3, "CPU, ms": cpu_ms(server) - before}


async def follow_up(server: Server, _: int) -> dict[str, float]:
    """A turn of a thread whose process is kept."""
    return {f"warm follow-up, {what}": value for what, value in (await turn(server, "kept")).items()}


async def new_thread(server: Server, number: int) -> dict[str, float]:
    """The first turn of a thread, from a spare, once there is one again."""
    await asyncio.sleep(1)
    return {"new thread from a spare, first delta, ms": (await turn(server, f"new {number}"))["first delta, ms"]}


async def deltas(server: Server, _: int) -> dict[str, float]:
    """What a delta costs."""
    many = (await turn(server, "deltas", f"{DELTAS} deltas"))["CPU, ms"]
    few = (await turn(server, "deltas", "10 deltas"))["CPU, ms"]
    return {"a delta, CPU µs": (many - few) / (DELTAS - 10) * 1e3}


async def gets(server: Server, _: int) -> dict[str, float]:
    """Reads, one after the other."""
    thread = "thread_id=kept&resource_id=bench"
    paths = {
        "GET of a mapping": f"/v1/session?{thread}&metadata=false",
        "list with metadata": "/v1/sessions?resource_id=bench&include=metadata",
        "messages": f"/v1/session/messages?{thread}",
    }
    found = {}
    for name, path in paths.items():
        before, began = cpu_ms(server), time.perf_counter()
        for _ in range(GETS):
            (await server.http.get(path)).raise_for_status()
        found[f"{name}, µs"] = (time.perf_counter() - began) / GETS * 1e6
        found[f"{name}, CPU µs"] = (cpu_ms(server) - before) / GETS * 1e3
    return found


MEASURES: dict[Measure, int] = {follow_up: ROUNDS, new_thread: ROUNDS // 5, deltas: ROUNDS // 5, gets: ROUNDS // 5}


async def main(other: Path) -> None:
    """Measure both and print each median with the ratio of this checkout to the other."""
    samples = Samples()
    async with contextlib.AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        model = (await stack.enter_async_context(stand_in(home / "model.log"))).url
        both = [
            ("here", await stack.enter_async_context(checkout(HERE, home / "here", model))),
            ("there", await stack.enter_async_context(checkout(other.resolve(), home / "there", model))),
        ]
        for measure, rounds in MEASURES.items():
            for number in range(-1, rounds):  # the first round is not counted
                random.shuffle(both)
                for who, server in both:
                    for what, value in (await measure(server, number)).items():
                        if number >= 0:
                            samples.add("against", who, what, value)
    for what in dict.fromkeys(name.split(" | ")[2] for name in samples.all):
        here, there = (samples.of("against", who, what) for who in ("here", "there"))
        ratio = statistics.median(here) / statistics.median(there)
        told = f"{samples.told('against', 'here', what):28} {samples.told('against', 'there', what):28}"
        print(f"{what:42} {told} {ratio:.3f}")


if __name__ == "__main__":
    print(f"{'':42} {'here':28} {'there':28} here / there; load before {os.getloadavg()[0]:.2f}")
    uvloop.run(main(Path(sys.argv[1])))
