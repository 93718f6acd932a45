"""What is known of a session beside its messages: from head and tail of its file, or from all of it."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.lines import tails
from session_sidecar.agent.transcripts.reading.chain import (
    TOKENS,
    Glimpse,
    TranscriptMessage,
    as_message,
    entries_of,
    glimpse,
    read_entries,
    read_whole,
    tokens,
)

_TAIL_BYTES = 64 * 2**10
_MOST_TAIL_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known of a session beside its messages; all of it empty where the SDK has no transcript to resume.

    `ambiguous` is a session with two transcripts: which one is right, a person has to say.
    `message_count` and `usage` need the whole file and are None where only its head and tail were read.
    `message_count` is that of the messages since the last compaction, as the history gives them by default. `usage`
    is the tokens of all API replies in this session's files, its subagents' and those before a compaction among them;
    a fork's is that of the history it inherited and its own, so the sum over a family counts the common part again.
    """

    transcript: Literal["present", "missing", "ambiguous"] = "missing"
    title: str | None = None
    first_prompt: str | None = None
    tag: str | None = None
    message_count: int | None = None
    last_message: Glimpse | None = None
    usage: dict[str, int] | None = None
    size_bytes: int | None = None


@functools.lru_cache(maxsize=2048)
def outline_of(path: Path, *_state: int) -> Metadata:
    """What head and tail of a file tell; remembered while the file's state is the same."""
    info = files.session_info(path)
    if info is None:
        return Metadata()
    return Metadata(
        transcript="present",
        title=info.custom_title,
        first_prompt=info.first_prompt,
        tag=info.tag,
        last_message=_last_in_tail(path),
        size_bytes=info.file_size,
    )


def count(paths: Sequence[Path], outline: Metadata) -> Metadata:
    """The outline with what only whole files tell: the session's, and those of its subagents."""
    path, *subagents = paths
    whole = read_whole(path)
    spent = dict(whole.tokens)
    for file in subagents:
        spent |= tokens(read_entries(file))
    return replace(
        outline,
        message_count=len(whole.messages),
        last_message=_last(whole.messages),
        usage={name: sum(counts[i] for counts in spent.values()) for i, name in enumerate(TOKENS)},
    )


def _last(messages: list[TranscriptMessage]) -> Glimpse | None:
    """The newest message in which something is said."""
    return next((glimpse(m) for m in reversed(messages) if not m.synthetic and m.text), None)


def _last_in_tail(path: Path) -> Glimpse | None:
    """The newest message in which something is said, if it is near enough to the end of the file."""
    with path.open("rb") as file:
        last = None
        for start, tail in tails(file, _TAIL_BYTES, os.fstat(file.fileno()).st_size):
            lines = tail.split(b"\n")[1 if start else 0 :]  # not a cut one
            said = [as_message(e) for e in entries_of(lines) if "line" in e and not e.get("isSidechain")]
            if (last := _last(said)) or len(tail) >= _MOST_TAIL_BYTES:
                break
        return last
