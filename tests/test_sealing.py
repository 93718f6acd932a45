"""What is sealed opens in its own place, with its own key, and nowhere else."""

import base64
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from session_sidecar.errors import KeyMissing, SealBroken
from session_sidecar.replicas.archive.chunks import Chunk
from session_sidecar.replicas.archive.sealing import KEY_BYTES, Keyring
from session_sidecar.settings import SettingsError

SESSION, OTHER = "0f8fad5b-d9cb-469f-a165-70867728950e", "7c9e6679-7425-40de-944b-e07fc1f90ae7"
PATH = "subagents/agent-a1.jsonl"
OLD, NEW = bytes(range(KEY_BYTES)), bytes(KEY_BYTES)
SALT = b"s" * 32
DATA = b'{"type":"user","message":"a secret"}\n' * 9

RING = Keyring({"old": OLD})
SEAL = RING.seal_of("alice", SALT)
CHUNK = SEAL.chunk(SESSION, PATH, 3, 700, DATA)


def base64_of(key: bytes) -> str:
    return base64.b64encode(key).decode()


def flipped(at: int) -> Chunk:
    data = bytearray(CHUNK.data)
    data[at] ^= 1
    return replace(CHUNK, data=bytes(data))


def moved(**place: object) -> Chunk:
    return replace(CHUNK, head=replace(CHUNK.head, **place))  # type: ignore[arg-type]


def test_what_is_sealed_opens_again_and_shows_nothing() -> None:
    assert SEAL.bytes_of(SESSION, CHUNK) == DATA
    assert b"secret" not in CHUNK.data
    assert "secret" not in repr(CHUNK)
    assert (CHUNK.head.length, CHUNK.head.key_id) == (len(DATA), "old")


def test_the_same_bytes_are_never_sealed_alike() -> None:
    assert SEAL.chunk(SESSION, PATH, 3, 700, DATA).data != CHUNK.data


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(moved(seq=4), id="another seq"),
        pytest.param(moved(offset=701), id="another offset"),
        pytest.param(moved(length=len(DATA) - 1), id="another length"),
        pytest.param(moved(path="subagents/agent-a2.jsonl"), id="another path"),
        pytest.param(moved(path=""), id="the transcript"),
        pytest.param(flipped(0), id="a bit of the nonce"),
        pytest.param(flipped(40), id="a bit of the text"),
        pytest.param(flipped(-1), id="a bit of the tag"),
        pytest.param(replace(CHUNK, data=CHUNK.data[:-1]), id="without the last byte"),
        pytest.param(replace(CHUNK, data=CHUNK.data[:5]), id="not even a nonce"),
        pytest.param(replace(CHUNK, data=b""), id="nothing"),
        pytest.param(replace(CHUNK, data=CHUNK.data + b"\0"), id="a byte more"),
        pytest.param(replace(CHUNK, head=replace(CHUNK.head, key_id=None)), id="passed off as plain"),
    ],
)
def test_what_was_moved_or_altered_does_not_open(chunk: Chunk) -> None:
    with pytest.raises(SealBroken, match="altered"):
        SEAL.bytes_of(SESSION, chunk)


@pytest.mark.parametrize(
    ("ring", "resource", "salt", "session"),
    [
        pytest.param(RING, "alice", SALT, OTHER, id="another session"),
        pytest.param(RING, "bob", SALT, SESSION, id="another resource"),
        pytest.param(RING, "alice", b"t" * 32, SESSION, id="another salt"),
        pytest.param(Keyring({"old": NEW}), "alice", SALT, SESSION, id="another key of this ID"),
    ],
)
def test_it_opens_for_nobody_else(ring: Keyring, resource: str, salt: bytes, session: str) -> None:
    with pytest.raises(SealBroken):
        ring.seal_of(resource, salt).bytes_of(session, CHUNK)


def test_a_key_that_is_not_there_is_named() -> None:
    for ring in (Keyring(), Keyring({"new": NEW})):
        with pytest.raises(KeyMissing, match="'old'"):
            ring.seal_of("alice", SALT).bytes_of(SESSION, CHUNK)


