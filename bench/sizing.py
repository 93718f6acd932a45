"""How many processes does one need? People who talk, think and come back, with so many processes kept for them.

The pool and the starts are the sidecar's own, in a loop whose clock jumps from one event to the next; the processes
only take the time and the memory that `results.json` has of real ones. `bench.live` has real people talk to a real
sidecar, as many as a machine can bear, to see whether the two agree.
"""

import asyncio
import itertools
import json
import math
import random
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from claude_agent_sdk import ClaudeAgentOptions

from bench.names import KEPT, LOADS, ORDERS, PEOPLE
from bench.samples import Samples
from bench.virtual import VirtualLoop
from session_sidecar.agent.processes.pool import Fingerprint, ProcessPool
from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.processes.starts import Starts
from session_sidecar.agent.transcripts import Revision
from session_store import ThreadKey

THINK_MEDIAN, THINK_SIGMA = 45.0, 1.0  # seconds from an answer to the next message: log-normal
ANSWER_MEDIAN, ANSWER_SIGMA = 8.0, 0.7  # seconds of an answer: log-normal
THREADS, ZIPF = (
    10,
    2.0,
)  # of each person; the k-th is spoken to in proportion to k ** -ZIPF
LEAVES = 0.1  # of those who leave their threads: how often the next message begins a new one
IDLE_SECONDS = 300.0  # the default of SIDECAR_WARM_IDLE_SECONDS
SHARES = (0.32, 0.64, 1.28)  # processes that are kept for a person, where orders are compared
PEOPLE_A_CORE = 100  # so many, or fewer, have a core for starts; there are two at least
TURNS = 2_500  # that are counted, after as long as it takes to have the pool full
OPTIONS = ClaudeAgentOptions()


class Message(NamedTuple):
    """Somebody says something."""

    at: float  # seconds
    thread: int
    answer: float  # seconds


@dataclass(frozen=True)
class Costs:
    """What was measured of real turns: milliseconds to the first delta, and bytes of a process of its own."""

    warm: list[float]
    cold: list[float]
    own: float

    @classmethod
    def kept(cls, path: Path = Path(__file__).parent / "results.json") -> "Costs":
        """What the last whole run of the bench has kept."""
        samples = Samples()
        samples.all.update(json.loads(path.read_text(encoding="utf-8"))["samples"])
        first, at = "first delta, ms", "follow-up at 100"
        own = samples.median("memory", "a warm session's CLI", "MiB of its own") * 2**20
        return cls(samples.of(at, "sidecar, warm", first), samples.of(at, "sidecar, cold", first), own)


def a_turn() -> float:
    """Seconds from one message of a person to the next, on average."""
    return THINK_MEDIAN * math.exp(THINK_SIGMA**2 / 2) + ANSWER_MEDIAN * math.exp(ANSWER_SIGMA**2 / 2)


def messages(rng: random.Random, seconds: float, load: str) -> Iterator[Message]:
    """What one person says in so many seconds; the first message is somewhere in a first pause. `load` is of LOADS."""
    ranks, weights, thread = range(THREADS), [(rank + 1) ** -ZIPF for rank in range(THREADS)], 0
    at = rng.uniform(0, THINK_MEDIAN * rng.lognormvariate(0, THINK_SIGMA))
    while at < seconds:
        if load == LOADS[0]:
            thread = rng.choices(ranks, weights)[0]
        elif rng.random() < LEAVES:
            thread += 1
        answer = ANSWER_MEDIAN * rng.lognormvariate(0, ANSWER_SIGMA)
        yield Message(at, thread, answer)
        at += answer + THINK_MEDIAN * rng.lognormvariate(0, THINK_SIGMA)


@dataclass(frozen=True)
class People:
    """So many of them, what they will say, and how fast: with `speed` 4, four times.

    With `at_once` answers take no time.
    """

    number: int
    load: str = LOADS[0]
    turns: int = TURNS
    speed: float = 1.0
    at_once: bool = False

    @property
    def begin(self) -> float:
        """The second from which on turns are counted."""
        return 2 * IDLE_SECONDS / self.speed

    def plans(self) -> dict[int, list[Message]]:
        """What each of them says, and when; the same each time."""
        rng, seconds = random.Random(self.number), 2 * IDLE_SECONDS + self.turns * a_turn() / self.number

        def scaled(one: Message) -> Message:
            return Message(one.at / self.speed, one.thread, 0.0 if self.at_once else one.answer / self.speed)

        return {person: list(map(scaled, messages(rng, seconds, self.load))) for person in range(self.number)}


class Process:
    """Takes the time of a real one, and does nothing."""

    at_work = speaks = False
    is_alive = True
    preset = cli_version = None

    def __init__(self, seconds: float) -> None:
        """It takes so many seconds to start."""
        self._seconds = seconds
        self.started = 0.0
        self.ended = asyncio.Event()

    async def start(self, patience: float | None = None) -> None:
        """See AgentProcess."""
        await asyncio.sleep(self._seconds)
        self.started = asyncio.get_running_loop().time()

    async def overhear(self) -> str:
        """Say nothing, for ever."""
        await self.ended.wait()
        return "gone"

    def glance(self) -> None:
        """Nothing is said."""

    async def close(self) -> None:
        """It is gone at once."""
        self.is_alive = False


