"""The transcripts' volume is full or read-only: what cannot be saved is refused, and leaves nothing behind."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.faults import FaultyModel
from tests.replicas import Know
from tests.server import SECONDS, Sidecar, a_moment, gone
from tests.transcripts import get, messages, metadata, texts
from tests.volume import mounted

Make = Callable[..., Sidecar]

BLOCK = 4096  # a file takes room by the block, so what is left of its last one is still free on a full volume


def claude(tmp_path: Path) -> Path:
    """Where a sidecar of one's own keeps the transcripts."""
    return tmp_path / "home" / "claude"


def kept(tmp_path: Path) -> dict[Path, bytes]:
    """All the transcripts there are, and what else lies beside them."""
    return {path: path.read_bytes() for path in claude(tmp_path).glob("projects/*/*")}


async def patch(sidecar: Sidecar, thread: str, **fields: str | None) -> httpx.Response:
    return await sidecar.http.patch("/v1/session", json={"thread_id": thread, "resource_id": "alice", **fields})


@pytest.mark.parametrize("room", [0, 50, 200])
async def test_on_a_full_volume_a_title_is_refused_and_no_part_of_it_is_kept(
    a_sidecar: Make, thread: str, tmp_path: Path, room: int, knows: Know
) -> None:
    """With room for nothing, for half a line, and for the tag but not for the title."""
    with mounted(claude(tmp_path)) as volume:
        async with a_sidecar() as sidecar:
            await knows(sidecar, thread)
            assert (await patch(sidecar, thread, title="Before", tag="before")).status_code == 200
            file = sidecar.transcript(await sidecar.session_id(thread))
            filler = b'{"type":"filler","is":""}\n'
            size = file.stat().st_size + len(filler)
            with file.open("ab") as lines:
                lines.write(filler.replace(b'""', b'"' + b"x" * ((-size - room) % BLOCK) + b'"'))
            assert -file.stat().st_size % BLOCK == room
            before = kept(tmp_path)
            volume.fill()
            refused = await patch(sidecar, thread, title="After " + "x" * 190, tag="after")
            assert (refused.status_code, refused.json()["code"]) == (507, "not_saved")
            assert "make room" in refused.json()["detail"]
            assert kept(tmp_path) == before
            found = await metadata(sidecar, thread)
            assert (found["title"], found["tag"]) == ("Before", "before")
            volume.free()
            assert (await patch(sidecar, thread, title="After", tag=None)).json()["metadata"]["title"] == "After"
            assert not any("xxx" in line for line in sidecar.log)


async def test_on_a_full_volume_a_fork_is_refused_and_leaves_neither_a_file_nor_a_mapping(
    a_sidecar: Make, thread: str, tmp_path: Path, knows: Know
) -> None:
    with mounted(claude(tmp_path)) as volume:
        async with a_sidecar() as sidecar:
            await knows(sidecar, thread)
            before = kept(tmp_path)
            volume.fill()
            refused = await sidecar.post("/v1/chat/fork", f"{thread}-fork", from_thread_id=thread)
            assert (refused.status_code, refused.json()["code"]) == (507, "not_saved")
            assert kept(tmp_path) == before
            assert (await sidecar.session(f"{thread}-fork")).status_code == 404
            volume.free()
            again = await sidecar.post("/v1/chat/fork", f"{thread}-fork", from_thread_id=thread)
            assert again.status_code == 201
            assert texts(await messages(sidecar, f"{thread}-fork")) == texts(await messages(sidecar, thread))


async def test_on_a_read_only_volume_nothing_is_changed_and_all_can_be_read(
    a_sidecar: Make, thread: str, tmp_path: Path, knows: Know
) -> None:
    with mounted(claude(tmp_path)) as volume:
        async with a_sidecar() as sidecar:
            await knows(sidecar, thread)
            before = kept(tmp_path)
            key = {"thread_id": thread, "resource_id": "alice"}
            volume.remount("ro")
            try:
                for refused in (
                    await patch(sidecar, thread, title="After"),
                    await sidecar.post("/v1/chat/fork", f"{thread}-fork", from_thread_id=thread),
                    await sidecar.http.delete("/v1/session", params={**key, "transcript": "delete"}),
                ):
                    assert (refused.status_code, refused.json()["code"]) == (503, "transcripts_unavailable")
                    assert "cannot be written" in refused.json()["detail"]
                assert any("Read-only file system" in line for line in sidecar.log)
                assert kept(tmp_path) == before
                assert (await sidecar.session(f"{thread}-fork")).status_code == 404
                assert (await get(sidecar, "/v1/session/messages", thread)).status_code == 200
            finally:
                volume.remount("rw")
            assert (await patch(sidecar, thread, title="After")).status_code == 200


