"""The README's table of what is measured: each figure of the run that is kept, and the command that measures it."""

import statistics
from collections.abc import Iterable, Iterator

from bench.bar import over_a_client
from bench.names import AGAIN, CONNECTED, FIRST, MADE, OURS, ROWS, SIZES, STARTED
from bench.samples import Samples


def rows(samples: Samples) -> Iterator[tuple[str, str, str]]:
    """What, how much, and the part of the bench. Raises KeyError where something was not measured."""

    def of(part: str, who: str, what: str) -> float:
        return samples.median(part, who, what)

    over = _told(over_a_client(samples, messages) for messages in SIZES)
    yield "warm follow-up at 2 / 100 / 1,000 messages, first delta, over a connected client", f"{over} ms", "latency"
    rate = "turns a second"
    share = of("16 at once", "sidecar, warm", rate) / of("16 at once", CONNECTED, rate)
    yield "16 warm threads at once, turns a second, of 16 connected clients'", f"{share:.2g}×", "throughput"
    ours, theirs = of("short turn", OURS, "CPU ms"), of("short turn", CONNECTED, "CPU ms")
    yield "CPU of a short warm turn / of a connected client's own part in it", f"{_told([ours, theirs])} ms", "deltas"
    share = of("delta", OURS, "CPU µs") / of("delta", MADE, "CPU µs")
    yield "CPU of a delta, of `asdict` and `json.dumps`", f"{share:.2g}×", "deltas"
    many = of("mapping", f"GET /v1/session, {ROWS[-1]:,} rows", "a second")
    share = many / of("mapping", "bare Starlette endpoint", "a second")
    yield "mapping at a million rows, answers a second, of an endpoint that does nothing", f"{share:.2g}×", "mappings"
    first, again = of("list", FIRST, "ms"), of("list", AGAIN, "ms")
    yield "list of 50 with metadata, first time / again", f"{_told([first, again])} ms", "lists"
    empty, *_, full = (of("start", f"{number:,} rows", "s") for number in STARTED)
    yield "start on ten million rows, over one on none", f"{full - empty:.2g} s", "start"
    (ended,) = (name for name in samples.all if name.startswith("held | an ended turn"))
    held = [of("held", who, "MiB") for who in ("an idle sidecar", "a warm thread, in the sidecar")]
    held.append(statistics.median(samples.all[ended]))
    yield "resident: idle sidecar / warm thread in it / ended short turn", f"{_told(held)} MiB", "memory"


def _told(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in values)