class Uses:
    """When threads were spoken to, and when they will be: what an order may go by."""

    def __init__(self, plans: Mapping[int, list[Message]]) -> None:
        """All messages, by person."""
        times: dict[ThreadKey, list[float]] = {}
        for person, plan in plans.items():
            for message in plan:
                times.setdefault(thread_key(person, message.thread), []).append(message.at)
        self._coming = {key: iter(of_thread[1:]) for key, of_thread in times.items()}
        self.next: dict[ThreadKey, float] = {}  # nobody can know that but an oracle
        self.lately: dict[ThreadKey, float] = {}
        """How often it was lately: each use counts half after IDLE_SECONDS. As the logarithm of what that would be at
        a time that is the same for all, which does not change while nobody uses them."""

    def spoken(self, key: ThreadKey, now: float) -> None:
        """A message has come."""
        self.next[key] = next(self._coming[key], math.inf)
        now /= IDLE_SECONDS
        self.lately[key] = now + math.log2(1 + 2 ** (self.lately.get(key, -math.inf) - now))


class OrderedPool(ProcessPool):
    """The pool, with an order of its own in which processes make room."""

    def __init__(self, warm: int, idle_seconds: float, order: str, uses: Uses) -> None:
        """One of ORDERS."""
        super().__init__(warm=warm, memory=None, idle_seconds=idle_seconds, work_seconds=idle_seconds)
        self._order = order
        self._uses = uses

    def _make_room(self, closable: Collection[ThreadKey], *, more: int = 0) -> None:
        if self._order == "age":  # the one that was started first
            closable = sorted(closable, key=lambda key: cast("Process", self._warm[key].process).started)
        elif self._order == "use lately":  # the one that was used least
            closable = sorted(closable, key=self._uses.lately.__getitem__)
        elif self._order == "oracle":  # the one that will not be used for longest
            closable = sorted(closable, key=self._uses.next.__getitem__, reverse=True)
        super()._make_room(closable, more=more)


def thread_key(person: int, thread: int) -> ThreadKey:
    """A thread of a person."""
    return ThreadKey(str(thread), str(person))


class Outcome(NamedTuple):
    """What came of it."""

    warm: list[bool]  # turns
    first: list[float]  # milliseconds to the first delta
    most: int  # processes that were kept at once


async def simulate(people: People, kept: int, costs: Costs, order: str = ORDERS[0]) -> Outcome:
    """Have these people talk, with so many processes kept; in a VirtualLoop."""
    rng, loop = random.Random(people.number), asyncio.get_running_loop()
    plans, usual = people.plans(), statistics.median(costs.warm)
    uses = Uses(plans)
    pool = OrderedPool(kept, IDLE_SECONDS / people.speed, order, uses)
    starts = Starts(max(2, people.number // PEOPLE_A_CORE))
    warm, first, most = list[bool](), list[float](), 0

    async def talk(person: int) -> None:
        nonlocal most
        for message in plans[person]:
            await asyncio.sleep(message.at - loop.time())
            key, began = thread_key(person, message.thread), loop.time()
            state = Fingerprint(str(key), 0, Revision(0), "default", OPTIONS)
            uses.spoken(key, began)
            process, answered = pool.take(key, state), rng.choice(costs.warm)
            came = process is not None
            if process is None:
                process = cast("AgentProcess", Process(max(0.0, rng.choice(costs.cold) - usual) / 1000))
                await starts.start(process)
            if began >= people.begin:
                warm.append(came)
                first.append((loop.time() - began) * 1000 + answered)
            await asyncio.sleep(message.answer)
            pool.keep(key, state, process)
            most = max(most, pool.resting)

    await asyncio.gather(*(talk(person) for person in plans))
    await pool.close()
    return Outcome(warm, first, most)


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """Each number of people with each number of processes, in the pool's own order; and some of it in others."""
    costs = Costs.kept()
    for number, kept in itertools.product(PEOPLE, KEPT):
        outcome = await in_virtual_time(People(number), kept, costs)
        note(samples, f"{number:,} people", f"{kept} kept", outcome, costs)
    for load, number, share in itertools.product(LOADS, (50, 200), SHARES):
        for order in ORDERS:
            outcome = await in_virtual_time(People(number, load), round(number * share), costs, order)
            who = f"{number:,} people, {number * share:,.0f} kept"
            samples.add(load, who, f"by {order}: warm, %", 100 * statistics.fmean(outcome.warm))


async def in_virtual_time(*load: Any) -> Outcome:
    """What `simulate` gives; in a thread, as a loop of another kind cannot run in this one."""

    def run() -> Outcome:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(simulate(*load))

    return await asyncio.to_thread(run)


def note(samples: Samples, part: str, who: str, outcome: Outcome, costs: Costs) -> None:
    """Note what came of one."""
    samples.add(part, who, "warm, %", 100 * statistics.fmean(outcome.warm))
    percentiles = statistics.quantiles(outcome.first, n=100)
    for percent in (50, 95, 99):
        samples.add(part, who, f"first delta p{percent}, ms", percentiles[percent - 1])
    samples.add(part, who, "kept at most, GiB", outcome.most * costs.own / 2**30)
