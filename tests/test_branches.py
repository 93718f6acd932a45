"""The family of forks is one tree, whichever member it is asked of, and a deleted ancestor is a gap in it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from session_sidecar.sessions.family import MOST, Branch, family
from session_store import SessionMapping, ThreadKey
from session_store.sqlite import SqliteSessionMap
from tests.faults import FaultyModel
from tests.replicas import Know
from tests.server import Sidecar
from tests.transcripts import get, messages, settled


async def branches(sidecar: Sidecar, thread: str) -> dict[str, Any]:
    response = await get(sidecar, "/v1/session/branches", thread)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert (answer["object"], answer["thread_id"], answer["truncated"]) == ("branches", thread, False)
    root: dict[str, Any] = answer["root"]
    return root


def names(node: dict[str, Any]) -> dict[str, Any]:
    """The tree of thread IDs."""
    return {node["thread_id"]: [names(child) for child in node["children"]]}


def nodes(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The nodes of a tree by thread."""
    found = {node["thread_id"]: node}
    for child in node["children"]:
        found |= nodes(child)
    return found


@pytest.fixture
async def tree(sidecar: Sidecar, knows: Know, thread: str) -> str:
    """A thread `t` with the forks `t-1` (with a turn of its own) and `t-2`, and a fork `t-1-1` of the first."""
    await knows(sidecar, thread)
    await sidecar.post("/v1/chat/fork", f"{thread}-1", from_thread_id=thread, message="I like tea")
    await sidecar.at_rest()
    for parent, name in ((thread, f"{thread}-2"), (f"{thread}-1", f"{thread}-1-1")):
        response = await sidecar.post("/v1/chat/fork", name, from_thread_id=parent)
        assert response.status_code == 201
    return thread


async def test_the_tree_is_the_same_from_any_member(sidecar: Sidecar, tree: str) -> None:
    expected = {tree: [{f"{tree}-1": [{f"{tree}-1-1": []}]}, {f"{tree}-2": []}]}
    for member in (tree, f"{tree}-1", f"{tree}-2", f"{tree}-1-1"):
        assert names(await branches(sidecar, member)) == expected


async def test_each_branch_tells_where_it_began_and_when_it_was_last_spoken_to(sidecar: Sidecar, tree: str) -> None:
    found = nodes(await branches(sidecar, tree))
    first = (await messages(sidecar, tree))[-1]
    second = (await messages(sidecar, f"{tree}-1"))[-1]
    assert found[tree]["branch_point"] is None
    for name, message in ((f"{tree}-1", first), (f"{tree}-2", first), (f"{tree}-1-1", second)):
        assert found[name]["parent_message_id"] == message["uuid"] == found[name]["branch_point"]["uuid"]
    point = found[f"{tree}-1"]["branch_point"]
    assert (point["type"], point["preview"]) == ("assistant", "You have said 1 thing: My name is Ada")
    assert found[f"{tree}-1-1"]["branch_point"]["preview"].endswith("last: I like tea")
    for name, node in found.items():
        mapping = (await sidecar.session(name)).json()
        assert (node["sdk_session_id"], node["last_activity"]) == (mapping["sdk_session_id"], mapping["updated_at"])
    assert found[f"{tree}-2"]["title"].endswith("(fork)")


async def test_a_branch_with_a_running_turn_is_seen(sidecar: Sidecar, tree: str, model: FaultyModel) -> None:
    async with sidecar.stream(f"{tree}-2", "[[hold 3]]") as stream:
        await stream.until_text()
        found = nodes(await branches(sidecar, tree))
        assert {name for name, node in found.items() if node["status"] == "running"} == {f"{tree}-2"}
        model.release()
        await stream.rest()


async def test_a_deleted_ancestor_is_a_gap_and_the_branch_points_are_still_known(sidecar: Sidecar, tree: str) -> None:
    transcript = await settled(sidecar, tree)
    await sidecar.http.delete("/v1/session", params={"thread_id": tree, "resource_id": "alice"})
    transcript.unlink()
    root = await branches(sidecar, f"{tree}-1-1")
    assert names(root) == {tree: [{f"{tree}-1": [{f"{tree}-1-1": []}]}, {f"{tree}-2": []}]}
    assert (root["status"], root["sdk_session_id"], root["last_activity"]) == ("deleted", None, None)
    points = [child["branch_point"]["preview"] for child in root["children"]]
    assert points == ["You have said 1 thing: My name is Ada"] * 2
    assert (await get(sidecar, "/v1/session/branches", tree)).status_code == 404


