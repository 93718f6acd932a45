"""What the bench says is what was measured: its comparison of two versions, and the people of its simulation."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.compare import changes, kept
from bench.samples import Samples
from bench.sizing import Costs, Outcome, People, simulate
from bench.virtual import VirtualLoop

COSTS = Costs(warm=[30.0], cold=[430.0], own=100 * 2**20)


def samples(values: Sequence[float], what: str = "first delta, ms") -> Samples:
    made = Samples()
    for value in values:
        made.add("new", "sidecar", what, value)
    return made


@pytest.mark.parametrize(
    ("then", "now", "what", "ratio", "verdict"),
    [
        ([10, 11, 12], [20, 22, 24], "first delta, ms", 2.0, "worse"),
        ([20, 22, 24], [10, 11, 12], "first delta, ms", 0.5, "better"),
        ([20, 22, 24], [10, 11, 12], "turns a second", 0.5, "worse"),
        ([20, 22, 24], [22, 23.1, 30], "first delta, ms", 1.05, "within noise"),
        ([10, 20, 30], [5, 20, 90], "first delta, ms", 1.0, "within noise"),
        ([60], [66], "warm, %", 1.1, "better"),
        ([60], [60], "warm, %", 1.0, "within noise"),
        ([0, 0], [0, 0], "first delta, ms", 1.0, "within noise"),
    ],
)
def test_a_figure_has_changed_if_the_quartiles_lie_apart(
    then: list[float], now: list[float], what: str, ratio: float, verdict: str
) -> None:
    (change,) = changes(samples(now, what), samples(then, what))
    assert change.ratio == pytest.approx(ratio)
    assert change.verdict == verdict


def test_what_one_of_two_runs_has_not_measured_is_no_change() -> None:
    assert not list(changes(samples([1.0]), samples([1.0], "end, ms")))


def test_the_last_version_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for version in ("0.9.0", "0.10.0", "0.2.11"):
        (tmp_path / f"{version}.json").touch()
    assert [path.stem for path in kept(tmp_path)] == ["0.2.11", "0.9.0", "0.10.0"]


def simulated(people: People, kept: int, order: str = "last use") -> Outcome:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(simulate(people, kept, COSTS, order))


def test_an_hour_of_people_takes_no_hour_and_comes_out_the_same_each_time() -> None:
    assert simulated(People(20, turns=200), 8) == simulated(People(20, turns=200), 8)


def test_with_more_processes_more_turns_are_warm_and_an_oracle_needs_fewer() -> None:
    people = People(20, turns=400)
    few, more, all_of_them = (sum(simulated(people, kept).warm) for kept in (4, 16, 1000))
    assert few < more < all_of_them
    assert sum(simulated(people, 16, "oracle").warm) > more


def test_a_simulated_turn_is_as_slow_as_a_measured_one() -> None:
    outcome = simulated(People(5, turns=100), 5)
    assert outcome.most == 5
    for warm, first in zip(outcome.warm, outcome.first, strict=True):
        assert first == pytest.approx(30 if warm else 430)  # five people leave two cores for those that start
