"""What has lost the entry that it follows is tied to the one before it, ahead of a CLI that is to go on from there.

A disk that was full for a moment takes an answer and not its prompt; a damaged line is as good as lost. The CLI follows
a link into nothing to the entry before it in time, if that is no more than five seconds older (its
`tengu_chain_timestamp_fallback`, 2.1.330). Else the model is told nothing of what came before, while the history, which
is read by `Chain`, shows it all. tests/test_sdk_contract.py pins both.
"""

import os
from pathlib import Path

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.lines import Chain, Entry, is_in, linked, written

LOOKED_AT_BYTES = 2**20
"""Of the end of a file: what is lost is found by the next start of a CLI, so it is near."""


def relink(path: Path) -> int:
    """Say anew, at the end of a transcript, what those entries follow that have lost it; how many there were.

    The CLI takes the last entry of an UUID. Nothing that is there is changed. Raises FileNotFoundError, NotSaved,
    TranscriptsUnavailable.
    """
    found = lost(path)
    if found:
        files.append(path, b"".join(map(written, found)))
    return len(found)


def lost(path: Path) -> list[Entry]:
    """The entries whose link leads into nothing, with the one before them as what they follow.

    Raises FileNotFoundError.
    """
    with path.open("rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - LOOKED_AT_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")
    chain = Chain()
    newest: dict[str, Entry] = {}
    before: dict[str, str | None] = {}  # what an entry follows that has lost its own
    for line in lines[1 if start else 0 :]:  # not a cut one
        if (entry := linked(line)) is None:
            continue
        parent = chain.parent(entry)
        newest[entry["uuid"]] = entry
        before.setdefault(entry["uuid"], parent)
    return [
        {**entry, "parentUuid": before[name]}
        for name, entry in newest.items()
        if (parent := entry.get("parentUuid")) is not None
        and parent not in newest
        and before[name] is not None
        and not (start and is_in(path, str(parent), start))
    ]
