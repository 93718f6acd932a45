"""What is held in memory: by a sidecar that does nothing, for a thread that is kept warm, for a turn that has ended."""

import statistics
from pathlib import Path

from bench.contenders import MESSAGE, streamed
from bench.samples import Samples
from bench.servers import Server, clis, sidecar, stand_in
from session_sidecar.agent.processes.descendants import own_bytes

THREADS, TURNS = 32, 500
MIB = 2**20


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """Each of a sidecar of its own. The first turn of each is not counted: what it loads stays."""
    async with stand_in(home / "model.log") as model:
        env = {"SIDECAR_REPLAY_SECONDS": "0"}
        async with sidecar(home / "warm", model.url, warm=THREADS + 1, env=env) as server:
            samples.add("held", "an idle sidecar", "MiB", server.process.memory_info().rss / MIB)
            before = after = await after_turn(server, "first")
            for number in range(THREADS):
                after = await after_turn(server, f"thread {number}")
            samples.add("held", "a warm thread, in the sidecar", "MiB", (after - before) / THREADS / MIB)
            own = [own_bytes(cli.pid) for cli in clis(server.process)]
            samples.add("held", "a warm thread, its CLI", "MiB", statistics.median(own) / MIB)
        env = {"SIDECAR_REPLAY_SECONDS": "3600"}
        async with sidecar(home / "ended", model.url, warm=1, env=env) as server:
            before = after = await after_turn(server, "first")
            for _ in range(TURNS):
                after = await after_turn(server, "first")
            samples.add("held", f"an ended turn, of {TURNS}", "MiB", (after - before) / TURNS / MIB)


async def after_turn(server: Server, thread: str) -> int:
    """Take a turn; the bytes that the sidecar has resident then."""
    body = {"thread_id": thread, "resource_id": "bench", "message": MESSAGE}
    await streamed(server, "/v1/chat", body, delta="content_block_delta", end="event: end")
    return int(server.process.memory_info().rss)
