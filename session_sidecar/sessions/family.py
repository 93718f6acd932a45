"""The family of a thread: what it was forked from and what was forked from it, as the session map has it."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from session_sidecar.agent.transcripts.reading.chain import Glimpse
from session_store import SessionMap, SessionMapping, ThreadKey

MOST = 200
"""So many threads of a family are shown, and so deep it can be nested."""


@dataclass(slots=True)
class Branch:
    """A thread and its forks, oldest first. A deleted thread has no mapping any more; its forks still name it."""

    thread_id: str
    mapping: SessionMapping | None
    children: list["Branch"] = field(default_factory=list)
    gone_by: datetime | None = None  # when another thread took a deleted one's name
    # What its transcript and its turns tell, once that was looked up.
    title: str | None = None
    running: bool = False
    point: Glimpse | None = None  # the message that it was forked after

    def __iter__(self) -> Iterator["Branch"]:
        """This branch and all below it."""
        yield self
        for child in self.children:
            yield from child

    def has_forked(self, row: SessionMapping) -> bool:
        """Whether a row that names this thread as its parent means this one, and not one of the same name."""
        if self.mapping is not None:
            return row.created_at >= self.mapping.created_at
        return self.gone_by is None or row.created_at < self.gone_by


async def family(session_map: SessionMap, mapping: SessionMapping) -> tuple[Branch, bool]:
    """The root of the tree that `mapping` is part of, and whether there is more of it than the `MOST` threads shown.

    The way up to the root is always part of it, unless that alone is longer. What a deleted thread was itself forked
    from is not known: it is the root then.
    """
    path = [Branch(mapping.thread_id, mapping)]
    while len(path) < MOST and (above := await _parent(session_map, path[-1])):
        above.children.append(path[-1])
        path.append(above)
    room, waiting = MOST - len(path), deque(reversed(path))
    while waiting:
        branch = waiting.popleft()
        known = {child.thread_id for child in branch.children}
        rows = await session_map.page(
            mapping.resource_id, limit=MOST + 1, descending=False, parent_thread_id=branch.thread_id
        )
        forks = [row for row in rows if branch.has_forked(row) and row.thread_id not in known]
        added = [Branch(row.thread_id, row) for row in forks[:room]]
        branch.children = sorted([*branch.children, *added], key=_age)
        waiting.extend(added)
        room -= len(added)
        if len(added) < len(forks):
            return path[-1], True
    return path[-1], len(path) == MOST and await _parent(session_map, path[-1]) is not None


async def _parent(session_map: SessionMap, branch: Branch) -> Branch | None:
    child = branch.mapping
    if child is None or child.parent_thread_id is None:
        return None
    row = await session_map.get(ThreadKey(child.parent_thread_id, child.resource_id))
    if row is not None and row.created_at > child.created_at:
        return Branch(child.parent_thread_id, None, gone_by=row.created_at)
    return Branch(child.parent_thread_id, row)


def _age(branch: Branch) -> tuple[datetime, str]:
    assert branch.mapping is not None  # noqa: S101 - only a root can be without
    return branch.mapping.created_at, branch.thread_id
