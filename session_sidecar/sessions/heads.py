"""Where a message of a chat goes that is known by the message before it: on with a thread, or into a new branch.

`decide` is pure: what is known of the threads comes in, and the place comes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from session_sidecar.agent.transcripts.reading.exchanges import Known
from session_sidecar.errors import MessageNotFound, ThreadBusy

__all__ = ["Known", "Place", "Thread", "decide", "go_on"]


@dataclass(frozen=True, slots=True)
class Thread:
    """What is known of a thread: its exchanges, as far as its last turn that has ended, and the turn that runs on it.

    `running` is the head itself where the agent goes on by itself. `lost` is a thread whose transcript is not there.
    """

    thread_id: str
    exchanges: Sequence[Known] = ()
    running: str | None = None
    lost: bool = False

    @property
    def head(self) -> str:
        """The last exchange that a person has begun, or nothing. What the agent adds by itself is no other one."""
        return next((one.name for one in reversed(self.exchanges) if one.asked), "")

    def find(self, name: str) -> Known | None:
        """The exchange of this name."""
        return next((one for one in self.exchanges if one.name == name), None)

    def head_at(self, name: str) -> str:
        """What the head is up to an exchange."""
        index = next(i for i, one in enumerate(self.exchanges) if one.name == name)
        return next((one.name for one in reversed(self.exchanges[: index + 1]) if one.asked), "")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message goes: after this turn of a thread, or as the first one of a branch of it, cut `at` a message.

    `after_turn` is empty for a thread that has no turn, and None where whatever comes last is right.
    """

    thread_id: str
    after_turn: str | None = None
    at: str | None = None
    is_branch: bool = False


def go_on(threads: Sequence[Thread], parent: str) -> Place | None:
    """The first of these threads that ends with this exchange, or has it under way."""
    for thread in threads:
        if thread.running == parent:
            return Place(thread.thread_id, parent)
        undisturbed = thread.running in (None, thread.head)
        if undisturbed and thread.find(parent) and thread.head_at(parent) == thread.head:
            return Place(thread.thread_id, thread.head)
    return None


def decide(
    chat: str,
    threads: Sequence[Thread],
    parents: Sequence[str],
    *,
    answered: bool,
    strategy: Literal["reject", "enqueue", "interrupt"] = "reject",
) -> Place:
    """Where the message goes of a chat that these threads are of, in the order in which they are preferred.

    `parents` are the names of the exchanges before it as its client knows them, the nearest first; `answered` is
    whether that has seen an answer at all. A place that is a branch without `at` is a thread that begins anew.

    Raises MessageNotFound, ThreadBusy.
    """
    for parent in parents:
        if (place := go_on(threads, parent)) is not None:
            return place
        having = [(thread, known) for thread in threads if (known := thread.find(parent)) is not None]
        for thread, known in having:
            if thread.head_at(parent) == thread.head and strategy == "reject":
                raise ThreadBusy("A turn runs after that message. Wait for it, or stop it first.", retry_after=1)
            return Place(thread.thread_id, at=known.end, is_branch=True)
    if threads and threads[0].lost:
        return Place(threads[0].thread_id)
    if answered:
        raise MessageNotFound(
            "None of the messages before the last one is known here, and nothing was started. Load the chat with "
            "`GET /v1/ai-sdk/chat/{id}`, and send its messages with the new one."
        )
    own = next((thread for thread in threads if thread.thread_id == chat), Thread(chat))
    return Place(chat, "") if not own.exchanges else Place(chat, is_branch=True)
