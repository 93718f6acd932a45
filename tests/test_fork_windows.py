"""A fork ends where its parent's last turn has ended, whatever begins there while the fork is being made."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest

from session_sidecar.app import create_app
from session_sidecar.errors import UnsafeForkPoint
from session_sidecar.settings import Settings
from session_sidecar.turns.turn import Turn, TurnRequest
from session_sidecar.turns.turns import Turns
from session_store import ThreadKey
from tests.faults import FaultyModel
from tests.server import SECONDS, Sidecar, chain

pytestmark = pytest.mark.long

Make = Callable[..., Sidecar]


class Interleaved:
    """A coroutine that lets `meanwhile` happen at one of the moments at which it waits for something."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, meanwhile: Callable[[], Coroutine[Any, Any, None]]):
        self._work, self._at, self._meanwhile = work, at, meanwhile
        self.moments = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        while True:
            try:
                waited_for = next(steps)
            except StopIteration as ended:
                return ended.value
            if self.moments == self._at:
                yield from self._meanwhile().__await__()
            self.moments += 1
            yield waited_for


@pytest.fixture
async def turns(
    model: FaultyModel, model_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Turns]:
    """The turns of a sidecar in this process, so that a test can say what happens when."""
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "")  # the sidecar sets its own
    for name, value in model_env.items():
        monkeypatch.setenv(name, value)
    app = create_app(Settings.load({}, home=tmp_path / "home"))
    async with app.router.lifespan_context(app) as state:
        assert state is not None
        yield state["services"].turns


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def say(turns: Turns, key: ThreadKey, message: str) -> Turn:
    turn = turns.begin(TurnRequest(key, message))
    async with asyncio.timeout(SECONDS):
        await turn.ended.wait()
    assert turn.status == "completed", turn.error
    return turn


async def test_a_turn_that_begins_at_any_moment_of_a_fork_is_not_part_of_it(
    turns: Turns, thread: str, model: FaultyModel, tmp_path: Path
) -> None:
    parent, said = ThreadKey(thread, "alice"), ["My name is Ada"]
    first = await say(turns, parent, *said)
    transcript = next(tmp_path.glob(f"home/claude/projects/*/{first.session_id}.jsonl"))
    moments, at = 1, 0
    while at < moments:
        fork = ThreadKey(f"{thread}-{at}-fork", "alice")
        prompt, began = f"This is number {at}. [[slow 5 0.1]]", list[Turn]()

        async def begin(prompt: str = prompt, began: list[Turn] = began) -> None:
            turn = turns.begin(TurnRequest(parent, prompt, multitask_strategy="enqueue"))
            began.append(turn)
            # It comes as far as it can: to its prompt in the transcript, or to wait until the fork has looked.
            await until(
                lambda: turns._exclusion.running(parent) is not turn or prompt.encode() in transcript.read_bytes()
            )

        forking = Interleaved(turns._fork(parent, fork, None), at, begin)
        mapping = await forking
        forked = next(tmp_path.glob(f"home/claude/projects/*/{mapping.sdk_session_id}.jsonl"))
        assert [text for role, text in chain(forked) if role == "user"] == said, f"at moment {at}"
        moments, at = max(moments, forking.moments), at + 1
        for turn in began:
            async with asyncio.timeout(SECONDS):
                await turn.ended.wait()
            assert turn.status == "completed"
            said.append(prompt)
    assert moments > 5


async def test_a_fork_of_a_thread_whose_turn_is_claimed_and_not_planned_waits_for_the_plan(
    turns: Turns, thread: str
) -> None:
    parent = ThreadKey(thread, "alice")
    await say(turns, parent, "My name is Ada")
    running = turns.begin(TurnRequest(parent, "Who am I?", multitask_strategy="enqueue"))
    mapping = await turns.fork(parent, ThreadKey(f"{thread}-fork", "alice"), None)
    assert mapping.parent_thread_id == thread
    await running.ended.wait()
    assert running.status == "completed"


async def test_a_parent_whose_first_turn_has_no_transcript_yet_has_nothing_to_fork(turns: Turns, thread: str) -> None:
    first = turns.begin(TurnRequest(ThreadKey(thread, "alice"), "My name is Ada"))
    await first.planned.wait()
    with pytest.raises(UnsafeForkPoint):
        await turns.fork(ThreadKey(thread, "alice"), ThreadKey(f"{thread}-fork", "alice"), None)
    await first.ended.wait()
