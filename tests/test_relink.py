"""Lines of a transcript are lost: what comes after them is still one conversation, for readers and for the model."""

import asyncio
import json
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from session_sidecar.agent.transcripts.relink import LOOKED_AT_BYTES, relink
from tests.faults import FaultyModel
from tests.modes import KEPT, in_both_modes
from tests.server import SECONDS, Sidecar, a_moment
from tests.transcripts import messages, texts

Make = Callable[..., Sidecar]
FORGETS_AFTER = timedelta(hours=1)  # the CLI finds by itself what is seconds away


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries))


def earlier(entry: dict[str, Any]) -> dict[str, Any]:
    if "timestamp" not in entry:
        return entry
    when = datetime.fromisoformat(entry["timestamp"]) - FORGETS_AFTER
    return {**entry, "timestamp": when.isoformat(timespec="milliseconds").replace("+00:00", "Z")}


def lose(path: Path, prompt: str) -> None:
    """Lose the line of a prompt, and have all that came before it said an hour earlier."""
    entries = lines_of(path)
    at = next(i for i, entry in enumerate(entries) if entry.get("message", {}).get("content") == prompt)
    write(path, [*map(earlier, entries[:at]), *entries[at + 1 :]])


@pytest.fixture(scope="module")
async def _talk(model_env: dict[str, str], _model: FaultyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a sidecar that was stopped: of threads of two, three and four turns, each had with one process."""
    _model.reset()
    async with Sidecar(tmp_path_factory.mktemp("talk") / "home", model_env | KEPT) as sidecar:
        for number in (2, 3, 4):
            for prompt in ("My name is Ada", "one", "two", "three")[:number]:
                await sidecar.say(f"of {number}", prompt)
    return sidecar.home


@pytest.fixture
def talk(_talk: Path, tmp_path: Path) -> Path:
    """A copy of it for a sidecar of the test's own."""
    return shutil.copytree(_talk, tmp_path / "home")


@in_both_modes
@pytest.mark.parametrize("last", ["two", "three"])
async def test_the_model_still_knows_what_came_before(a_sidecar: Make, talk: Path, mode: str, last: str) -> None:
    async with a_sidecar(SIDECAR_SPARE_PROCESSES="0") as sidecar:
        thread = "of 4" if mode == "cold" else "warm"
        if mode == "warm":
            for prompt in ("My name is Ada", "one", "two", "three"):
                await sidecar.say(thread, prompt)
        path = sidecar.transcript(await sidecar.session_id(thread))
        await sidecar.at_rest()
        lose(path, last)
        assert "have said 4 things. First: My name is Ada" in await sidecar.say(thread, "Go on")
        assert "have said 5 things. First: My name is Ada" in await sidecar.say(thread, "And on")
        said = texts([m for m in await messages(sidecar, thread) if m["type"] == "user"])
        assert said == [text for text in ("My name is Ada", "one", "two", "three", "Go on", "And on") if text != last]


async def test_a_fork_of_a_thread_that_went_on_has_all_of_it_too(a_sidecar: Make, talk: Path) -> None:
    async with a_sidecar() as sidecar:
        lose(sidecar.transcript(await sidecar.session_id("of 3")), "one")
        await sidecar.say("of 3", "three")
        answer = await sidecar.post("/v1/chat/fork", "branch", from_thread_id="of 3", message="Go on")
        assert "have said 4 things. First: My name is Ada" in answer.json()["text"]
        assert texts(await messages(sidecar, "branch"))[0] == "My name is Ada"


async def test_a_fork_of_a_parent_that_has_lost_a_line_has_all_of_it_and_leaves_it_alone(
    a_sidecar: Make, talk: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "broken").chmod(0o700)
    agents = tmp_path / "agents.toml"
    agents.write_text(f'[default]\n[broken]\ncli_path = "{tmp_path / "broken"}"\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        path = sidecar.transcript(await sidecar.session_id("of 3"))
        lose(path, "one")
        before, there = path.read_bytes(), {*path.parent.glob("*.jsonl")}
        fork = {"from_thread_id": "of 3", "message": "Go on"}
        assert (await sidecar.post("/v1/chat/fork", "branch", agent="broken", **fork)).status_code == 502
        assert (await sidecar.session("branch")).status_code == 404
        assert {*path.parent.glob("*.jsonl")} == there
        answer = await sidecar.post("/v1/chat/fork", "branch", **fork)
        assert "have said 3 things. First: My name is Ada" in answer.json()["text"]
        assert "have said 4 things. First: My name is Ada" in await sidecar.say("branch", "And on")
        assert path.read_bytes() == before
        assert (await sidecar.session("branch")).json()["parent_thread_id"] == "of 3"


async def test_a_process_that_was_hinted_at_has_all_of_it_too(a_sidecar: Make, talk: Path) -> None:
    async with a_sidecar(SIDECAR_WARM_SESSIONS="2") as sidecar:
        path = sidecar.transcript(await sidecar.session_id("of 2"))
        await sidecar.http.delete("/v1/session", params={"thread_id": "of 2", "resource_id": "alice"})
        await sidecar.at_rest(threads=0)
        lose(path, "one")
        await sidecar.http.put(
            "/v1/session", json={"thread_id": "t", "resource_id": "alice", "sdk_session_id": path.stem}
        )
        await sidecar.post("/v1/session/warm", "t")
        async with asyncio.timeout(SECONDS):
            while not sidecar.cli_processes():
                await a_moment()
        assert "have said 2 things. First: My name is Ada" in await sidecar.say("t", "Go on")
        assert sidecar.logged("turn", process="warm")


# The file


def entry(name: str, parent: str | None, **more: Any) -> dict[str, Any]:
    return {"type": "user", "uuid": name, "parentUuid": parent, "message": {"content": name}, **more}


def test_what_is_whole_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write(path, [entry("a", None), entry("b", "a"), entry("beside", "gone", isSidechain=True), entry("c", "a")])
    before = path.read_bytes()
    assert relink(path) == 0
    assert path.read_bytes() == before


def test_what_was_tied_once_is_not_tied_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write(path, [entry("a", None), entry("c", "gone"), entry("d", "c"), entry("f", "gone too")])
    assert relink(path) == 2
    assert [(e["uuid"], e["parentUuid"]) for e in lines_of(path)[4:]] == [("c", "a"), ("f", "d")]
    assert relink(path) == 0


def test_a_torn_line_at_the_end_is_ended_first(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write(path, [entry("a", None), entry("c", "gone")])
    with path.open("a") as file:
        file.write('{"type": "user", "uu')
    assert relink(path) == 1
    assert json.loads(path.read_text().splitlines()[-1])["parentUuid"] == "a"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_that_leads_far_back_is_followed_before_it_is_called_lost(tmp_path: Path, there: bool) -> None:
    path, long = tmp_path / "t.jsonl", "x" * LOOKED_AT_BYTES
    write(path, [entry("a" if there else "z", None), entry("b", None, text=long), entry("c", "b"), entry("d", "a")])
    assert relink(path) == (0 if there else 1)
