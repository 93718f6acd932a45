"""Turns a second, CPU a turn and memory a session, with several threads talking at once."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.contenders import Connected, Contender, Query, Sidecar, Turn
from bench.names import AT_ONCE
from bench.samples import Samples
from bench.seeds import Seeds
from bench.servers import clis, cpu, quiet, sidecar, stand_in

TURNS_WARM, TURNS_COLD = 20, 3


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """In each round, each number of conversations at once, with each contender; after one turn of each."""
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(stand_in(home / "model.log"))
        cold = await stack.enter_async_context(sidecar(home / "cold", model.url))
        warm = await stack.enter_async_context(sidecar(home / "warm", model.url, warm=max(AT_ONCE)))
        seeds = Seeds(home / "seeds" / "claude", home / "seeds" / "workspace", model.url)
        mine = psutil.Process()
        loads: list[tuple[Contender, psutil.Process, int]] = [
            (Query(home / "sdk", model.url, seeds), mine, TURNS_COLD),
            (Sidecar("sidecar, cold", cold, home / "cold", seeds), cold.process, TURNS_COLD),
            (Connected(home / "sdk", model.url, seeds), mine, TURNS_WARM),
            (Sidecar("sidecar, warm", warm, home / "warm", seeds), warm.process, TURNS_WARM),
        ]
        for _ in range(rounds):
            for at_once in AT_ONCE:
                for contender, process, turns in loads:
                    async with contextlib.AsyncExitStack() as open_now:
                        opening = (open_now.enter_async_context(contender.follow_up(2)) for _ in range(at_once))
                        talking = [await one for one in opening]
                        await load(samples, contender.name, [process], talking, turns)
                        if process is warm.process and at_once == max(AT_ONCE):
                            own = statistics.median(cli.memory_full_info().uss for cli in clis(warm.process))
                            samples.add("memory", "a warm session's CLI", "MiB of its own", own / 2**20)
                            rss = process.memory_info().rss
                            samples.add("memory", f"the sidecar, {at_once} sessions warm", "MiB resident", rss / 2**20)


async def load(
    samples: Samples, name: str, processes: Sequence[psutil.Process], talking: Sequence[Turn], turns: int
) -> None:
    """Have all of them talk at once, so many turns each; what that took, with the CPU of these processes."""

    async def talk(turn: Turn) -> None:
        for _ in range(turns):
            await turn()

    await quiet()
    before, start = sum(map(cpu, processes)), time.perf_counter()
    await asyncio.gather(*(talk(turn) for turn in talking))
    while turns == TURNS_COLD and any(map(clis, processes)):  # the last processes' way out is part of their turns, too
        await asyncio.sleep(0.005)
    seconds = time.perf_counter() - start
    part, taken = f"{len(talking)} at once", turns * len(talking)
    samples.add(part, name, "turns a second", taken / seconds)
    samples.add(part, name, "CPU ms a turn", (sum(map(cpu, processes)) - before) * 1000 / taken)
