"""Time to the first delta and to the end of a turn: follow-ups, new threads and forks."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

from bench.contenders import AgUi, Connected, Contender, Forker, Query, RawApi, Sidecar, Timing, Turn
from bench.names import SIZES
from bench.samples import Samples
from bench.seeds import Seeds
from bench.servers import application, quiet, sidecar, stand_in

Open = Callable[[int], contextlib.AbstractAsyncContextManager[Turn]]


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """Take turns with each contender in each round, one after another, never two at once."""
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(stand_in(home / "model.log"))
        seeds = Seeds(home / "seeds" / "claude", home / "seeds" / "workspace", model.url)
        for messages in SIZES[1:]:
            await seeds.make(messages - 2)

        async def a_sidecar(name: str, *, warm: int = 0, spares: int = 0) -> Sidecar:
            server = await stack.enter_async_context(sidecar(home / name, model.url, warm=warm, spares=spares))
            return Sidecar(f"sidecar, {name}", server, home / name, seeds)

        cold, spare, warm = await a_sidecar("cold"), await a_sidecar("spare", spares=1), await a_sidecar("warm", warm=4)
        env = {"BENCH_HOME": str(home / "peer"), "BENCH_MODEL": model.url}
        peer = await stack.enter_async_context(application(home / "peer.log", "bench.peer:app", env))
        raw = RawApi(model)
        connected, query = Connected(home / "sdk", model.url, seeds), Query(home / "sdk", model.url, seeds)
        follow_up: list[Contender] = [raw, connected, AgUi(peer, home / "peer", seeds), query, cold, warm]
        new: list[Contender] = [raw, connected, AgUi(peer, home / "peer", seeds), query, cold, spare]
        fork: list[Forker] = [query, cold]
        await _take(spare.follow_up, 0)  # the agent is in use from here on, and so has a spare
        order = random.Random(rounds)
        for _ in range(rounds):
            for messages in SIZES:
                for one in order.sample(follow_up, len(follow_up)):
                    await sample(samples, f"follow-up at {messages}", one.name, one.follow_up, messages)
                for one in order.sample(fork, len(fork)):
                    await sample(samples, f"fork at {messages}", one.name, one.fork, messages)
            for one in order.sample(new, len(new)):
                await sample(samples, "new", one.name, one.follow_up, 0)


async def sample(samples: Samples, part: str, who: str, opened: Open, messages: int) -> None:
    """Take one turn while nobody else does anything, and note what it took."""
    timing = await _take(opened, messages)
    samples.add(part, who, "first delta, ms", timing.first_delta)
    samples.add(part, who, "end, ms", timing.end)


async def _take(opened: Open, messages: int) -> Timing:
    async with opened(messages) as turn:
        await quiet()
        return await turn()
