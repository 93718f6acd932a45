"""Who has a thread: decided without a gap, handed on in order."""

import asyncio

from session_sidecar.turns.deciding.exclusion import Claims
from session_store import ThreadKey

T1, T2 = ThreadKey("t1", "alice"), ThreadKey("t2", "alice")


async def test_an_unclaimed_thread_is_had_at_once() -> None:
    claims: Claims[str] = Claims()
    assert claims.enter(T1, "a").done()
    assert claims.holder(T1) == "a"


async def test_a_thread_has_one_holder_and_the_others_come_in_order() -> None:
    claims: Claims[str] = Claims()
    claims.enter(T1, "a")
    second, third = claims.enter(T1, "b"), claims.enter(T1, "c")
    assert not second.done()
    assert claims.waiting(T1) == ["b", "c"]
    claims.release(T1, "a")
    assert (second.done(), third.done(), claims.holder(T1)) == (True, False, "b")


async def test_between_release_and_the_next_holder_nobody_slips_in() -> None:
    claims: Claims[str] = Claims()
    claims.enter(T1, "a")
    claims.enter(T1, "b")
    claims.release(T1, "a")
    assert not claims.enter(T1, "late").done()
    assert claims.holder(T1) == "b"


async def test_threads_do_not_wait_for_each_other() -> None:
    claims: Claims[str] = Claims()
    claims.enter(T1, "a")
    assert claims.enter(T2, "b").done()


async def test_who_leaves_the_queue_is_passed_over() -> None:
    claims: Claims[str] = Claims()
    claims.enter(T1, "a")
    claims.enter(T1, "b")
    third = claims.enter(T1, "c")
    claims.release(T1, "b")
    claims.release(T1, "a")
    assert third.done()
    assert claims.holder(T1) == "c"


async def test_a_waiter_that_is_cancelled_never_gets_the_thread() -> None:
    claims: Claims[str] = Claims()
    claims.enter(T1, "a")

    async def wait() -> None:
        await claims.enter(T1, "b")

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    claims.release(T1, "a")
    assert claims.holder(T1) is None


async def test_a_released_thread_leaves_nothing_behind() -> None:
    claims: Claims[str] = Claims()
    claims.enter(T1, "a")
    claims.release(T1, "a")
    claims.release(T1, "a")
    assert list(claims) == []
