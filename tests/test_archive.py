"""Push and pull: what one machine has written is what the next one has, and nothing stored is lost."""

import asyncio
import contextlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from session_sidecar.agent.transcripts.files import MARKER
from session_sidecar.agent.transcripts.reading.metadata import Metadata
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.errors import KeyMissing, SealBroken, TranscriptMissing, TranscriptsUnavailable
from session_sidecar.replicas.archive.chunks import CHUNK_BYTES, MAIN, Change
from session_sidecar.replicas.archive.local import PULLED
from session_sidecar.replicas.archive.sealing import KEY_BYTES, Keyring
from session_store.leases import LeaseLost
from tests.archive import KEY, PLAIN, RING, Keeper, Machine, a_session, in_postgres, in_sqlite
from tests.conversations import conversation

AGENT, RESULT = "subagents/agent-a1.jsonl", "tool-results/toolu_1.txt"
LINE = b'{"type":"user","text":"\\u0000 \xe2\x80\xa8 \\ud800"}\n'


@pytest.fixture(scope="module")
async def readers() -> AsyncIterator[Readers]:
    readers = Readers()
    yield readers
    await readers.close()


@pytest.fixture(
    params=[
        "plain in sqlite",
        pytest.param("sealed in sqlite", marks=pytest.mark.long),
        pytest.param("sealed in postgres", marks=pytest.mark.long),
    ]
)
def how(request: pytest.FixtureRequest) -> str:
    how: str = request.param
    return how


@pytest.fixture
def ring(how: str) -> Keyring:
    return PLAIN if how.startswith("plain") else RING


@pytest.fixture
async def kept(how: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Keeper]:
    if how.endswith("sqlite"):
        keeper = in_sqlite(tmp_path / "transcripts.db")
    else:
        keeper = in_postgres(request.getfixturevalue("database"))
    async with keeper as kept:
        yield kept


@pytest.fixture
def machine(tmp_path: Path, kept: Keeper, ring: Keyring, readers: Readers) -> Callable[..., Machine]:
    def make(name: str, ring: Keyring = ring) -> Machine:
        return Machine(tmp_path / name, kept, ring, readers)

    return make


@pytest.fixture
def here(machine: Callable[..., Machine]) -> Machine:
    return machine("here")


@pytest.fixture
def there(machine: Callable[..., Machine]) -> Machine:
    return machine("there")


@pytest.fixture
def session() -> str:
    return a_session()


async def push(machine: Machine, session: str, settled: int | None = None) -> None:
    await machine.archive.push(session, KEY, machine.fence, settled=settled)


async def pull(machine: Machine, session: str, *, ours: bool = False) -> None:
    await machine.archive.pull(session, KEY.resource_id, ours=ours)