def test_without_the_salt_nothing_opens_with_any_key() -> None:
    seal = RING.seal_of("alice", None)
    with pytest.raises(KeyMissing, match="deleted"):
        seal.bytes_of(SESSION, CHUNK)
    with pytest.raises(KeyMissing):
        seal.chunk(SESSION, PATH, 0, 0, DATA)
    assert not seal.can_write


def test_the_first_key_writes_and_all_of_them_read() -> None:
    both = Keyring({"new": NEW, "old": OLD}).seal_of("alice", SALT)
    assert both.bytes_of(SESSION, CHUNK) == DATA
    anew = both.chunk(SESSION, PATH, 3, 700, DATA)
    assert anew.head.key_id == "new"
    assert Keyring({"new": NEW}).seal_of("alice", SALT).bytes_of(SESSION, anew) == DATA
    assert both.mac(DATA, "old") == CHUNK.head.mac
    assert both.mac(DATA, "new") == anew.head.mac != CHUNK.head.mac


def test_without_keys_bytes_are_plain_and_altered_ones_are_noticed() -> None:
    seal = Keyring().seal_of("alice", None)
    chunk = seal.chunk(SESSION, PATH, 0, 0, DATA)
    assert (chunk.data, chunk.head.key_id) == (DATA, None)
    assert seal.bytes_of(SESSION, chunk) == DATA
    assert RING.seal_of("alice", None).bytes_of(SESSION, chunk) == DATA  # from before there were keys
    with pytest.raises(SealBroken):
        seal.bytes_of(SESSION, replace(chunk, data=DATA.replace(b"a", b"b")))


def test_a_mac_tells_nothing_to_whoever_guesses_the_bytes() -> None:
    guessed = Keyring().seal_of("alice", None).mac(DATA, None)
    macs = {SEAL.mac(DATA, "old"), RING.seal_of("bob", SALT).mac(DATA, "old"), guessed}
    assert len(macs) == 3


@given(st.binary(max_size=99), st.integers(0, 2**40), st.text(max_size=9), st.text(max_size=9))
def test_anything_goes_through(data: bytes, number: int, path: str, resource: str) -> None:
    seal = RING.seal_of(resource.encode(errors="replace").decode(), SALT)
    assert seal.bytes_of(SESSION, seal.chunk(SESSION, path, number, number, data)) == data


def test_a_setting_is_read_in_its_order() -> None:
    ring = Keyring.of_setting(f"2026-02:{base64_of(NEW)}, 2026-01:{base64_of(OLD)}")
    assert ring.first == "2026-02"
    renamed = Keyring({"2026-01": OLD}).seal_of("alice", SALT).chunk(SESSION, PATH, 0, 0, DATA)
    assert ring.seal_of("alice", SALT).bytes_of(SESSION, renamed) == DATA
    assert Keyring().first is None


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("{key}", "entry 1 is not id:base64"),
        (":{key}", "entry 1 is not id:base64"),
        ("a:{key},", "entry 2 is not id:base64"),
        ("a:{key},a:{key}", "entry 2 has the ID of one before it, a"),
        ("a:{key},b:{key}!", "entry 2 is not base64 behind its ID"),
        ("a:{short}", "entry 1 has 16 bytes; it takes 32 (openssl rand -base64 32)"),
        ("a:", "entry 1 has 0 bytes; it takes 32 (openssl rand -base64 32)"),
        ("", "entry 1 is not id:base64"),
    ],
)
def test_a_wrong_setting_is_one_line_without_a_key(setting: str, complaint: str) -> None:
    key, short = base64_of(os.urandom(KEY_BYTES)), base64_of(os.urandom(16))
    with pytest.raises(SettingsError) as raised:
        Keyring.of_setting(setting.format(key=key, short=short))
    assert str(raised.value) == f"SIDECAR_ENCRYPTION_KEYS: {complaint}"


def test_no_key_is_shown_by_accident() -> None:
    for shown in (repr(RING), str(RING), repr(SEAL), repr(CHUNK)):
        assert repr(OLD) not in shown
