"""One turn at a time on a thread; the others are told, wait, or take over; and a retry runs nothing twice."""

import asyncio
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

from tests.faults import FaultyModel
from tests.modes import in_both_modes
from tests.server import Sidecar

Make = Callable[..., Sidecar]


@in_both_modes
async def test_of_fifty_simultaneous_messages_one_runs_and_the_others_are_told(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    asking = {asyncio.create_task(sidecar.chat(thread, f"[[hold 1]] {number}")) for number in range(50)}
    waiting = asking
    while len(waiting) > 1:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await model.requested()
    model.release()
    answers = await asyncio.gather(*asking)
    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 49}
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"thread_busy"}
    assert len(model.requests) == 1
    assert len(await sidecar.history(thread)) == 2


@pytest.mark.long
async def test_fifty_threads_at_once_each_get_their_own_answer(a_sidecar: Make) -> None:
    names = [f"thread {number}" for number in range(50)]
    async with a_sidecar(SIDECAR_WARM_SESSIONS="12") as sidecar:  # of some 130 MiB each
        said = await asyncio.gather(*(sidecar.say(name, f"I am {name}") for name in names))
        assert said == [f"You have said 1 thing: I am {name}" for name in names]
        again = await asyncio.gather(*(sidecar.say(name, "Who am I?") for name in names))
        assert again == [f"You have said 2 things. First: I am {name}; last: Who am I?" for name in names]
        assert len({await sidecar.session_id(name) for name in names}) == 50


@pytest.mark.smoke
async def test_enqueued_messages_run_in_the_order_they_came(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    async with sidecar.stream(thread, "first [[hold 1]]") as stream:
        await stream.until_text()
        waiting = []
        for number in (2, 3, 4):
            waiting.append(asyncio.create_task(sidecar.say(thread, f"{number}.", multitask_strategy="enqueue")))
            await sidecar.settle()
        model.release()
        await stream.rest()
        answers = await asyncio.gather(*waiting)
    assert [answer.split("; last: ")[1] for answer in answers] == ["2.", "3.", "4."]
    prompts = [text for role, text in await sidecar.history(thread) if role == "user"]
    assert prompts == ["first [[hold 1]]", "2.", "3.", "4."]


async def test_a_full_queue_refuses(a_sidecar: Make, thread: str, model: FaultyModel) -> None:
    async with a_sidecar(SIDECAR_QUEUE_TURNS="1") as sidecar, sidecar.stream(thread, "[[hold 1]]") as stream:
        await stream.until_text()
        asked = [asyncio.create_task(sidecar.chat(thread, text, multitask_strategy="enqueue")) for text in "bc"]
        (refused,), (waiting,) = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert (refused.result().status_code, refused.result().json()["code"]) == (429, "queue_full")
        assert "retry-after" in refused.result().headers
        model.release()
        await stream.rest()
        assert (await waiting).status_code == 200


async def test_a_waiting_message_leaves_the_queue_with_its_client_if_it_asked_for_that(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "first [[hold 1]]") as stream:
        await stream.until_text()
        asked = sidecar.chat(thread, "second", multitask_strategy="enqueue", on_disconnect="cancel")
        waiting = asyncio.create_task(asked)
        await sidecar.settle()
        waiting.cancel()
        left = await sidecar.until_logged("turn", thread_id=thread, code="turn_interrupted")
        assert left["sdk_session_id"] is None
        model.release()
        await stream.rest()
    answer = await sidecar.say(thread, "third")
    assert answer == "You have said 2 things. First: first [[hold 1]]; last: third"


@pytest.mark.smoke
async def test_a_message_that_interrupts_goes_ahead_of_those_that_wait(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "first [[hold 1]]") as stream:
        await stream.until_text()
        patient = asyncio.create_task(sidecar.say(thread, "patient", multitask_strategy="enqueue"))
        await sidecar.settle()
        urgent = await sidecar.say(thread, "urgent", multitask_strategy="interrupt")
        assert (await stream.rest())[-1].data["status"] == "interrupted"
        await patient
    assert urgent.endswith("last: urgent")
    prompts = [text for role, text in await sidecar.history(thread) if role == "user" and "[Request" not in text]
    assert prompts == ["first [[hold 1]]", "urgent", "patient"]


@in_both_modes
async def test_a_retry_joins_the_turn_that_runs_and_replays_it_afterwards(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async def ask() -> httpx.Response:
        return await sidecar.post("/v1/chat", thread, message="[[hold 1]]", idempotency_key=f"key-{thread}")

    first = asyncio.create_task(ask())
    await model.requested()
    second = asyncio.create_task(ask())
    model.release()
    third = await asyncio.gather(first, second, return_exceptions=False)
    answers = [*third, await ask()]
    assert len({answer.json()["session"]["turn_id"] for answer in answers}) == 1
    assert len({answer.text for answer in answers}) == 1
    assert len(model.requests) == 1


@pytest.mark.smoke
async def test_a_key_used_for_something_else_is_refused(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    key = f"key-{thread}"
    await sidecar.post("/v1/chat", thread, message="One", idempotency_key=key)
    other = await sidecar.post("/v1/chat", thread, message="Another", idempotency_key=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    somebody_elses = await sidecar.post(
        "/v1/chat", thread, message="Another", idempotency_key=key, resource_id="mallory"
    )
    assert somebody_elses.status_code == 200
    assert len(model.requests) == 2


async def test_a_retry_of_a_turn_that_never_reached_the_agent_runs_it(
    a_sidecar: Make, thread: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cli = tmp_path_factory.mktemp("cli") / "claude"
    agents = cli.with_name("agents.toml")
    agents.write_text(f'[default]\ncli_path = "{cli}"\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        failed = await sidecar.post("/v1/chat", thread, message="Hello", idempotency_key="k")
        assert failed.json()["code"] == "agent_start_failed"
        cli.symlink_to(bundled_cli())
        again = await sidecar.post("/v1/chat", thread, message="Hello", idempotency_key="k")
        assert again.json()["text"] == "You have said 1 thing: Hello"


def bundled_cli() -> str:
    import claude_agent_sdk  # noqa: PLC0415

    return f"{claude_agent_sdk.__path__[0]}/_bundled/claude"


@pytest.mark.parametrize("key", ["", "x" * 257, "schlüssel"])
async def test_a_key_that_is_no_key_is_refused(sidecar: Sidecar, thread: str, model: FaultyModel, key: str) -> None:
    body = {"thread_id": thread, "resource_id": "alice", "message": "Hello"}
    response = await sidecar.http.post("/v1/chat", json=body, headers={b"idempotency-key": key.encode()})
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert model.requests == []


async def test_more_turns_than_the_limit_are_refused_until_one_has_ended(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar(SIDECAR_MAX_TURNS="1") as sidecar:
        async with sidecar.stream(thread, "[[hold 1]]") as stream:
            await stream.until_text()
            refused = await sidecar.chat(f"{thread}-b", "Hello")
            assert (refused.status_code, refused.json()["code"]) == (503, "too_many_turns")
            assert "retry-after" in refused.headers
            model.release()
            await stream.rest()
        await sidecar.until_logged("turn", thread_id=thread)
        assert await sidecar.say(f"{thread}-b", "Hello")
