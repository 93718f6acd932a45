"""Replicas on one PostgreSQL beside one sidecar on SQLite: what a turn, a resume elsewhere and the seals cost.

The database is on this machine and writes through to the disk; its own work is on nobody's account here.
"""

import contextlib
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.against import turn
from bench.contenders import Sidecar
from bench.latency import sample
from bench.names import FLEET, HERE, LOCAL, ON_POSTGRES, ON_SQLITE, ONE, RESUMED, SCATTERED, THERE
from bench.samples import Samples
from bench.seeds import Seeds
from bench.servers import quiet, replica, sidecar, stand_in
from bench.throughput import TURNS_WARM, load
from session_sidecar.agent.transcripts.files import MARKER
from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.replicas.archive.outlines import Outlines
from session_sidecar.replicas.archive.postgres import PostgresChunks
from session_sidecar.replicas.archive.sealing import KEY_BYTES, Keyring
from session_sidecar.replicas.archive.sync import Archive
from session_store import SessionMap, ThreadKey
from session_store.postgres import PostgresSessionMap
from session_store.sqlite import SqliteSessionMap
from tests.postgres import new_database, running_postgres

AT_ONCE = 16
CALLS = 200  # of each statement, in each round
WARM_TURNS = 8  # in each round
TURNS_SCATTERED = 2
PULLS = 10


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """All of it on one server, each fleet with a database of its own."""
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(running_postgres("fsync=on", "full_page_writes=on")).url
        model = await stack.enter_async_context(stand_in(home / "model.log"))
        seeds = Seeds(home / "seeds" / "claude", home / "seeds" / "workspace", model.url)
        for messages in RESUMED:
            await seeds.make(messages - 2)
        bench = _Bench(home, model.url, seeds, samples, rounds)
        for part in (bench.maps, bench.warm, bench.resume, bench.at_once, bench.pulls):
            with new_database(server) as one, new_database(server) as other:
                await part(one, other)