async def test_a_fork_that_the_session_map_has_no_room_for_leaves_no_copy(
    a_sidecar: Make, thread: str, tmp_path: Path, knows: Know
) -> None:
    with mounted(tmp_path / "home") as full, mounted(claude(tmp_path)):
        async with a_sidecar() as sidecar:
            await knows(sidecar, thread)
            before = kept(tmp_path)
            full.fill()
            refused = await sidecar.post("/v1/chat/fork", f"{thread}-fork", from_thread_id=thread)
            assert refused.status_code in {503, 507}
            assert kept(tmp_path) == before
            full.free()
            assert (await sidecar.session(f"{thread}-fork")).status_code == 404
            again = await sidecar.post("/v1/chat/fork", f"{thread}-fork", from_thread_id=thread)
            assert again.status_code == 201


async def test_a_turn_that_is_not_saved_says_so_and_readiness_does_until_something_can_be(
    a_sidecar: Make, thread: str, tmp_path: Path
) -> None:
    with mounted(claude(tmp_path)) as volume:
        async with a_sidecar(SIDECAR_WARM_SESSIONS="2") as sidecar:
            await sidecar.say(thread, "My name is Ada")
            process = await sidecar.process_of(thread)
            volume.fill()
            async with sidecar.stream(thread, "[[big 100000]] Who am I?") as stream:
                end = (await stream.rest())[-1].data
            assert len(stream.text) == 100_000
            assert (end["status"], end["error"]["code"]) == ("failed", "not_saved")
            await sidecar.until_logged("turn", thread_id=thread, code="not_saved")
            assert await gone([process], 0)
            unready = await sidecar.http.get("/readyz")
            assert (unready.status_code, unready.json()["code"]) == (507, "not_saved")
            assert "Make room" in unready.json()["detail"]
            volume.free()
            assert (await sidecar.http.get("/readyz")).status_code == 200
            assert "First: My name is Ada" in await sidecar.say(thread, "And now?")
            assert (await sidecar.http.get("/readyz")).status_code == 200


async def test_a_first_turn_that_is_not_saved_leaves_its_thread_the_session_that_was_told(
    a_sidecar: Make, thread: str, tmp_path: Path
) -> None:
    with mounted(claude(tmp_path)) as volume:
        async with a_sidecar() as sidecar:
            await sidecar.say(f"{thread}-another", "Hello")
            await sidecar.at_rest()
            volume.remount("ro")
            try:
                async with sidecar.stream(thread, "My name is Ada") as stream:
                    events = await stream.rest()
                await sidecar.until_logged("turn", thread_id=thread)
            finally:
                volume.remount("rw")
            assert (events[-1].data["status"], events[-1].data["error"]["code"]) == ("failed", "not_saved")
            told = events[0].data["sdk_session_id"]
            assert await sidecar.session_id(thread) == told
            answer = (await sidecar.chat(thread, "Who am I?")).json()
            assert answer["session"]["outcome"] == "restarted"
            assert answer["session"]["replaced_session_id"] in (None, told)


async def test_a_turn_whose_prompt_the_volume_did_not_take_is_not_completed(
    a_sidecar: Make, thread: str, model: FaultyModel, tmp_path: Path
) -> None:
    """There is room again when the answer comes, and the CLI goes on from what it remembers."""
    with mounted(claude(tmp_path)) as volume:
        async with a_sidecar(SIDECAR_WARM_SESSIONS="2") as sidecar:
            await sidecar.say(thread, "My name is Ada")
            file = sidecar.transcript(await sidecar.session_id(thread))
            volume.fill()
            async with sidecar.stream(thread, "[[hold 1]] " + 2 * BLOCK * "x") as stream:
                await stream.until_text()
                async with asyncio.timeout(SECONDS):
                    while file.stat().st_size % BLOCK:  # of the prompt, the part that there was room for
                        await a_moment()
                volume.free()
                model.release()
                end = (await stream.rest())[-1].data
            assert (end["status"], end["error"]["code"]) == ("failed", "not_saved")
            assert (await sidecar.say(thread, "Again")).endswith("Again")
            assert texts(await messages(sidecar, thread))[-2] == "Again"
