"""After a restart everybody is back at once: cold threads that all want a process in the same moment."""

import asyncio
import itertools
import statistics
import time
import uuid
from pathlib import Path

import httpx2

from bench.contenders import MESSAGE, Clock
from bench.samples import Samples
from bench.seeds import Seeds
from bench.servers import Server, quiet, sidecar, stand_in

PEOPLE, MESSAGES, WARM = 200, 100, 32
HEALTH_SECONDS = 0.05  # between two looks
WHO = f"{PEOPLE} cold threads at once"


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """In each round a sidecar is stopped and started again, and then all of its threads are spoken to."""
    async with stand_in(home / "model.log") as model:
        seeds = Seeds(home / "seeds" / "claude", home / "seeds" / "workspace", model.url)
        await seeds.make(MESSAGES)
        env = {"SIDECAR_MAX_TURNS": str(PEOPLE)}
        for number in range(rounds):
            at = home / str(number)
            keys = [{"thread_id": str(uuid.uuid4()), "resource_id": str(person)} for person in range(PEOPLE)]
            async with sidecar(at, model.url) as before:
                for key in keys:
                    session_id = seeds.copy(MESSAGES, at / "claude", at / "workspace")
                    adopted = await before.http.put("/v1/session", json={**key, "sdk_session_id": session_id})
                    adopted.raise_for_status()
            async with sidecar(at, model.url, warm=WARM, spares=1, env=env) as server:
                await quiet()
                await stampede(server, keys, samples)


async def stampede(server: Server, keys: list[dict[str, str]], samples: Samples) -> None:
    """Have all of them speak at once, and look at `/healthz` meanwhile."""
    waits = [0.0] * len(keys)

    async def speak(http: httpx2.AsyncClient, number: int) -> None:
        clock, first = Clock(), 0.0
        async with http.stream("POST", "/v1/chat", json={**keys[number], "message": MESSAGE}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not first and "content_block_delta" in line:
                    clock.delta()
                    first = waits[number] = clock.end().first_delta

    healthy: list[float] = []

    async def look() -> None:
        while True:
            began = time.perf_counter()
            (await server.http.get("/healthz")).raise_for_status()
            healthy.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(HEALTH_SECONDS)

    looking = asyncio.create_task(look())
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        await asyncio.gather(*(speak(http, number) for number in range(len(keys))))
    looking.cancel()
    await asyncio.wait([looking])
    note(samples, "first delta", waits)
    note(samples, "/healthz meanwhile", healthy)
    samples.add("stampede", WHO, "pairs that were answered in another order than they asked in, %", disorder(waits))


def note(samples: Samples, what: str, milliseconds: list[float]) -> None:
    """Note how long was waited for something."""
    percentiles = statistics.quantiles(milliseconds, n=20, method="inclusive")
    for name, value in (("p50", percentiles[9]), ("p95", percentiles[18]), ("longest", max(milliseconds))):
        samples.add("stampede", WHO, f"{what} {name}, ms", value)


def disorder(waits: list[float]) -> float:
    """Of all pairs, those in which the one who had asked later was answered first, in per cent."""
    pairs = list(itertools.combinations(waits, 2))
    return 100 * sum(later < earlier for earlier, later in pairs) / len(pairs)