@dataclass
class _Bench:
    """Parts that begin with two empty databases each."""

    home: Path
    model: str
    seeds: Seeds
    samples: Samples
    rounds: int

    async def maps(self, *databases: str) -> None:
        """The statements of a turn, one after the other, in the process."""
        sqlite = await SqliteSessionMap.open(self.home / "map.db")
        postgres = await PostgresSessionMap.open(databases[0])
        maps: list[tuple[str, SessionMap]] = [(ON_SQLITE, sqlite), (ON_POSTGRES, postgres)]
        try:
            for number in range(self.rounds):
                keys = [ThreadKey(f"thread-{number}-{n}", "bench") for n in range(CALLS)]
                for who, one in maps:
                    await self._each(keys, who, "add", lambda key, one=one: one.add(key, key.thread_id))  # type: ignore[misc]
                    await self._each(keys, who, "get", one.get)
                    await self._each(keys, who, "touch", lambda key, one=one: one.touch(key, key.thread_id))  # type: ignore[misc]
                await self._each(keys, ON_POSTGRES, "release", postgres.release)
                await self._each(keys, ON_POSTGRES, "acquire", postgres.acquire)
                for key in keys:
                    await postgres.release(key)
        finally:
            await sqlite.close()
            await postgres.close()

    async def _each(
        self, keys: Sequence[ThreadKey], who: str, what: str, call: Callable[[ThreadKey], Awaitable[object]]
    ) -> None:
        start = time.perf_counter()
        for key in keys:
            await call(key)
        self.samples.add("session map", who, f"{what}, µs", (time.perf_counter() - start) / len(keys) * 1e6)

    async def warm(self, *databases: str) -> None:
        """Turns of a thread whose process is kept, and whose lease is not: each is had anew."""
        async with contextlib.AsyncExitStack() as stack:
            both = [
                (ON_SQLITE, await stack.enter_async_context(sidecar(self.home / "sqlite", self.model, warm=1))),
                (
                    ON_POSTGRES,
                    await stack.enter_async_context(replica(self.home / "replica", self.model, databases[0], warm=1)),
                ),
            ]
            for number in range(-2, self.rounds * WARM_TURNS):  # the first rounds are not counted
                for who, server in random.sample(both, len(both)):
                    await quiet()
                    for what, value in (await turn(server, "kept")).items():
                        if number >= 0:
                            self.samples.add("warm turn", who, what, value)

    async def resume(self, *databases: str) -> None:
        """The next turn of a conversation, in a new process: where its files are, and where they have to be brought."""
        async with contextlib.AsyncExitStack() as stack:
            alone = await stack.enter_async_context(sidecar(self.home / "alone", self.model))
            here = await stack.enter_async_context(replica(self.home / "here", self.model, databases[0]))
            there = await stack.enter_async_context(replica(self.home / "there", self.model, databases[0]))
            ways = [
                Sidecar(LOCAL, alone, self.home / "alone", self.seeds),
                Sidecar(HERE, here, self.home / "here", self.seeds),
                Sidecar(THERE, here, self.home / "here", self.seeds, then=[there]),
            ]
            for _ in range(self.rounds):
                for messages in RESUMED:
                    for way in random.sample(ways, len(ways)):
                        await sample(self.samples, f"resume at {messages}", way.name, way.follow_up, messages)

    async def at_once(self, *databases: str) -> None:
        """Conversations on one replica and on three: on the same one each time, and on whichever comes next."""
        async with contextlib.AsyncExitStack() as stack:

            async def started(name: str, database: str, warm: int) -> Sidecar:
                server = await stack.enter_async_context(replica(self.home / name, self.model, database, warm=warm))
                return Sidecar(name, server, self.home / name, self.seeds)

            one = await started("one", databases[0], AT_ONCE)
            three = [await started(name, databases[1], AT_ONCE // 3 + 1) for name in ("first", "second", "third")]
            servers = [member.server for member in three]
            scattered = [
                Sidecar(SCATTERED, member.server, member.home, self.seeds, then=servers[first:] + servers[:first])
                for first, member in enumerate(three)
            ]
            for _ in range(self.rounds):
                for name, members, turns in (
                    (ONE, [one], TURNS_WARM),
                    (FLEET, three, TURNS_WARM),
                    (SCATTERED, scattered, TURNS_SCATTERED),
                ):
                    async with contextlib.AsyncExitStack() as open_now:
                        opening = itertools.islice(itertools.cycle(members), AT_ONCE)
                        talking = [await open_now.enter_async_context(member.follow_up(2)) for member in opening]
                        await load(self.samples, name, [member.server.process for member in members], talking, turns)

    async def pulls(self, plain: str, sealed: str) -> None:
        """A transcript that is stored is brought to a directory where nothing is."""
        rings = {"plain": Keyring(), "sealed": Keyring({"k": os.urandom(KEY_BYTES)})}
        maps = {"plain": await PostgresSessionMap.open(plain), "sealed": await PostgresSessionMap.open(sealed)}
        readers = Readers()

        def archive(name: str, config: Path) -> Archive:
            config.mkdir(parents=True)
            (config / MARKER).touch()
            chunks = PostgresChunks(maps[name].database, maps[name].replica_id)
            return Archive(config, chunks, rings[name], Outlines(chunks, rings[name], History(config, readers)))

        try:
            for messages in RESUMED:
                key, sessions = ThreadKey(f"{messages}", "bench"), {}
                for name, leases in maps.items():
                    config = self.home / name / f"{messages}"
                    there = archive(name, config)
                    sessions[name] = self.seeds.copy(messages - 2, config, self.home / "workspace")
                    await leases.add(key, sessions[name])
                    await there.push(sessions[name], key, leases.fence(key))
                for number in range(-1, self.rounds * PULLS):  # the first round is not counted
                    for name in random.sample(list(maps), len(maps)):
                        here = archive(name, self.home / name / f"{messages}-{number}")
                        start = time.perf_counter()
                        await here.pull(sessions[name], key.resource_id, ours=False)
                        if number >= 0:
                            self.samples.add(f"pull of {messages}", name, "ms", (time.perf_counter() - start) * 1e3)
        finally:
            await readers.close()
            for leases in maps.values():
                await leases.close()
