"""What a CLI tells of itself by what it says: whose turn a message is of, and whether the process is at work."""

from typing import Any

import pytest

from session_sidecar.agent.processes.speech import HELD, NAMES_PROMPTS, Speech

Said = dict[str, Any]

TEXT: Said = {"type": "assistant"}
RESULT: Said = {"type": "result"}
OF_ITS_OWN: Said = {"type": "result", "origin": {"kind": "task-notification"}}
OLD: Said = {"type": "system", "subtype": "init", "capabilities": []}  # of a CLI that names no prompts


def init(*prompts: str) -> Said:
    return {"type": "system", "subtype": "init", "capabilities": [NAMES_PROMPTS], "user_message_uuids": [*prompts]}


def tasks(count: int) -> Said:
    return {"type": "system", "subtype": "background_tasks_changed", "tasks": [{}] * count}


OURS, ITS_OWN = False, True
HEARD: dict[str, tuple[str | None, list[tuple[Said, bool]]]] = {
    "a turn of the prompt": ("p", [(init("p"), OURS), (TEXT, OURS), (RESULT, OURS)]),
    "one that it begins by itself before it comes to the prompt": (
        "p",
        [(init(), ITS_OWN), (TEXT, ITS_OWN), (OF_ITS_OWN, ITS_OWN), (init("p"), OURS), (RESULT, OURS)],
    ),
    "one that answers another prompt than ours": ("p", [(init("q"), ITS_OWN), (RESULT, ITS_OWN)]),
    "a second init in the turn of the prompt": ("p", [(init("p"), OURS), (init(), OURS), (RESULT, OURS)]),
    "a CLI that names no prompts answers the one that was asked": ("p", [(OLD, OURS), (RESULT, OURS)]),
    "where nothing was asked it is of its own": (None, [(init(), ITS_OWN), (TEXT, ITS_OWN), (RESULT, ITS_OWN)]),
    "a result that tells where it comes from, without an init": ("p", [(OF_ITS_OWN, ITS_OWN)]),
    "such a result in the turn of the prompt": ("p", [(init("p"), OURS), (OF_ITS_OWN, OURS)]),
}


@pytest.mark.parametrize("case", HEARD)
def test_whose_turn_a_message_is_of(case: str) -> None:
    prompt, said = HEARD[case]
    speech = Speech()
    speech.ask(prompt)
    assert [speech.hear(message) for message, _ in said] == [whose for _, whose in said]
    assert not speech.by_itself


WORK: dict[str, tuple[list[Said], bool]] = {
    "nothing was said": ([], False),
    "tasks are left": ([tasks(2)], True),
    "a task has ended, so the CLI is about to speak": ([tasks(1), tasks(0)], True),
    "it speaks of it": ([tasks(1), tasks(0), init()], True),
    "it has spoken of it": ([tasks(1), tasks(0), init(), OF_ITS_OWN], False),
}


@pytest.mark.parametrize("case", WORK)
def test_when_a_process_is_at_work(case: str) -> None:
    said, at_work = WORK[case]
    speech = Speech()
    for message in said:
        speech.hear(message)
    assert speech.at_work is at_work


def test_of_what_nobody_heard_a_turn_of_its_own_is_held_whole_and_of_notes_the_newest() -> None:
    speech = Speech()
    notes = [{"type": "system", "subtype": "status", "number": number} for number in range(HELD + 3)]
    for message in (*notes, TEXT):
        speech.hold(message)
    assert [message for _, message in speech.held] == notes[3:]
    turn = [init(), *[TEXT] * HELD, OF_ITS_OWN]
    for message in turn:
        speech.hold(message)
    assert [message for by_itself, message in speech.held if by_itself] == turn
    assert speech.speaks
    assert not speech.by_itself
    speech.hold({"type": "end"})
    assert speech.over
