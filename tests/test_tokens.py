"""Tokens as an operator handles them: made, listed and revoked while the sidecar runs, and never kept as they are."""

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from session_sidecar.api.access.tokens import TokenFile, Tokens, make_token
from session_sidecar.settings import SettingsError
from tests.server import SECONDS, Sidecar, a_moment, followed
from tests.terminal import Ended, command, shell

Make = Callable[..., Sidecar]
TOKEN = re.compile(r"ssc_[\w-]{43}\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


async def token(path: Path, *arguments: str) -> Ended:
    return await command("", "token", "--file", str(path), *arguments)


async def listed(sidecar: Sidecar, shown: str) -> httpx.Response:
    return await sidecar.http.get("/v1/sessions", headers={"authorization": f"Bearer {shown}"})


async def becomes(sidecar: Sidecar, shown: str, status: int) -> None:
    """Wait until a token is answered so: a change of the file is noticed within a second."""
    async with asyncio.timeout(SECONDS):
        while (await listed(sidecar, shown)).status_code != status:
            await a_moment()


async def test_a_token_is_shown_once_and_only_its_hash_is_kept(path: Path) -> None:
    made = await token(path, "new", "--resource", "alice", "-r", "a b\u2028c", "--read", "--days", "2")
    assert TOKEN.fullmatch(made.out)
    assert made.out.strip() not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    (known,) = [json.loads(line) for line in (await token(path, "list")).out.splitlines()]
    assert (known["resources"], known["read"]) == (["a b\u2028c", "alice"], True)
    assert 1.9 < (datetime.fromisoformat(known["expires"]) - datetime.now(UTC)) / timedelta(days=1) < 2
    assert known["name"] in made.err


@pytest.mark.long
async def test_the_examples_of_the_help_work_one_after_the_other(tmp_path: Path) -> None:
    told = (await command("", "token", "--help")).out
    *lines, revoke = re.findall(r"^ {4}((?:export|session-sidecar) .*)", told, re.MULTILINE)
    name = """$(session-sidecar token list | sed -n '1s/.*"name": "\\([0-9a-f]*\\)".*/\\1/p')"""
    done = await shell("", " && ".join(["cd", *lines, revoke.rpartition(" ")[0] + f' "{name}"']), HOME=str(tmp_path))
    assert (done.code, len(TOKEN.findall(done.out))) == (0, 2), done.err
    assert len(TokenFile(tmp_path / "tokens").read()) == 1


async def test_tokens_come_and_go_while_it_runs(a_sidecar: Make, path: Path) -> None:
    first = (await token(path, "new", "--all")).out.strip()
    async with a_sidecar(SIDECAR_TOKENS_FILE=str(path)) as sidecar:
        assert (await listed(sidecar, first)).status_code == 200
        second = (await token(path, "new", "-r", "alice")).out.strip()
        await becomes(sidecar, second, 200)
        name = json.loads((await token(path, "list")).out.splitlines()[0])["name"]
        async with followed(sidecar, headers={"authorization": f"Bearer {first}"}) as stream:
            await stream.until("reset")
            assert (await token(path, "revoke", name)).code == 0
            await becomes(sidecar, first, 401)
            assert (await listed(sidecar, second)).status_code == 200
            body = {"thread_id": "t", "resource_id": "alice", "message": "Hello there"}
            said = await sidecar.http.post("/v1/chat", json=body, headers={"authorization": f"Bearer {second}"})
            assert said.status_code == 200
            assert [event.name for event in await stream.rest()] == ["reset"]  # it ends, and nothing more is told
        path.write_text("damaged\n")
        await sidecar.until_logged(f"SIDECAR_TOKENS_FILE: line 1 of {path} is none that `session-sidecar token new` "
                                   "writes; the tokens stay as they were")  # fmt: skip
        assert (await listed(sidecar, second)).status_code == 200


def test_one_that_has_expired_is_none(path: Path) -> None:
    now = datetime.now(UTC)
    for expires, good in ((now - timedelta(seconds=1), False), (now + timedelta(days=1), True), (None, True)):
        text, known = make_token(["alice"], expires=expires)
        TokenFile(path).add(text, known)
        assert (Tokens(path).find(text) is not None) == good
        assert Tokens(path).find(text + "x") is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["new"], "one of --resource"),
        (["new", "--all", "-r", "alice"], "one of --resource"),
        (["new", "--all", "--days", "0"], "--days"),
        (["revoke", "nobody"], "no token is named nobody"),
    ],
)
async def test_what_makes_no_sense_changes_nothing(path: Path, arguments: list[str], complaint: str) -> None:
    await token(path, "new", "--all")
    before = path.read_text()
    refused = await token(path, *arguments)
    assert refused.code in (1, 2)
    assert complaint in refused.err
    assert path.read_text() == before


@pytest.mark.parametrize("content", ["x\n", "00 {}\n", f"{'0' * 64} {{}}\n", f"{'0' * 64} {{\n", "\xff\n"])
async def test_a_file_that_is_none_is_told_by_its_line_and_nothing_starts(
    a_sidecar: Make, path: Path, content: str
) -> None:
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    sidecar = a_sidecar(SIDECAR_TOKENS_FILE=str(path))
    with pytest.raises(AssertionError, match="SIDECAR_TOKENS_FILE: "):
        await sidecar.start()
    assert await sidecar.wait() == 1
    assert len(sidecar.log) == 1


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_refused(path: Path, mode: int) -> None:
    TokenFile(path).add(*make_token(["*"]))
    path.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        Tokens(path)


async def test_off_loopback_it_starts_with_tokens_alone(a_sidecar: Make, path: Path, thread: str) -> None:
    sidecar = a_sidecar("--host", "0.0.0.0")
    with pytest.raises(AssertionError, match="session-sidecar token new"):
        await sidecar.start()
    await sidecar.wait()
    shown = (await token(path, "new", "--all")).out.strip()
    async with a_sidecar("--host", "0.0.0.0", SIDECAR_TOKENS_FILE=str(path), SIDECAR_HOSTS="chat.test") as sidecar:
        port, headers = sidecar.http.base_url.port, {"authorization": f"Bearer {shown}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.2:{port}", headers=headers) as client:
            assert (await client.get("/v1/sessions", headers={"host": "chat.test"})).status_code == 200
            assert (await client.get("/v1/sessions", headers={"host": "CHAT.test:443"})).status_code == 200
            assert (await client.get("/v1/sessions", headers={"host": "evil.test"})).status_code == 421


async def test_the_command_line_shows_its_token(a_sidecar: Make, path: Path, thread: str) -> None:
    shown = (await token(path, "new", "-r", "alice")).out.strip()
    async with a_sidecar(SIDECAR_TOKENS_FILE=str(path)) as sidecar:
        url = str(sidecar.http.base_url)
        said = await command(url, "chat", "-r", "alice", "-t", thread, "Hello", SIDECAR_TOKEN=shown)
        assert said.out == "You have said 1 thing: Hello\n"
        refused = await command(url, "ls")
        assert (refused.code, refused.err.split(":")[1].strip()) == (1, "unauthorized")
        theirs = await command(url, "show", "-r", "bob", thread, SIDECAR_TOKEN=shown)
        assert (theirs.code, theirs.err.split(":")[1].strip()) == (1, "session_not_found")
