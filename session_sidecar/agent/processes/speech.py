"""What a CLI tells of itself by what it says: in whose turn it is, and whether it is at work. No I/O.

A task that the agent has left in the background ends between two turns, or while one waits: the CLI then begins a turn
by itself. Its `init` names no prompt of ours in `user_message_uuids`, and its result has an `origin`.
"""

from collections import deque

from session_sidecar.agent.messages import Message

# The newest of what an idle process says is held for the turn that it may begin by itself.
HELD = 16
NAMES_PROMPTS = "msg_lifecycle_v1"  # among an `init`'s capabilities: its turns say which prompts they answer


class Speech:
    """All that one process says, in order: each message goes to `hear`, or to `hold` while nobody listens."""

    def __init__(self) -> None:
        self.by_itself = False  # it is in a turn that nobody has asked for
        self.over = False  # it says no more
        self.tasks = 0  # in the background
        self.due = False  # one of them has ended, so a turn that nobody has asked for should follow
        self.held: deque[tuple[bool, Message]] = deque()  # said while nobody listened
        self._asked: str | None = None  # the prompt's UUID, from when it is given to its result
        self._begun = False  # the turn of that prompt has

    @property
    def at_work(self) -> bool:
        """Whether the process does something that nobody waits for: background tasks, and what it says of their end."""
        return self.tasks > 0 or self.due or self.speaks

    @property
    def speaks(self) -> bool:
        """Whether it has begun a turn by itself of which nobody has heard the end, be it said by now or not."""
        return self.by_itself or any(by_itself for by_itself, _ in self.held)

    def ask(self, prompt: str | None) -> None:
        """A turn is waited for: of the prompt of this UUID, or with None the one that it has begun by itself."""
        self._asked, self._begun = prompt, False

    def answered(self) -> None:
        """No turn is waited for any more."""
        self._asked = None

    def hear(self, message: Message) -> bool:
        """Note what a message tells of the process; whether it is of a turn that the CLI began by itself."""
        kind, subtype = message["type"], message.get("subtype")
        by_itself = self.by_itself
        if kind == "system" and subtype == "init":
            # A CLI of an operator's own may be too old to say what a turn answers, or that it does.
            says = NAMES_PROMPTS in message.get("capabilities", ()) and not self._begun
            by_itself = self._asked is None or (says and self._asked not in message.get("user_message_uuids", ()))
            self.by_itself, self._begun = by_itself, not by_itself
            self.due = self.due and not by_itself
        elif kind == "system" and subtype == "background_tasks_changed":
            before, self.tasks = self.tasks, len(message["tasks"])
            self.due = self.due or self.tasks < before
        elif kind == "result":
            by_itself = by_itself or ("origin" in message and not self._begun)
            self.by_itself = self._begun = False
        return by_itself

    def hold(self, message: Message) -> None:
        """Keep what was said while nobody listened, for whoever comes next: all of a turn, and the newest notes."""
        if message["type"] in ("end", "error"):
            self.over = True
            return
        by_itself = self.hear(message)
        if by_itself or message["type"] == "system":
            self.held.append((by_itself, message))
        while len(self.held) > HELD and not self.held[0][0]:
            self.held.popleft()