def lines(size: int, seed: int = 1) -> bytes:
    dice = random.Random(seed)
    start = b"".join(conversation(seed, 4))
    return start + b"".join(LINE + dice.randbytes(600).hex().encode() + b"\n" for _ in range(size // 1200))


# --- there and back


async def test_what_one_machine_has_written_is_what_the_next_one_has(
    here: Machine, there: Machine, session: str
) -> None:
    here.write(session, lines(3 * CHUNK_BYTES))
    here.write(session, lines(9000, 2), AGENT)
    here.write(session, b"x" * (CHUNK_BYTES + 1), RESULT)
    here.write(session, b"", "tool-results/empty.txt")
    here.write(session, b"{}", "subagents/agent-a1.meta.json")
    await push(here, session)

    await pull(there, session)
    assert there.files(session) == here.files(session)
    assert len(there.files(session)) == 5


async def test_a_pulled_session_is_in_one_place_and_private(here: Machine, there: Machine, session: str) -> None:
    here.write(session, LINE)
    here.write(session, b"result", RESULT)
    await push(here, session)
    await pull(there, session)
    main = there.path(session)
    assert main == there.projects / PULLED / f"{session}.jsonl"
    for path in (main, there.path(session, RESULT)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in (main.parent, main.with_suffix(""), main.with_suffix("") / "tool-results"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_a_session_that_is_here_already_stays_where_it_is(here: Machine, there: Machine, session: str) -> None:
    there.write(session, LINE)
    here.write(session, LINE + LINE)
    here.write(session, b"result", RESULT)
    await push(here, session)
    await pull(there, session)
    assert there.path(session).parent.name == "-workspace"
    assert there.files(session) == here.files(session)


async def test_half_a_line_is_not_stored_until_it_is_whole(here: Machine, there: Machine, session: str) -> None:
    here.write(session, LINE + LINE[:9])
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == {MAIN: LINE}
    here.append(session, LINE[9:])
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == {MAIN: LINE + LINE}


async def test_what_was_removed_is_removed_but_never_the_transcript(
    here: Machine, there: Machine, session: str
) -> None:
    here.write(session, LINE)
    result = here.write(session, b"result", RESULT)
    await push(here, session)
    await pull(there, session)
    result.unlink()
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == {MAIN: LINE}

    here.path(session).unlink()  # as a cache volume is lost
    with pytest.raises(TranscriptMissing):
        await push(here, session)
    here.write(session, b'"what a CLI that lives on writes there"\n')
    with pytest.raises(TranscriptMissing):
        await push(here, session)
    await pull(here, session, ours=True)
    assert here.files(session) == {MAIN: LINE}
    with pytest.raises(TranscriptMissing):
        await push(here, session, settled=len(LINE) * 2)  # the end of a turn that is not here
    await push(here, session, settled=len(LINE))


async def test_nothing_is_pushed_from_a_volume_that_is_not_mounted(here: Machine, session: str) -> None:
    here.write(session, LINE)
    await push(here, session)
    (here.config / MARKER).unlink()
    for call in (push, pull):
        with pytest.raises(TranscriptsUnavailable):
            await call(here, session)
    with pytest.raises(TranscriptsUnavailable):
        await here.archive.forget(session)
    assert await here.chunks.heads(session)


async def test_a_session_without_a_file_yet_is_nothing(here: Machine, there: Machine, session: str) -> None:
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == {}
    assert await here.chunks.heads(session) == []


# --- what changed under it


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data + LINE, id="grown"),
        pytest.param(lambda data: data[: data.index(b"\n") + 1], id="cut to its first line"),
        pytest.param(lambda data: data[: data.rindex(b"\n", 0, -1) + 1], id="its last line taken out"),
        pytest.param(lambda data: data[data.index(b"\n") + 1 :], id="its first line taken out"),
        pytest.param(lambda data: data[data.index(b"\n") + 1 :] + lines(9000, 5), id="taken out and grown"),
        pytest.param(lambda data: lines(len(data), 7), id="another text"),
    ],
)
async def test_a_file_that_was_written_anew_is_stored_as_it_is(
    here: Machine, there: Machine, session: str, change: Callable[[bytes], bytes]
) -> None:
    whole = lines(2 * CHUNK_BYTES + 70_000)
    here.write(session, whole)
    await push(here, session)
    await pull(there, session)
    here.write(session, change(whole))
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == here.files(session) == {MAIN: change(whole)}


async def test_of_a_file_that_has_grown_only_the_end_is_read_and_stored(here: Machine, session: str) -> None:
    here.write(session, lines(8 * CHUNK_BYTES))
    await push(here, session)
    before = await here.chunks.heads(session)
    file = here.append(session, LINE)
    read = bytes_read()
    await push(here, session)
    assert bytes_read() - read < 4 * CHUNK_BYTES
    after = await here.chunks.heads(session)
    assert after[: len(before) - 1] == before[:-1]
    assert sum(head.length for head in after) == file.stat().st_size


async def test_many_small_pushes_do_not_become_many_chunks(here: Machine, there: Machine, session: str) -> None:
    for number in range(100):
        here.append(session, LINE * (1 + number % 3))
        await push(here, session)
    heads = await here.chunks.heads(session)
    assert len(heads) <= 8
    assert [head.seq for head in heads] == list(range(len(heads)))
    await pull(there, session)
    assert there.files(session) == here.files(session)


async def test_a_file_that_nobody_has_written_to_is_not_stored_again(here: Machine, session: str) -> None:
    here.write(session, lines(9000))
    await push(here, session)
    before = await here.chunks.heads(session)
    await push(here, session)
    here.start_again()
    await push(here, session)
    assert await here.chunks.heads(session) == before


# --- whose tail it is


async def test_our_own_tail_stays_and_is_pushed(here: Machine, there: Machine, session: str) -> None:
    here.write(session, LINE)
    await push(here, session)
    here.append(session, LINE)
    here.write(session, b"result", RESULT)
    here.start_again()
    await pull(here, session, ours=True)
    assert here.files(session) == {MAIN: LINE * 2, RESULT: b"result"}
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == here.files(session)


async def test_a_tail_that_another_has_gone_on_without_is_cut(
    here: Machine, there: Machine, session: str, caplog: pytest.LogCaptureFixture
) -> None:
    here.write(session, LINE)
    await push(here, session)
    await pull(there, session)
    here.append(session, LINE * 3)  # and could not push it
    here.write(session, b"result", RESULT)
    await pull(here, session)
    assert here.files(session) == {MAIN: LINE}
    assert f"{len(LINE) * 3 + 6} bytes" in caplog.text

    there.append(session, b'{"another":"turn"}\n')
    await push(there, session)
    here.append(session, LINE * 3)
    await pull(here, session)
    assert here.files(session) == there.files(session) == {MAIN: LINE + b'{"another":"turn"}\n'}


async def test_a_push_of_what_was_never_pulled_pulls_first(here: Machine, there: Machine, session: str) -> None:
    here.write(session, LINE * 5)
    await push(here, session)
    there.write(session, LINE * 2)  # older than what is stored
    await push(there, session)
    assert there.files(session) == {MAIN: LINE * 5}


async def test_of_our_own_that_differs_from_what_is_stored_a_copy_is_set_aside(here: Machine, session: str) -> None:
    stored = lines(CHUNK_BYTES + 9000)
    here.write(session, stored)
    await push(here, session)
    damaged = stored[:5000] + bytes(len(stored) - 5000)  # as after a power cut
    file = here.write(session, damaged)
    here.start_again()
    await pull(here, session, ours=True)
    assert file.read_bytes() == stored
    (aside,) = file.parent.glob(f"{session}.unreadable-*")
    assert aside.read_bytes() == damaged
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
async def test_machines_that_take_turns_always_have_the_same(
    machine: Callable[..., Machine], data: st.DataObject
) -> None:
    """Whatever the holder does to its files, and whoever is the next."""
    session = a_session()
    fleet = [machine("one"), machine("two")]
    holder = fleet[0]
    expected: dict[str, bytes] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        successor = data.draw(st.sampled_from(fleet))
        if data.draw(st.booleans()):
            successor.start_again()
        await pull(successor, session, ours=successor is holder)
        holder = successor
        assert holder.files(session) == expected
        for _ in range(data.draw(st.integers(0, 3))):
            path = data.draw(st.sampled_from([MAIN, AGENT, RESULT]))
            some = b'"x"\n' * data.draw(st.sampled_from([0, 1, 9, CHUNK_BYTES // 4, CHUNK_BYTES]))
            match data.draw(st.sampled_from(["append", "write", "remove", "push"])):
                case "append":
                    holder.append(session, some, path)
                case "write":  # an empty transcript is none: it would count as lost
                    holder.write(session, some or (b'"y"\n' if path == MAIN else b""), path)
                case "remove" if path != MAIN:
                    holder.path(session, path).unlink(missing_ok=True)
                case _:
                    await push(holder, session)
        if not holder.path(session).exists() or not holder.path(session).stat().st_size:
            holder.write(session, b'"first"\n')
        await push(holder, session)
        expected = holder.files(session)


@pytest.mark.parametrize("how", ["sealed in postgres"])
async def test_who_has_lost_the_thread_stores_nothing_until_he_has_pulled(
    here: Machine, kept: Keeper, session: str
) -> None:
    here.write(session, LINE)
    await push(here, session)
    here.fence = (kept.fence or 0) - 1
    here.append(session, LINE)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            await push(here, session)
        assert here.files(session) == {MAIN: LINE * 2}
    here.fence = kept.fence
    with pytest.raises(LeaseLost):
        await push(here, session)
    await pull(here, session)
    assert here.files(session) == {MAIN: LINE}
    await push(here, session)


# --- keys


async def test_a_wrong_or_missing_key_destroys_nothing(
    machine: Callable[..., Machine], kept: Keeper, session: str
) -> None:
    here = machine("here", RING)
    here.write(session, lines(9000))
    here.write(session, b"result", RESULT)
    await push(here, session)
    files, stored = here.files(session), await kept.chunks.heads(session)
    for error, ring in ((KeyMissing, PLAIN), (SealBroken, Keyring({"k1": os.urandom(KEY_BYTES)}))):
        here.start_again()
        other = machine("here", ring)
        other.append(session, LINE)
        for ours in (True, False):
            with pytest.raises(error):
                await pull(other, session, ours=ours)
        with pytest.raises(error):
            await push(other, session)
        assert other.files(session) == {**files, MAIN: files[MAIN] + LINE}
        assert await kept.chunks.heads(session) == stored
        other.write(session, files[MAIN])


async def test_what_is_plain_is_sealed_as_it_is_written_anew_and_read_meanwhile(
    machine: Callable[..., Machine], session: str
) -> None:
    before, after = machine("before", PLAIN), machine("after", RING)
    before.write(session, LINE)
    await push(before, session)
    await pull(after, session)
    after.write(session, b"result", RESULT)
    await push(after, session)
    assert {head.path: head.key_id for head in await after.chunks.heads(session)} == {MAIN: None, RESULT: "k1"}
    last = machine("last", RING)
    await pull(last, session)
    assert last.files(session) == after.files(session)


async def test_without_its_salt_a_resource_cannot_be_read(
    machine: Callable[..., Machine], kept: Keeper, session: str, tmp_path: Path
) -> None:
    here, there = machine("here", RING), machine("there", RING)
    here.write(session, b'"a secret"\n')
    await push(here, session)
    (salt,) = (await kept.chunks.salts([KEY.resource_id])).values()
    if kept.leases is not None:
        await kept.leases.remove(KEY)  # it has no thread any more
    assert await kept.chunks.forget_salt(KEY.resource_id)
    with pytest.raises(KeyMissing, match="deleted"):
        await pull(there, session)
    for file in tmp_path.glob("transcripts.db*"):
        assert salt not in file.read_bytes()
        assert b"secret" not in file.read_bytes()


# --- the local copy


async def test_the_local_copy_is_there_only_while_it_is_used(here: Machine, session: str) -> None:
    here.write(session, lines(9000))
    here.write(session, b"result", RESULT)
    kept = here.files(session)
    assert not await here.archive.forget(session)  # nobody has stored it
    await push(here, session)
    here.append(session, LINE)
    assert not await here.archive.forget(session)  # nor this
    assert here.files(session)[MAIN] == kept[MAIN] + LINE
    await push(here, session)
    assert await here.archive.forget(session)
    assert here.files(session) == {}
    assert not list(here.projects.rglob(f"*{session}*"))

    await push(here, session)  # which takes nothing away
    await pull(here, session, ours=True)
    assert here.files(session) == {**kept, MAIN: kept[MAIN] + LINE}
    assert await here.archive.forget(session)  # what was only pulled, too
    assert await here.archive.forget(a_session())  # and what is not here at all


async def test_what_is_deleted_is_gone_for_all(here: Machine, there: Machine, session: str) -> None:
    here.write(session, LINE)
    await push(here, session, settled=len(LINE))
    await here.archive.delete(session)
    await pull(there, session)
    assert there.files(session) == {}
    assert await here.outlines.read([session]) == [Metadata()]


async def test_a_path_that_leads_out_of_a_session_is_refused(there: Machine, session: str, ring: Keyring) -> None:
    for path in ("../../settings.json", "/etc/passwd", "a/../../b", "."):
        seal = ring.seal_of(KEY.resource_id, await there.chunks.salt(KEY.resource_id))
        change = Change({}, iter([seal.chunk(session, path, 0, 0, b"gotcha")]))
        assert await there.chunks.write(session, KEY, there.fence, change)
        with pytest.raises(SealBroken):
            await pull(there, session)
        await there.chunks.delete(session)
    assert there.files(session) == {}
    assert not (there.config / "settings.json").exists()


# --- at any moment


async def test_a_push_that_is_broken_off_leaves_what_was_stored(here: Machine, there: Machine, session: str) -> None:
    here.write(session, lines(9000))
    await push(here, session)
    before = here.files(session)
    here.append(session, lines(20 * CHUNK_BYTES, 3))
    for _ in range(5):
        pushing = asyncio.create_task(push(here, session))
        for _ in range(random.randrange(4)):
            await asyncio.sleep(0)
        pushing.cancel()
        await asyncio.wait([pushing])
        await pull(there, session)
        assert there.files(session) in (before, here.files(session))
    await push(here, session)
    await pull(there, session)
    assert there.files(session) == here.files(session)


async def test_a_pull_that_is_broken_off_is_gone_on_with(here: Machine, there: Machine, session: str) -> None:
    here.write(session, lines(40 * CHUNK_BYTES))
    await push(here, session)
    for turns in range(12):
        pulling = asyncio.create_task(pull(there, session))
        for _ in range(turns * 3):
            await asyncio.sleep(0)
        pulling.cancel()
        await asyncio.wait([pulling])
        assert here.files(session)[MAIN].startswith(there.files(session).get(MAIN, b""))
    await pull(there, session)
    assert there.files(session) == here.files(session)


PULLS = """
import asyncio, os, sys
from pathlib import Path
from session_sidecar.agent.transcripts.reading.readers import Readers
from tests.archive import KEY, PLAIN, Machine, in_sqlite

async def main():
    config, database, session = sys.argv[1:]
    async with in_sqlite(Path(database)) as kept:
        machine = Machine(Path(config), kept, PLAIN, Readers())
        await machine.archive.pull(session, KEY.resource_id, ours=False)

for line in sys.stdin:  # a process for each, with its imports done
    pulling = os.fork()
    if pulling == 0:
        asyncio.run(main())
        os._exit(0)
    print(pulling, flush=True)
    os.waitpid(pulling, 0)
    print("gone", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["plain in sqlite"])
async def test_a_pull_that_is_killed_is_mended_by_the_next(
    machine: Callable[..., Machine], tmp_path: Path, session: str
) -> None:
    here, there = machine("here", PLAIN), machine("there", PLAIN)
    whole = lines(200 * CHUNK_BYTES)
    here.write(session, whole)
    await push(here, session)
    seen = set[int]()
    command = (sys.executable, "-c", PULLS, str(there.config), str(tmp_path / "transcripts.db"), session)
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else is to run here
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forking:
        assert forking.stdin is not None
        assert forking.stdout is not None
        for size in (-1, 20 * CHUNK_BYTES, 90 * CHUNK_BYTES):
            print(file=forking.stdin, flush=True)
            pid = int(forking.stdout.readline())
            while _size(there.path(session)) <= size and Path(f"/proc/{pid}").exists():
                time.sleep(0.001)  # noqa: ASYNC251
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            assert forking.stdout.readline() == "gone\n"
            found = there.path(session).read_bytes()
            assert whole.startswith(found)
            seen.add(len(found))
        forking.stdin.close()
    await pull(there, session)
    assert there.files(session) == here.files(session)
    assert len(seen) > 1  # it was killed in the middle


@pytest.mark.long
async def test_a_long_transcript_goes_through_in_pieces(here: Machine, there: Machine, session: str) -> None:
    piece = lines(2**20)
    for _ in range(90):
        here.append(session, piece)
    tracemalloc.start()
    await push(here, session)
    await pull(there, session)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 24 * 2**20
    with here.path(session).open("rb") as one, there.path(session).open("rb") as other:
        while block := one.read(2**20):
            assert other.read(2**20) == block
        assert not other.read(1)


# --- outlines


async def test_a_list_needs_no_files(here: Machine, there: Machine, session: str) -> None:
    prompt = (
        b'{"parentUuid":null,"isSidechain":false,"type":"user","uuid":"%s","message":{"role":"user","content":"%s"}}\n'
    )
    title = b'{"type":"custom-title","customTitle":"A title","sessionId":"%s"}\n' % session.encode()
    data = prompt % (a_session().encode(), b"Hello") + title
    here.write(session, data)
    await push(here, session)
    assert await there.outlines.read([session]) == [Metadata()]  # no turn has ended
    await push(here, session, settled=len(data))
    other = a_session()
    missing, outline = await there.outlines.read([other, session])
    assert missing == Metadata()
    assert (outline.title, outline.first_prompt, outline.size_bytes) == ("A title", "Hello", len(data))
    assert outline.last_message is not None
    assert outline.last_message.preview == "Hello"
    (here_too,) = await here.outlines.read([session])
    assert here_too == outline


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def bytes_read() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])
