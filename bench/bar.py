"""What the sidecar has set itself, as ratios within one run."""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from bench.names import (
    AGAIN,
    CONNECTED,
    DEPTH,
    HERE,
    MADE,
    ON_POSTGRES,
    ON_SQLITE,
    OURS,
    RESUMED,
    ROWS,
    SENT,
    SIZES,
    STARTED,
    THERE,
    UI,
)
from bench.samples import Samples


class Bar(NamedTuple):
    """One thing that is to hold."""

    what: str
    figure: float
    limit: float
    at_most: bool = True
    unit: str = "×"

    @property
    def met(self) -> bool:
        """Whether it held in this run."""
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    @property
    def told(self) -> tuple[str, str, str, str]:
        """The row of a table: what, the limit, the figure, and whether it was met."""
        limit = f"{'at most' if self.at_most else 'at least'} {self.limit:.3g}{self.unit}"
        return self.what, limit, f"{self.figure:.2g}{self.unit}", "met" if self.met else "not met"


def bars(samples: Samples) -> Iterator[Bar]:
    """The bars whose figures are there."""
    for one in (_latency, _throughput, _turns, _deltas, _dialects, _mappings, _lists, _starts, _replicas):
        try:
            yield from list(one(samples))
        except KeyError:  # that part was not run
            continue


def over_a_client(samples: Samples, messages: int) -> float:
    """How much later than a connected client's the first delta of a warm follow-up comes, round by round, in ms."""
    part, first = f"follow-up at {messages}", "first delta, ms"
    warm, floor = samples.of(part, "sidecar, warm", first), samples.of(part, CONNECTED, first)
    return statistics.median(mine - theirs for mine, theirs in zip(warm, floor, strict=True))


def _latency(samples: Samples) -> Iterator[Bar]:
    first = "first delta, ms"
    for messages in SIZES:
        part = f"follow-up at {messages}"
        over = over_a_client(samples, messages)
        yield Bar(f"warm follow-up at {messages} messages, over a connected client", over, 1.5, unit=" ms")
        warm = samples.of(part, "sidecar, warm", first)
        ratio = statistics.median(warm) / samples.median(part, "query(resume=…)", first)
        yield Bar(f"warm follow-up at {messages} messages, of query(resume=…)", ratio, 1 / 10)
    spare, cold = (samples.median("new", f"sidecar, {name}", first) for name in ("spare", "cold"))
    yield Bar("new thread from a spare, of a cold one", spare / cold, 1 / 4)


def _throughput(samples: Samples) -> Iterator[Bar]:
    rate = "turns a second"
    at_once = "16 at once"
    warm, cold = (samples.median(at_once, f"sidecar, {name}", rate) for name in ("warm", "cold"))
    clients = samples.median(at_once, CONNECTED, rate)
    yield Bar("warm throughput at 16 at once, of sixteen connected clients", warm / clients, 0.95, at_most=False)
    yield Bar("warm throughput at 16 at once, of cold", warm / cold, 12, at_most=False)
    two = samples.median("2 at once", "sidecar, cold", rate)
    yield Bar("cold throughput at 16 at once, of that at 2", cold / two, 0.9, at_most=False)


def _turns(samples: Samples) -> Iterator[Bar]:
    yield Bar(
        "CPU of a short warm turn, the sidecar alone", samples.median("short turn", OURS, "CPU ms"), 4, unit=" ms"
    )


def _deltas(samples: Samples) -> Iterator[Bar]:
    ours = samples.median("delta", OURS, "CPU µs")
    for theirs in (MADE, SENT):
        yield Bar(f"CPU a delta, of {theirs}", ours / samples.median("delta", theirs, "CPU µs"), 0.35)


def _dialects(samples: Samples) -> Iterator[Bar]:
    native, ui = (samples.median("delta", name, "CPU µs") for name in (OURS, UI))
    yield Bar("CPU a delta in the AI SDK's dialect, of the sidecar's own", ui / native, 1.5)


def _mappings(samples: Samples) -> Iterator[Bar]:
    few, many = ROWS
    bare, at_few, at_many = (
        samples.median("mapping", name, "a second")
        for name in ("bare Starlette endpoint", f"GET /v1/session, {few:,} rows", f"GET /v1/session, {many:,} rows")
    )
    yield Bar(f"GET /v1/session at {many:,} rows, answers a second, of the bare endpoint", at_many / bare, 0.6, False)
    yield Bar(f"GET /v1/session at {many:,} rows, time an answer, of that at {few:,}", at_few / at_many, 1.3)
    page = f"GET /v1/sessions, {many:,} rows"
    top, deep = (samples.median("mapping", name, "a second") for name in (page, f"{page}, from row {DEPTH:,}"))
    yield Bar(f"page from row {DEPTH:,}, time an answer, of that from row 0", top / deep, 1.1)


def _lists(samples: Samples) -> Iterator[Bar]:
    yield Bar(f"list of {AGAIN}", samples.median("list", AGAIN, "ms"), 5, unit=" ms")


def _starts(samples: Samples) -> Iterator[Bar]:
    empty, *_, full = (samples.median("start", f"{rows:,} rows", "s") for rows in STARTED)
    yield Bar(f"start on {STARTED[-1]:,} rows, over one on an empty map", full - empty, 1, unit=" s")


def _replicas(samples: Samples) -> Iterator[Bar]:
    first = "first delta, ms"
    postgres, sqlite = (samples.of("warm turn", name, first) for name in (ON_POSTGRES, ON_SQLITE))
    over = statistics.median(one - other for one, other in zip(postgres, sqlite, strict=True))  # round by round
    yield Bar("warm turn on PostgreSQL, first delta, over SQLite", over, 5, unit=" ms")
    for messages in RESUMED:
        there, here = (samples.median(f"resume at {messages}", name, first) for name in (THERE, HERE))
        yield Bar(f"resume on another replica at {messages} messages, of that on the same one", there / here, 1.15)
    for messages in RESUMED:
        sealed, plain = (samples.median(f"pull of {messages}", name, "ms") for name in ("sealed", "plain"))
        yield Bar(f"pull of {messages} messages, sealed, of a plain one", sealed / plain, 1.3)