async def test_a_family_without_any_transcript_is_still_a_tree(sidecar: Sidecar, tree: str) -> None:
    for name in (tree, f"{tree}-1", f"{tree}-2", f"{tree}-1-1"):
        (await settled(sidecar, name)).unlink()
    found = nodes(await branches(sidecar, tree))
    assert [node["branch_point"] for node in found.values()] == [None] * 4
    assert (await sidecar.http.get("/v1/session/branches", params={"thread_id": tree, "resource_id": "bob"})).json()[
        "code"
    ] == "session_not_found"


# Families of other shapes, in a session map alone


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[SqliteSessionMap]:
    sessions = await SqliteSessionMap.open(tmp_path / "sidecar.db")
    yield sessions
    await sessions.close()


async def add(sessions: SqliteSessionMap, name: str, parent: str | None = None) -> SessionMapping:
    session_id = f"session of {name} under {parent}"
    return await sessions.add(ThreadKey(name, "alice"), session_id, parent_thread_id=parent, parent_message_id=parent)


def drawn(branch: Branch) -> str:
    """A tree in a line: `a(b(c) d)`; what is deleted in capitals."""
    below = f"({' '.join(map(drawn, branch.children))})" if branch.children else ""
    return (branch.thread_id if branch.mapping else branch.thread_id.upper()) + below


async def test_a_thread_that_has_no_family_is_a_tree_of_one(sessions: SqliteSessionMap) -> None:
    root, truncated = await family(sessions, await add(sessions, "a"))
    assert (drawn(root), truncated) == ("a", False)


async def test_what_a_deleted_thread_was_forked_from_is_not_known(sessions: SqliteSessionMap) -> None:
    a, b = await add(sessions, "a"), await add(sessions, "b", "a")
    c, _ = await add(sessions, "c", "b"), await add(sessions, "d", "b")
    await sessions.remove(b.key)
    assert drawn((await family(sessions, c))[0]) == "B(c d)"
    assert drawn((await family(sessions, a))[0]) == "a"


async def test_a_new_thread_under_a_deleted_ones_name_is_not_taken_for_it(sessions: SqliteSessionMap) -> None:
    a, b = await add(sessions, "a"), await add(sessions, "b", "a")
    await sessions.remove(a.key)
    new = await add(sessions, "a", "b")  # a circle of names, but not of threads
    await add(sessions, "c", "a")
    for member in (b, new):
        assert drawn((await family(sessions, member))[0]) == "A(b(a(c)))"


async def test_a_large_family_is_shown_in_part_and_never_without_the_one_that_asked(sessions: SqliteSessionMap) -> None:
    await add(sessions, "root")
    last = [await add(sessions, f"{number:03}", "root") for number in range(MOST + 5)][-1]
    root, truncated = await family(sessions, last)
    shown = [branch.thread_id for branch in root]
    assert (len(shown), truncated, shown[-1]) == (MOST, True, last.thread_id)
    assert shown[1:-1] == [f"{number:03}" for number in range(MOST - 2)]


async def test_a_long_line_of_forks_is_shown_from_some_ancestor_on(sessions: SqliteSessionMap) -> None:
    last = await add(sessions, "000")
    for number in range(1, MOST + 5):
        last = await add(sessions, f"{number:03}", f"{number - 1:03}")
    root, truncated = await family(sessions, last)
    shown = [branch.thread_id for branch in root]
    assert (root.thread_id, shown[-1], len(shown), truncated) == ("005", last.thread_id, MOST, True)


async def test_other_resources_are_other_families(sessions: SqliteSessionMap) -> None:
    mine = await add(sessions, "a")
    await sessions.add(ThreadKey("b", "bob"), "session of bob", parent_thread_id="a")
    assert drawn((await family(sessions, mine))[0]) == "a"
