"""Who has a thread in a fleet. No clock is waited for: the times in the rows are moved instead."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from session_store import Lease, LeaseHeld, LeaseLost, Leases, SessionMapping, ThreadKey, ThreadMapped
from session_store.postgres import PostgresSessionMap
from session_store.postgres.database import Database
from tests.leases import LeasesInMemory, Rows

KEY: Final = ThreadKey("t1", "alice")
OTHER: Final = ThreadKey("t2", "alice")
TTL: Final = 1500.0  # so that a test that is kept waiting by a busy machine sees none of it pass
GRACE: Final = 500.0
A_LITTLE: Final = 50.0
REPLICAS: Final = tuple(str(uuid.UUID(int=number + 1)) for number in range(3))

PASS: Final = """
UPDATE session_mappings SET lease_until = lease_until - make_interval(secs => %(seconds)s),
    contested_at = contested_at - make_interval(secs => %(seconds)s)
"""
LOCK: Final = b"SELECT 1 FROM session_mappings FOR UPDATE"
WAITING: Final = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""
ROW: Final = "SELECT fence, holder FROM session_mappings WHERE thread_id = %(thread_id)s"


@pytest.fixture
async def shared(database: str) -> AsyncIterator[Database]:
    opened = await Database.open(database)
    yield opened
    await opened.close()


class Fleet:
    """Replicas, each with connections of its own."""

    def __init__(self, url: str, shared: Database) -> None:
        self._url, self._shared = url, shared
        self.opened: list[PostgresSessionMap] = []

    async def replica(self, replica_id: str | None = None) -> PostgresSessionMap:
        replica = await PostgresSessionMap.open(self._url, replica_id=replica_id, ttl=TTL, grace=GRACE)
        self.opened.append(replica)
        return replica

    async def passes(self, seconds: float) -> None:
        """So much time passes for the database."""
        await self._shared.rows(PASS, {"seconds": seconds})

    async def race(self, *calls: Awaitable[object]) -> list[object]:
        """The answers of calls that all stand before the same row when it becomes free."""
        async with self._shared.transaction() as holding:
            await holding.execute(LOCK)
            racing = asyncio.gather(*calls, return_exceptions=True)
            while await self._shared.rows(WAITING) != [(len(calls),)]:
                assert not racing.done()
        return await racing

    async def fence(self, key: ThreadKey = KEY) -> int:
        ((fence, _),) = await self._shared.rows(ROW, {"thread_id": key.thread_id})
        assert isinstance(fence, int)
        return fence


@pytest.fixture
async def fleet(database: str, shared: Database) -> AsyncIterator[Fleet]:
    fleet = Fleet(database, shared)
    yield fleet
    for replica in fleet.opened:
        await replica.close()


@pytest.fixture
async def ours(fleet: Fleet) -> PostgresSessionMap:
    """The replica that has the thread, from its first commit on."""
    replica = await fleet.replica()
    await replica.add(KEY, "s1")
    return replica


@pytest.fixture
async def theirs(fleet: Fleet) -> PostgresSessionMap:
    """Another one."""
    return await fleet.replica()


async def is_held(replica: PostgresSessionMap, holder: PostgresSessionMap, *, live: bool, key: ThreadKey = KEY) -> None:
    with pytest.raises(LeaseHeld, match="Another replica has this thread") as refused:
        await replica.acquire(key)
    assert (refused.value.holder.replica_id, refused.value.holder.live) == (holder.replica_id, live)


async def taken(replica: PostgresSessionMap, key: ThreadKey = KEY) -> Lease:
    lease = await replica.acquire(key)
    assert lease is not None
    return lease


async def take_over(fleet: Fleet, theirs: PostgresSessionMap, ours: PostgresSessionMap) -> Lease:
    await fleet.passes(TTL)
    await is_held(theirs, ours, live=False)
    await fleet.passes(GRACE)
    return await taken(theirs)


# Who gets it


async def test_a_thread_that_is_not_mapped_cannot_be_had(ours: PostgresSessionMap) -> None:
    assert await ours.acquire(OTHER) is None
    assert ours.held().keys() == {KEY}


async def test_of_replicas_that_race_for_a_free_thread_one_wins(fleet: Fleet, ours: PostgresSessionMap) -> None:
    replicas = [await fleet.replica() for _ in range(4)]
    await ours.release(KEY)
    answers = await fleet.race(*(replica.acquire(KEY) for replica in replicas))
    (winner,) = (replica for replica, answer in zip(replicas, answers, strict=True) if isinstance(answer, Lease))
    losers = [answer for answer in answers if isinstance(answer, LeaseHeld)]
    assert [(loser.holder.replica_id, loser.holder.live) for loser in losers] == [(winner.replica_id, True)] * 3
    assert [replica for replica in replicas if replica.held()] == [winner]


async def test_of_replicas_that_race_for_a_contested_thread_one_wins(fleet: Fleet, ours: PostgresSessionMap) -> None:
    replicas = [await fleet.replica() for _ in range(4)]
    await fleet.passes(TTL)
    await is_held(replicas[0], ours, live=False)
    await fleet.passes(GRACE)
    answers = await fleet.race(*(replica.acquire(KEY) for replica in replicas))
    assert sorted(type(answer).__name__ for answer in answers) == ["Lease", "LeaseHeld", "LeaseHeld", "LeaseHeld"]


async def test_a_holder_that_comes_back_together_with_who_would_take_over_and_only_one_has_it(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    await fleet.passes(TTL)
    await is_held(theirs, ours, live=False)
    await fleet.passes(GRACE)
    answer, lost = await fleet.race(theirs.acquire(KEY), ours.renew())
    assert (lost == {KEY}) is isinstance(answer, Lease)


async def test_a_new_thread_is_leased_from_its_first_commit(
    ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    await is_held(theirs, ours, live=True)
    with pytest.raises(ThreadMapped):
        await theirs.add(KEY, "s2")
    assert theirs.held() == {}


async def test_a_lease_that_has_run_out_is_first_contested_and_taken_only_later(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    await fleet.passes(TTL - A_LITTLE)
    await is_held(theirs, ours, live=True)
    await fleet.passes(A_LITTLE + GRACE)  # however long ago: its holder does not know yet
    await is_held(theirs, ours, live=False)
    await fleet.passes(GRACE - A_LITTLE)
    await is_held(theirs, ours, live=False)
    before = await fleet.fence()
    await fleet.passes(A_LITTLE)
    lease = await taken(theirs)
    assert (lease.was_ours, lease.fence > before) == (False, True)
    assert (lease.mapping, lease.settled) == (await theirs.get(KEY), 0)
    assert await ours.renew() == {KEY}


async def test_a_holder_that_comes_back_in_time_keeps_its_thread(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    before = await fleet.fence()
    await fleet.passes(TTL)
    await is_held(theirs, ours, live=False)
    await fleet.passes(GRACE - A_LITTLE)
    assert await ours.renew() == set()
    await fleet.passes(GRACE)
    await is_held(theirs, ours, live=True)
    await fleet.passes(TTL)
    await is_held(theirs, ours, live=False)  # which is as if nobody had ever asked
    assert await ours.touch(KEY, "s1") is not None
    assert await fleet.fence() == before


async def test_a_replica_that_was_started_again_has_its_threads_at_once(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    first = await fleet.fence()
    again = await fleet.replica(ours.replica_id)
    lease = await taken(again)
    assert (lease.was_ours, lease.fence > first) == (True, True)
    with pytest.raises(LeaseLost):
        await ours.touch(KEY, "s1")
    assert await ours.renew() == {KEY}
    await fleet.passes(TTL)
    await is_held(theirs, ours, live=False)
    assert (await taken(again)).was_ours  # contested or not


async def test_a_thread_that_is_held_is_had_again_under_its_fence(fleet: Fleet, ours: PostgresSessionMap) -> None:
    fence = await fleet.fence()
    await fleet.passes(TTL)
    lease = await taken(ours)
    assert (lease.fence, lease.was_ours) == (fence, True)
    await fleet.passes(TTL - A_LITTLE)
    assert await ours.renew() == set()


# What is given back, and lost


async def test_a_released_thread_is_free_at_once_and_remembers_its_holder(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    await ours.register("http://ours:8000")
    await ours.release(KEY)
    assert ours.held() == {}
    (holder,) = (await theirs.holders([KEY, OTHER])).values()
    assert (holder.replica_id, holder.url, holder.live) == (ours.replica_id, "http://ours:8000", False)
    first = await fleet.fence()
    lease = await taken(ours)
    assert (lease.was_ours, lease.fence > first) == (True, True)
    await ours.release(KEY)
    assert not (await taken(theirs)).was_ours
    assert not (await taken_after_release(ours, theirs)).was_ours


async def taken_after_release(replica: PostgresSessionMap, holder: PostgresSessionMap) -> Lease:
    await holder.release(KEY)
    return await taken(replica)


async def test_a_release_that_comes_late_takes_nothing_from_the_next_holder(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    await take_over(fleet, theirs, ours)
    await ours.release(KEY)
    await is_held(ours, theirs, live=True)
    assert await theirs.renew() == set()


async def test_a_renewal_that_comes_late_does_not_bring_back_what_was_released(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    for _ in range(20):
        await asyncio.gather(ours.renew(), ours.release(KEY))
        assert ours.held() == {}
        await taken(theirs)
        await taken_after_release(ours, theirs)


async def test_one_renewal_is_for_all_that_are_held_and_tells_what_is_lost(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    kept = [ThreadKey(f"k{n}", "bob") for n in range(50)]
    await asyncio.gather(*(ours.add(key, f"s-{key.thread_id}") for key in kept))
    await ours.add(OTHER, "s2")
    await take_over(fleet, theirs, ours)
    removed = await fleet.replica()
    await removed.remove(OTHER)  # it has long run out
    statements: list[str] = []
    ours.observe = lambda kind, _: statements.append(kind)
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert await ours.renew() == {KEY, OTHER}
    assert statements == ["renew"]
    assert ours.held().keys() == set(kept)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert all(before + TTL <= until <= now + TTL for until in ours.held().values())
    await fleet.passes(TTL - A_LITTLE)
    assert all(holder.live for holder in (await theirs.holders(kept)).values())
    assert await ours.renew() == set(), "what is lost is told once"


async def test_who_has_nothing_renews_without_asking(theirs: PostgresSessionMap) -> None:
    statements: list[str] = []
    theirs.observe = lambda kind, _: statements.append(kind)
    assert (await theirs.renew(), statements) == (set(), [])


# What is written


WRITES: Final[dict[str, Callable[[PostgresSessionMap], Awaitable[SessionMapping | None]]]] = {
    "replace": lambda sessions: sessions.replace(KEY, "s9", expected="s1"),
    "touch": lambda sessions: sessions.touch(KEY, "s1"),
    "remove": lambda sessions: sessions.remove(KEY),
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
Write = Callable[[PostgresSessionMap], Awaitable[SessionMapping | None]]


@every_write
async def test_what_is_written_under_an_old_fence_is_refused_whoever_has_it_now(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap, write: Write
) -> None:
    await take_over(fleet, theirs, ours)
    before = await theirs.get(KEY)
    with pytest.raises(LeaseLost, match="taken this thread over"):
        await write(ours)
    assert await ours.renew() == {KEY}
    await theirs.release(KEY)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            await write(ours)
    assert await theirs.get(KEY) == before
    await ours.release(KEY)
    assert await write(ours) is not None  # without any lease now, as nobody else has one


@every_write
async def test_what_is_written_under_the_fence_of_a_mapping_that_was_made_anew_is_refused(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap, write: Write
) -> None:
    await take_over(fleet, theirs, ours)
    await theirs.remove(KEY)
    before = await theirs.add(KEY, "s1")
    with pytest.raises(LeaseLost):
        await write(ours)
    assert await theirs.get(KEY) == before


@every_write
async def test_who_has_no_lease_writes_only_where_nobody_has_one(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap, write: Write
) -> None:
    before = await ours.get(KEY)
    with pytest.raises(LeaseHeld) as refused:
        await write(theirs)
    assert refused.value.holder.replica_id == ours.replica_id
    assert await ours.get(KEY) == before
    await ours.release(KEY)
    assert await write(theirs) is not None


async def test_a_holder_whose_lease_ran_out_still_writes_while_nobody_took_it(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    await fleet.passes(TTL + GRACE)
    assert await ours.touch(KEY, "s1") is not None
    await is_held(theirs, ours, live=False)
    assert await ours.touch(KEY, "s1") is not None


async def test_a_mapping_that_is_removed_and_made_anew_never_gets_a_lower_fence(
    fleet: Fleet, ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    fences = [await fleet.fence()]
    for replica in (ours, theirs, ours):
        await (ours if len(fences) % 2 else theirs).remove(KEY)
        await replica.add(KEY, f"s{len(fences)}")
        fences.append(await fleet.fence())
        await replica.release(KEY)
    assert fences == sorted(set(fences))


async def test_of_another_session_nothing_is_settled(ours: PostgresSessionMap, shared: Database) -> None:
    await shared.rows("UPDATE session_mappings SET settled = 700")
    await ours.touch(KEY, "s1")
    assert (await taken(ours)).settled == 700
    await ours.replace(KEY, "s2", expected="s1")
    assert (await taken(ours)).settled == 0


async def test_who_gives_up_while_acquiring_holds_nothing_and_keeps_it_from_nobody(
    ours: PostgresSessionMap, theirs: PostgresSessionMap
) -> None:
    for steps in range(8):
        await ours.release(KEY)
        call = asyncio.create_task(theirs.acquire(KEY))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        if not call.cancelled():  # it was done already
            await theirs.release(KEY)
        assert theirs.held() == {}
        await taken(ours)


# All of it, at random, and compared with the rules once more


KEYS: Final = (0, 1)
OPERATIONS: Final = ("acquire", "acquire", "acquire", "touch", "remove", "add", "release", "renew", "restart", "pass")
WHILES: Final = (400, 600, 1600)  # no sum of them is TTL or GRACE
steps = st.tuples(
    st.sampled_from(OPERATIONS), st.sampled_from(range(len(REPLICAS))), st.sampled_from(KEYS), st.sampled_from(WHILES)
)
A_TAKEOVER: Final = [
    ("add", 0, 0, 0),
    ("pass", 0, 0, 1600),
    ("acquire", 1, 0, 0),
    ("pass", 0, 0, 600),
    ("acquire", 1, 0, 0),
    ("touch", 0, 0, 0),
]
fresh = itertools.count()
Replica = PostgresSessionMap | LeasesInMemory


@dataclass
class Seen:
    """What the replicas of one fleet can know, by a clock that all of them go by."""

    now: float = 0
    certain: dict[tuple[int, ThreadKey], float] = field(default_factory=dict)  # until when each believes it has what
    fences: dict[ThreadKey, int] = field(default_factory=dict)  # the highest of each thread


async def outcome(replica: Replica, operation: str, key: ThreadKey) -> object:
    """What a call answered, as far as two keepers can be compared by it."""
    answer: object = None
    try:
        match operation:
            case "acquire":
                lease = await replica.acquire(key)
                answer = lease and ("lease", lease.was_ours, lease.mapping.version)
            case "touch":
                touched = await replica.touch(key, key.thread_id)
                answer = touched and ("touched", touched.version)
            case "remove":
                removed = await replica.remove(key)
                answer = removed and ("removed", removed.version)
            case "add":
                answer = ("added", (await replica.add(key, key.thread_id)).version)
            case "renew":
                answer = ("lost", await replica.renew())
            case "release":
                await replica.release(key)
    except LeaseHeld as held:
        answer = ("held", held.holder)
    except (LeaseLost, ThreadMapped) as refused:
        answer = type(refused)
    return answer


def check(seen: Seen, operation: str, replica: int, key: ThreadKey, answer: object, fence: int | None) -> None:
    """Never two that are certain of one thread; a new lease has a higher fence than any before."""
    ttl = seen.now + TTL
    match operation, answer:
        case ("acquire", ("lease", *_)) | ("add", ("added", _)):
            seen.certain[replica, key] = ttl
            assert fence is not None
            assert fence >= seen.fences.get(key, 0)
            seen.fences[key] = fence
        case "renew", ("lost", set(lost)):
            mine = {known for whose, known in seen.certain if whose == replica}
            seen.certain.update({(replica, known): ttl for known in mine - lost})
            for known in lost:
                del seen.certain[replica, known]
        case ("release", _) | ("remove", ("removed", _)):
            seen.certain.pop((replica, key), None)
    for known in {known for _, known in seen.certain}:
        believe = [whose for (whose, of), until in seen.certain.items() if of == known and until > seen.now]
        assert len(believe) < 2, f"{believe} both have {known}"


@pytest.mark.long
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(steps, max_size=30))
@example(A_TAKEOVER)
async def test_whatever_is_done_one_replica_has_a_thread_and_no_old_fence_writes(
    shared: Database, history: list[tuple[str, int, int, int]]
) -> None:
    number, rows, seen = next(fresh), Rows(), Seen()
    keys = [ThreadKey(f"t{number}-{key}", f"r{number}") for key in KEYS]

    def started(which: int) -> tuple[PostgresSessionMap, LeasesInMemory]:
        times = {"ttl": TTL, "grace": GRACE}
        return PostgresSessionMap(shared, REPLICAS[which], **times), LeasesInMemory(rows, REPLICAS[which], **times)

    fleet = [started(which) for which in range(len(REPLICAS))]
    for operation, which, of, seconds in history:
        key = keys[of]
        if operation == "pass":
            await shared.rows(PASS, {"seconds": seconds})
            rows.now += seconds
            seen.now += seconds
        elif operation == "restart":
            fleet[which] = started(which)
            for known in keys:
                seen.certain.pop((which, known), None)
        else:
            real, model = fleet[which]
            before = rows.rows.get(key)
            fence, was = model._fences.get(key), before and before.fence
            answer = await outcome(real, operation, key)
            assert answer == await outcome(model, operation, key), (operation, which, key)
            if isinstance(answer, tuple) and answer[0] in {"touched", "removed"} and fence is not None:
                assert fence == was, "an old fence has written"
            found = await shared.rows(ROW, {"thread_id": key.thread_id})
            check(seen, operation, which, key, answer, found[0][0] if found else None)
            assert [str(holder) for _, holder in found] == [row.holder for at, row in rows.rows.items() if at == key]
            assert real.held().keys() == model.held().keys()


def test_both_keepers_are_leases(shared: Database) -> None:
    keepers: list[Leases] = [PostgresSessionMap(shared), LeasesInMemory(Rows(), "a")]
    assert all(isinstance(keeper, Leases) for keeper in keepers)
