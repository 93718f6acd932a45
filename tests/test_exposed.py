"""What stands between the agent and the outside: pages of other origins, one tenant's load, what leaks."""

import asyncio
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.faults import FaultyModel
from tests.forked import PROGRAM
from tests.modes import COLD
from tests.server import SECONDS, Sidecar
from tests.terminal import command

Make = Callable[..., Sidecar]
PAGE = "https://chat.test"


@pytest.mark.smoke
async def test_a_page_may_call_if_its_origin_is_named_and_no_other(a_sidecar: Make) -> None:
    async with a_sidecar(SIDECAR_ORIGINS=f"{PAGE}, https://other.test:8443") as sidecar:
        asked = {"origin": PAGE, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = (
            "authorization,content-type,last-event-id,idempotency-key,x-resource-id"
        )
        preflight = await sidecar.http.options("/v1/chat", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        answer = await sidecar.http.get("/v1/sessions", headers={"origin": PAGE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert {"x-request-id", "link"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        for origin in ("https://evil.test", "http://chat.test", f"{PAGE}.evil.test", "null"):
            refused = await sidecar.http.get("/v1/sessions", headers={"origin": origin})
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden_origin")
            assert "access-control-allow-origin" not in refused.headers


async def test_no_page_is_told_anything_where_no_origin_is_named(sidecar: Sidecar) -> None:
    asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    assert (await sidecar.http.options("/v1/chat", headers=asked)).status_code == 405
    answer = await sidecar.http.get("/v1/sessions", headers={"origin": "http://localhost:3000"})
    assert "access-control-allow-origin" not in answer.headers


async def test_one_resource_cannot_take_every_turn(a_sidecar: Make, thread: str, model: FaultyModel) -> None:
    async with a_sidecar(SIDECAR_MAX_TURNS_PER_RESOURCE="2") as sidecar:
        async with sidecar.stream(thread, "[[hold 1]]") as one, sidecar.stream(f"{thread}-b", "[[hold 1]]") as two:
            await one.until_text()
            await two.until_text()
            for path, fields in (("/v1/chat", {"message": "Hello"}), ("/v1/chat/fork", {"from_thread_id": thread})):
                refused = await sidecar.post(path, f"{thread}-c", **fields)
                assert (refused.status_code, refused.json()["code"]) == (429, "too_many_turns_of_resource")
                assert int(refused.headers["retry-after"]) > 0
            queued = await sidecar.chat(thread, "Hello", multitask_strategy="enqueue")
            assert queued.status_code == 429
            other = await sidecar.chat(f"{thread}-c", "Hello", resource_id="bob")
            assert other.status_code == 200
            model.release()
            await one.rest()
            await two.rest()
        await sidecar.until_logged("turn", thread_id=f"{thread}-b")
        assert await sidecar.say(f"{thread}-c", "Hello") == "You have said 1 thing: Hello"


async def test_paths_of_the_server_can_be_left_out_of_streams(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar(SIDECAR_STREAM_INIT="hide") as sidecar:
        for message in ("My name is Ada", "Who am I?"):
            async with sidecar.stream(thread, message) as stream:
                events = await stream.rest()
            assert (events[0].name, events[-1].data["status"]) == ("session", "completed")
            assert [event.number for event in events] == list(range(1, len(events) + 1))
            assert not [event for event in events if event.data.get("subtype") == "init"]
            assert str(sidecar.home) not in stream.raw


async def test_the_cli_is_told_nothing_of_ours(a_sidecar: Make, thread: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    async with a_sidecar(NOTIFY_SOCKET="@nowhere", SIDECAR_HOSTS="secret.test", SIDECAR_WARM_SESSIONS="1") as sidecar:
        await sidecar.say(thread, "Hello")
        environ = Path(f"/proc/{await sidecar.process_of(thread)}/environ").read_bytes().split(b"\0")
        told = dict(entry.split(b"=", 1) for entry in environ if entry)
        assert told[b"CLAUDE_CONFIG_DIR"] == str(sidecar.home / "claude").encode()
        assert not [name for name, value in told.items() if name.startswith((b"SIDECAR_", b"NOTIFY_")) and value]


async def test_whatever_is_written_is_the_operators_alone(a_sidecar: Make, thread: str) -> None:
    before = os.umask(0o022)
    try:
        async with a_sidecar(SIDECAR_WARM_SESSIONS="1") as sidecar:
            await sidecar.say(thread, "Hello")
            await sidecar.post("/v1/chat/fork", f"{thread}-fork", from_thread_id=thread)
            found = [path for path in (sidecar.home, *sidecar.home.rglob("*")) if not path.is_symlink()]
            assert any(path.suffix == ".jsonl" for path in found)
            open_to_others = [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]
            assert open_to_others == []
    finally:
        os.umask(before)


async def listening(process: asyncio.subprocess.Process) -> bytes:
    """Wait until a server says that it listens; its line."""
    assert process.stderr is not None
    async with asyncio.timeout(SECONDS):
        while b"running on" not in (line := await process.stderr.readline()):
            assert line, "it ended before it listened"
    return line


@pytest.mark.long
async def test_a_unix_socket_is_for_the_sidecars_own_user(
    tmp_path: Path, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in COLD.items():
        monkeypatch.setenv(name, number)
    path = tmp_path / "sidecar.sock"
    serve = ("serve", "--uds", str(path), "--model", "offline", "--home", str(tmp_path / "home"))
    for _ in range(2):  # a crash leaves the file, and the next start takes it
        process = await asyncio.create_subprocess_exec(PROGRAM, *serve, stderr=asyncio.subprocess.PIPE)
        await listening(process)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=SECONDS) as client:
            body = {"thread_id": thread, "resource_id": "alice", "message": "Hello"}
            answer = await client.post("/v1/chat", json=body, headers={"accept": "application/json"})
            assert answer.json()["text"].startswith("You have said ")
        second = await command("", *serve)
        assert (second.code, f"somebody listens on {path}" in second.err) == (1, True)
        process.kill()
        await process.communicate()
    process = await asyncio.create_subprocess_exec(PROGRAM, *serve, stderr=asyncio.subprocess.PIPE)
    await listening(process)
    process.terminate()
    await process.communicate()
    assert not path.exists()


@pytest.mark.long
async def test_an_address_that_is_not_loopbacks_is_answered_nothing_without_tokens(tmp_path: Path) -> None:
    """However it is started: this is uvicorn's own command line."""
    program = "import sys, uvicorn; uvicorn.run('app:app', host='0.0.0.0', port=0, log_level='info')"
    env = {**os.environ, "SIDECAR_HOME": str(tmp_path / "home"), "SIDECAR_MODEL": "offline"}
    from sys import executable  # noqa: PLC0415

    process = await asyncio.create_subprocess_exec(
        *(executable, "-c", program), cwd=Path(__file__).parent.parent, env=env, stderr=asyncio.subprocess.PIPE
    )
    try:
        line = await listening(process)
        port = int(line.rpartition(b":")[2].split()[0])
        address = await own_address()
        reader, writer = await asyncio.open_connection(address, port)
        writer.write(b"GET /v1/sessions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        assert answer.startswith("HTTP/1.1 421")
        assert json.loads(answer.rpartition("\r\n\r\n")[2])["code"] == "forbidden_host"
        assert "SIDECAR_TOKENS_FILE" in answer
    finally:
        process.terminate()
        await process.communicate()


async def own_address() -> str:
    """An address of this machine that is not loopback's; nothing is sent to find it."""
    import socket  # noqa: PLC0415

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
