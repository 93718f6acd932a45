"""Real people at a real sidecar, and the same people in the simulation of `bench.sizing`: whether the two agree.

Pauses are a quarter as long here, an unused process is closed after a quarter of the time, and answers come at once:
the simulation is told the same. What a start costs is as it is, so this machine is four times as busy as theirs: with
fifty people two slow cores are not enough for their cold starts, and all that is measured is a queue.
"""

import asyncio
import contextlib
import re
import time
from pathlib import Path

from bench.contenders import MESSAGE, streamed
from bench.names import LIVE
from bench.samples import Samples
from bench.servers import Server, clis, sidecar, stand_in
from bench.sizing import IDLE_SECONDS, Costs, Message, Outcome, People, in_virtual_time, note

PEOPLE = People(16, turns=150, speed=4, at_once=True)
_WARM = re.compile(r'^session_sidecar_turns_total\{.*process="warm".*\} (\S+)$', re.MULTILINE)


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """Each number of processes of LIVE, once."""
    costs = Costs.kept()
    async with stand_in(home / "model.log") as model:
        for kept in LIVE:
            env = {"SIDECAR_WARM_IDLE_SECONDS": str(IDLE_SECONDS / PEOPLE.speed)}
            async with sidecar(home / f"{kept} kept", model.url, warm=kept, env=env) as server:
                real = await talk(server)
            for who, outcome in (("real", real), ("simulated", await in_virtual_time(PEOPLE, kept, costs))):
                note(samples, f"{PEOPLE.number} people, four times as fast", f"{kept} kept, {who}", outcome, costs)


async def talk(server: Server) -> Outcome:
    """Have all of them talk; turns are counted from when the pool is full."""
    start, first, most = time.monotonic(), list[float](), 0

    async def person(number: int, said: list[Message]) -> None:
        for message in said:
            await asyncio.sleep(start + message.at - time.monotonic())
            body = {"thread_id": str(message.thread), "resource_id": str(number), "message": MESSAGE}
            counted = time.monotonic() - start >= PEOPLE.begin
            timing = await streamed(server, "/v1/chat", body, delta="content_block_delta", end="event: end")
            if counted:
                first.append(timing.first_delta)

    async def count() -> None:
        nonlocal most
        while True:
            most = max(most, len(clis(server.process)))  # those that a turn has are there too
            await asyncio.sleep(1)

    async def warm_turns() -> int:
        return int(sum(map(float, _WARM.findall((await server.http.get("/metrics")).text))))

    counting = asyncio.create_task(count())
    talking = asyncio.gather(*(person(number, said) for number, said in PEOPLE.plans().items()))
    await asyncio.sleep(PEOPLE.begin)
    before = await warm_turns()
    await talking
    warm = await warm_turns() - before
    counting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await counting
    return Outcome([number < warm for number in range(len(first))], first, most)
