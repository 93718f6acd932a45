"""A conversation as exchanges: a prompt, and all that answers it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from session_sidecar.agent.transcripts.reading.chain import TranscriptMessage, read_whole
from session_sidecar.agent.transcripts.reading.ending import read_ending

_BY_ITSELF = "<task-notification>"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt, if it is known, and all that answers it."""

    messages: tuple[TranscriptMessage, ...]

    @property
    def prompt(self) -> TranscriptMessage | None:
        """What a person has said; None where the agent went on by itself, as a task of its own had ended."""
        first = self.messages[0]
        return first if first.type == "user" and not first.synthetic and not first.results else None

    @property
    def name(self) -> str:
        """What it is known by: the prompt's UUID, which is its turn's ID; without one, the ID of its first reply."""
        replies = (m.reply for m in self.messages if m.type == "assistant" and m.reply)
        return self.prompt.uuid if self.prompt else next(replies, self.messages[0].uuid)

    @property
    def end(self) -> str:
        """The UUID of its last message, to fork after: the answer's, if there is one."""
        said = (m.uuid for m in reversed(self.messages) if m.type == "assistant" and not m.synthetic)
        return next(said, self.messages[-1].uuid)


@dataclass(frozen=True, slots=True)
class Known:
    """An exchange for who looks for one: its name, its last message, and whether a person has begun it."""

    name: str
    end: str
    asked: bool = True


def exchanges(messages: Iterable[TranscriptMessage]) -> list[Exchange]:
    """A conversation's messages, by what they answer."""
    found: list[list[TranscriptMessage]] = []
    for message in messages:
        if not found or _begins(message):
            found.append([])
        found[-1].append(message)
    return [Exchange(tuple(one)) for one in found]


def count(messages: Iterable[TranscriptMessage]) -> int:
    """How many exchanges begin in these messages."""
    return sum(_begins(message) for message in messages)


def last_exchanges(path: Path, enough: int, *, size: int | None = None) -> tuple[list[Exchange], bool]:
    """At least the last `enough` exchanges in the first `size` bytes of a transcript, and whether there are no others.

    Fewer, or none, where its end does not tell. Raises FileNotFoundError.
    """
    ending = read_ending(path, enough + 1, size=size, count=count)
    # What came before a compaction is part of it, and the end of a file does not have that.
    complete = ending.complete and not (ending.messages and ending.messages[0].synthetic)
    found = exchanges(ending.messages)
    return (found, True) if complete else (found[1:], False)  # the first may have begun before


def all_exchanges(files: Sequence[Path], size: int | None) -> list[Exchange]:
    """All of a conversation, with what came before a compaction."""
    return exchanges(read_whole(files[0], size=size, compacted=True).messages)


def head(found: Sequence[Exchange]) -> str | None:
    """The name of the last exchange that a person has begun."""
    return next((one.name for one in reversed(found) if one.prompt is not None), None)


def _begins(message: TranscriptMessage) -> bool:
    if message.type != "user" or message.results:
        return False
    return not message.synthetic or message.text.lstrip().startswith(_BY_ITSELF)
