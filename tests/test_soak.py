"""Hundreds of turns with all that people do to them, at random but repeatable: nothing is lost, nothing leaks."""

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.modes import in_both_modes
from tests.server import Sidecar, gone

Make = Callable[..., Sidecar]

TURNS, THREADS, AT_ONCE, SEED = 300, 30, 4, 20_261_121


class Person:
    """Talks on one thread, one turn after another, and remembers what was answered."""

    def __init__(self, sidecar: Sidecar, thread: str, rng: random.Random) -> None:
        self.sidecar, self.thread, self.rng = sidecar, thread, rng
        self.said: list[str] = []
        self.forks = 0

    async def take_a_turn(self, number: int) -> None:
        prompt = f"{self.thread} says {number}"
        what = self.rng.choice(["read", "read", "read", "leave", "cancel", "interrupt", "supersede", "fork"])
        if what == "fork" and self.said:
            await self.fork(prompt)
            return
        fields = {"on_disconnect": "cancel"} if what == "cancel" else {}
        if what in ("cancel", "interrupt", "supersede"):
            prompt += " [[slow 40 0.02]]"
        self.said.append(prompt)
        async with self.sidecar.stream(self.thread, prompt, multitask_strategy="enqueue", **fields) as stream:
            assert stream.response.status_code == 200, stream.response.text
            if what == "read":
                end = (await stream.rest())[-1]
                assert end.data["status"] == "completed"
                assert stream.text.endswith(prompt)
                return
            await stream.until_text()
            if what == "interrupt":
                await self.sidecar.post("/v1/chat/interrupt", self.thread)
            elif what == "supersede":
                instead = f"{self.thread} says {number} otherwise"
                self.said.append(instead)
                await self.sidecar.say(self.thread, instead, multitask_strategy="interrupt")
            if what in ("interrupt", "supersede"):
                assert (await stream.rest())[-1].name == "end"
        await self.sidecar.until_logged("turn", turn_id=stream.events[0].data["turn_id"])

    async def fork(self, prompt: str) -> None:
        self.forks += 1
        name = f"{self.thread}-fork-{self.forks}"
        answer = await self.sidecar.post("/v1/chat/fork", name, from_thread_id=self.thread, message=prompt)
        assert answer.json()["status"] == "completed", answer.text
        assert answer.json()["text"].startswith(f"You have said {len(self.said) + 1} things. First: {self.said[0]}")

    async def check(self) -> None:
        """The history holds what was said, in order, in one chain."""
        history = await self.sidecar.history(self.thread)
        prompts = [text for role, text in history if role == "user" and not text.startswith("[Request")]
        assert prompts == self.said


def resources(pid: int) -> tuple[int, int, int]:
    """Open descriptors, threads and resident KiB of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads"]), int(status["VmRSS"].split()[0])


@pytest.mark.long
@in_both_modes
async def test_300_turns_on_30_threads(a_sidecar: Make, mode: str) -> None:
    rng = random.Random(SEED)
    kept = {"SIDECAR_WARM_SESSIONS": str(THREADS // 10)} if mode == "warm" else {}
    async with a_sidecar(SIDECAR_REPLAY_SECONDS="1", **kept) as sidecar:
        people = [Person(sidecar, f"thread-{number}", random.Random(rng.random())) for number in range(THREADS)]

        most = 0

        async def talk(person: Person, turns: range) -> None:
            nonlocal most
            for number in turns:
                await person.take_a_turn(number)
                most = max(most, len(sidecar.cli_processes()))

        each = TURNS // THREADS
        gate = asyncio.Semaphore(AT_ONCE)  # the machine's own limit is not what this is about

        async def in_turn(person: Person, turns: range) -> None:
            async with gate:
                await talk(person, turns)

        await asyncio.gather(*(in_turn(person, range(each // 2)) for person in people))
        await sidecar.at_rest()
        await sidecar.hang_up()
        before = resources(sidecar.process.pid)
        await asyncio.gather(*(in_turn(person, range(each // 2, each)) for person in people))
        await sidecar.at_rest()
        await sidecar.hang_up()
        after = resources(sidecar.process.pid)
        for person in people:
            await person.check()
        # Those at work, those kept (a tenth of the threads, and a spare), and as many again on their way out.
        assert most <= 2 * (AT_ONCE + THREADS // 10 + 1), "processes are not bounded"
        assert after[0] <= before[0] + 2, "descriptors leak"
        assert after[1] <= before[1] + 2, "threads leak"
        assert after[2] <= before[2] * 1.3, "memory leaks"
        assert not [line for line in sidecar.log if '"level": "error"' in line]
        left = sidecar.cli_processes()
        await sidecar.stop(signal.SIGTERM)
        assert await gone(left, 0)
