"""What an operator has forgotten is said: at the start, by /readyz, and to the turn that meets it."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import FaultyModel, fail
from tests.server import SECONDS, Sidecar, gone

Make = Callable[..., Sidecar]
NONE = {"ANTHROPIC_BASE_URL": "", "ANTHROPIC_API_KEY": ""}
LOGIN = {"accessToken": "a", "refreshToken": "b", "expiresAt": 4_102_444_800_000, "scopes": ["user:inference"]}


def log_in(home: Path) -> None:
    """As `claude /login` in the home's config directory leaves it."""
    (home / "claude" / ".credentials.json").write_text(json.dumps({"claudeAiOauth": LOGIN}))


@pytest.mark.parametrize("spares", ["0", "1"])
async def test_without_credentials_a_turn_is_told_so_and_nothing_is_begun(
    a_sidecar: Make, thread: str, spares: str
) -> None:
    async with a_sidecar(**NONE, SIDECAR_SPARE_PROCESSES=spares) as sidecar:
        assert any("no credentials were found" in line for line in sidecar.log)
        unready = await sidecar.http.get("/readyz")
        assert (unready.status_code, unready.json()["code"]) == (503, "not_configured")
        refused = await sidecar.chat(thread, "Hello")
        assert (refused.status_code, refused.json()["code"]) == (503, "not_configured")
        assert "ANTHROPIC_API_KEY" in refused.json()["detail"]
        assert "/login" not in refused.text
        assert (await sidecar.session(thread)).status_code == 404
        await sidecar.until_logged("turn", thread_id=thread, code="not_configured", level="warning")
        assert await gone(sidecar.cli_processes(), SECONDS)  # a spare may have been tried once more
        assert list(sidecar.home.glob("claude/projects/*/*.jsonl")) == []


@pytest.mark.usefixtures("home")
async def test_a_known_thread_without_credentials_keeps_its_session(a_sidecar: Make) -> None:
    async with a_sidecar(**NONE) as sidecar:
        before = await sidecar.session("t1")
        assert before.status_code == 200
        assert (await sidecar.chat("t1", "Who am I?")).json()["code"] == "not_configured"
        assert (await sidecar.session("t1")).json() == before.json()
    async with a_sidecar() as sidecar:
        assert "First: My name is Ada" in await sidecar.say("t1", "Who am I?")


async def test_a_login_that_comes_later_is_noticed_without_a_restart(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar(**NONE | {"ANTHROPIC_BASE_URL": model.url}) as sidecar:
        assert (await sidecar.chat(thread, "Hello")).json()["code"] == "not_configured"
        log_in(sidecar.home)
        assert await sidecar.say(thread, "Hello") == "You have said 1 thing: Hello"
        assert (await sidecar.http.get("/readyz")).status_code == 200


async def test_one_agent_with_credentials_is_enough_to_be_ready(
    a_sidecar: Make, thread: str, tmp_path: Path, model: FaultyModel
) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text(f'[keyed]\nenv = {{ ANTHROPIC_API_KEY = "k", ANTHROPIC_BASE_URL = "{model.url}" }}\n')
    async with a_sidecar("--agents", str(agents), **NONE) as sidecar:
        assert (await sidecar.chat(thread, "Hello")).json()["code"] == "not_configured"
        assert await sidecar.say(thread, "Hello", agent="keyed") == "You have said 1 thing: Hello"
        assert (await sidecar.http.get("/readyz")).status_code == 200


@pytest.mark.usefixtures("home")
async def test_wrong_credentials_are_told_at_once_and_not_to_be_tried_again(
    a_sidecar: Make, model: FaultyModel
) -> None:
    async with a_sidecar(CLAUDE_CODE_MAX_RETRIES="10") as sidecar:
        model.default = fail(401)
        asked, began = len(model.requests), time.monotonic()
        refused = await sidecar.chat("t1", "Hello")
        assert (refused.status_code, refused.json()["code"]) == (502, "api_error")
        assert refused.json()["api_status"] == 401
        assert "retry-after" not in refused.headers
        assert "retry_after" not in refused.json()
        assert len(model.requests) - asked == 2
        assert time.monotonic() - began < 5
        line = await sidecar.until_logged("turn", thread_id="t1", code="api_error")
        assert (line["level"], line["api_status"], line["status"]) == ("warning", 401, "failed")
        model.reset()
        assert "First: My name is Ada" in await sidecar.say("t1", "Who am I?")
        assert ("user", "Hello") in await sidecar.history("t1")


async def test_a_turn_that_completes_is_no_warning(sidecar: Sidecar, thread: str) -> None:
    await sidecar.say(thread, "Hello")
    line = await sidecar.until_logged("turn", thread_id=thread)
    assert (line["level"], line["api_status"]) == (logging.getLevelName(logging.INFO).lower(), None)


async def test_a_cli_that_is_not_there_is_no_readiness(a_sidecar: Make, thread: str, tmp_path: Path) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text(f'[default]\ncli_path = "{tmp_path}/nowhere"\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        unready = await sidecar.http.get("/readyz")
        assert (unready.status_code, unready.json()["code"]) == (502, "agent_start_failed")
        assert (await sidecar.http.get("/version")).json()["cli"] is None
        assert (await sidecar.http.get("/healthz")).status_code == 200
        (tmp_path / "nowhere").symlink_to(cli())
        assert (await sidecar.http.get("/readyz")).status_code == 200


def cli() -> Path:
    import claude_agent_sdk  # noqa: PLC0415

    return Path(claude_agent_sdk.__path__[0]) / "_bundled" / "claude"
