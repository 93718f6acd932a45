"""How long a sidecar with a large session map takes until it has answered, its imports included."""

import time
from pathlib import Path

from bench.mappings import fill
from bench.names import STARTED
from bench.samples import Samples
from bench.servers import quiet, sidecar


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """Start one on an empty map and one on each of the others in turn."""
    homes = {rows: home / str(rows) for rows in STARTED}
    for rows, where in homes.items():
        fill(where, rows)
    for _ in range(rounds):
        for rows, where in homes.items():
            await quiet()
            began = time.perf_counter()
            async with sidecar(where, "http://127.0.0.1:9") as server:
                page = await server.http.get("/v1/sessions", params={"resource_id": "bench", "limit": "1"})
                samples.add("start", f"{rows:,} rows", "s", time.perf_counter() - began)
                page.raise_for_status()
