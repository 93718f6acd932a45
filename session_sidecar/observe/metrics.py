"""What happens here, counted: the figures of `GET /metrics`, in a registry of the application's own.

What ends is counted where it is logged; what there is at the moment is asked for when somebody looks. Nothing is done
for a delta. No label has a thread, a resource or a session: these are as many as people talk, and are theirs.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from session_sidecar.errors import QueueFull, ThreadBusy, TooManyTurns, TranscriptMissing, UnknownAgent

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
# An operator's function may know any number of agents, and a request names one.
MOST_NAMES = 100
OTHER = "other"

_P = "session_sidecar_"
_SOON = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LONG = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_STORE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # a second series beside each counter, which says when it was first seen


class Usage(NamedTuple):
    """What a turn used of one model, its subagents included: tokens, and US dollars by the CLI's list of prices."""

    input: int
    output: int
    cache_read: int
    cache_creation: int
    cost: float


class Load(NamedTuple):
    """What there is at the moment."""

    running: int  # turns
    queued: int  # turns
    warm: int  # processes, idle
    spare: int  # processes
    background: int  # processes at work with no turn that runs
    replay_bytes: int


class Metrics:
    """All figures of one application."""

    def __init__(self) -> None:
        """Everything is zero."""
        self._registry = registry = CollectorRegistry()
        self._agents, self._models = Names(MOST_NAMES), Names(MOST_NAMES)
        ProcessCollector(registry=registry)
        self._turns = Counter(
            f"{_P}turns",
            "Turns that ended: completed, interrupted or failed; what became of the session (started, resumed, forked, "
            "restarted, reset; none: not known yet); how the process came (warm, spare, cold; none: not taken yet).",
            ("agent", "status", "outcome", "process"),
            registry=registry,
        )
        self._errors = Counter(
            f"{_P}turn_errors",
            "Turns that ended with a problem, by its code, whether or not anybody was told.",
            ("code",),
            registry=registry,
        )
        self._init = Histogram(
            f"{_P}turn_init_seconds",
            "From a turn's request to its session event, the wait for its thread included.",
            ("process",),
            buckets=_SOON,
            registry=registry,
        )
        self._first_delta = Histogram(
            f"{_P}turn_first_delta_seconds",
            "From a turn's request to the first delta of its answer, the wait for its thread included.",
            ("process",),
            buckets=_SOON,
            registry=registry,
        )
        self._duration = Histogram(
            f"{_P}turn_seconds",
            "From a turn's request to its end, the wait for its thread included.",
            ("process",),
            buckets=_LONG,
            registry=registry,
        )
        self._tokens = Counter(
            f"{_P}tokens",
            "Tokens of turns that came to a result, subagents' included: input (neither read from a cache nor written "
            "to one), cache_read, cache_creation, output.",
            ("agent", "model", "kind"),
            registry=registry,
        )
        self._cost = Counter(
            f"{_P}cost_usd",
            "US dollars of turns that came to a result, as the CLI reckons them by its list of prices.",
            ("agent", "model"),
            registry=registry,
        )
        self._missing = Counter(
            f"{_P}missing_transcripts",
            "Turns of a known thread whose transcript was gone, by what they asked for then: restart or fail.",
            ("if_missing",),
            registry=registry,
        )
        self._starts = Counter(
            f"{_P}process_starts",
            "Starts of a CLI: for a turn, or ahead of one; started, or failed, which those stopped meanwhile are too.",
            ("purpose", "result"),
            registry=registry,
        )
        self._problems = Counter(
            f"{_P}problems",
            "Requests that were answered with a problem, by its code; busy: thread_busy, queue_full, too_many_turns.",
            ("code",),
            registry=registry,
        )
        self._store = Histogram(
            f"{_P}store_statement_seconds",
            "A statement of the session map, the wait for its connection included.",
            ("operation",),
            buckets=_STORE,
            registry=registry,
        )
        # What an alert waits for is there before it happens: Prometheus sees no increase from nothing to one.
        for refusal in (ThreadBusy, QueueFull, TooManyTurns):
            self._problems.labels(refusal.code)
        for if_missing in ("restart", "fail"):
            self._missing.labels(if_missing)
        for purpose in ("turn", "ahead"):
            for result in ("started", "failed"):
                self._starts.labels(purpose, result)

    def turn_ended(self, summary: Mapping[str, Any], usage: Mapping[str, Usage]) -> None:
        """Count a turn by `Turn.summary()` and what it used, by model."""
        code, outcome = summary["code"], summary["outcome"] or "none"
        agent = self._agents.bounded(summary["agent"], known=code != UnknownAgent.code)
        process = summary["process"] or "none"
        self._turns.labels(agent, summary["status"], outcome, process).inc()
        if code is not None:
            self._errors.labels(code).inc()
        if outcome == "restarted":
            self._missing.labels("restart").inc()
        elif code == TranscriptMissing.code:
            self._missing.labels("fail").inc()
        for stage, histogram in (("init", self._init), ("first_delta", self._first_delta), ("end", self._duration)):
            if (ms := summary["ms"].get(stage)) is not None:
                histogram.labels(process).observe(ms / 1000)
        for name, used in usage.items():
            model = self._models.bounded(name)
            for kind in ("input", "output", "cache_read", "cache_creation"):
                self._tokens.labels(agent, model, kind).inc(getattr(used, kind))
            self._cost.labels(agent, model).inc(used.cost)

    def problem(self, code: str) -> None:
        """Count a request that is answered with this problem."""
        self._problems.labels(code).inc()

    def process_started(self, purpose: str, connected: bool) -> None:
        """Count the start of a CLI, for a `turn` or `ahead` of one."""
        self._starts.labels(purpose, "started" if connected else "failed").inc()

    def statement(self, operation: str, seconds: float) -> None:
        """Count a statement of the session map."""
        self._store.labels(operation).observe(seconds)

    def watch(self, load: Callable[[], Load]) -> None:
        """Have `load` asked whenever somebody looks; once."""
        self._registry.register(_Gauges(load))

    def exposition(self) -> bytes:
        """All figures in Prometheus' text format, of type CONTENT_TYPE."""
        return prometheus_client.generate_latest(self._registry)


class _Gauges(Collector):
    """What there is at the moment, for the registry."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def describe(self) -> Iterable[Metric]:
        return []  # or the registry would look at once

    def collect(self) -> Iterable[Metric]:
        now = self._load()
        yield GaugeMetricFamily(f"{_P}turns_running", "Turns that have their thread.", now.running)
        yield GaugeMetricFamily(f"{_P}turns_queued", "Turns that wait for their thread.", now.queued)
        processes = GaugeMetricFamily(
            f"{_P}processes",
            "CLI processes that no turn has: warm (idle between two turns), spare (for new threads), background (at "
            "work after a turn).",
            labels=("state",),
        )
        for state in ("warm", "spare", "background"):
            processes.add_metric((state,), getattr(now, state))
        yield processes
        yield GaugeMetricFamily(
            f"{_P}replay_bytes", "Memory that is held for turns that can be read again.", now.replay_bytes
        )


class Names:
    """Names that come from elsewhere, as labels: the first so many that were seen, `other` for the rest."""

    def __init__(self, most: int) -> None:
        """`most` is how many are told apart."""
        self._most = most
        self._seen: set[str] = set()

    def bounded(self, name: str, *, known: bool = True) -> str:
        """The label for a name; one that is not `known` to be anything gets no label of its own."""
        name = name.encode(errors="replace").decode()  # half an emoji cannot be told
        if known and len(self._seen) < self._most:
            self._seen.add(name)
        return name if name in self._seen else OTHER
