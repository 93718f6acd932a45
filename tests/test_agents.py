"""Agents are the operator's: named presets of SDK options, checked when the sidecar starts."""

import json
from pathlib import Path

import pytest
from claude_agent_sdk import ClaudeAgentOptions

from session_sidecar.agent.agents import Agents, Launch, safe_options
from session_sidecar.agent.credentials import credentials_configured, offline_env
from session_sidecar.errors import AgentMisconfigured, UnknownAgent
from session_sidecar.settings import SettingsError
from session_store import ThreadKey

KEY = ThreadKey("t1", "alice")
NEW = Launch("11111111-1111-4111-8111-111111111111")


def agents(source: Path | str | None = None) -> Agents:
    return Agents(str(source) if source else None, cwd=Path("/somewhere"), env={"FROM": "sidecar"})


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "agents.toml"


async def options(source: Path | str | None = None, name: str = "default", launch: Launch = NEW) -> ClaudeAgentOptions:
    return await agents(source).options(name, KEY, launch)


async def test_the_default_agent_can_touch_nothing() -> None:
    safe = await options()
    assert safe.tools == []
    assert safe.setting_sources == []
    assert safe.strict_mcp_config
    assert safe.verbatim_prompts
    assert safe.permission_mode == "dontAsk"
    assert safe.include_partial_messages
    assert json.loads(safe.settings or "")["cleanupPeriodDays"] > 10_000


async def test_a_new_session_a_resumed_one_and_a_fork_each_get_their_own_options() -> None:
    new = await options()
    assert (new.session_id, new.resume, new.fork_session) == (NEW.session_id, None, False)
    resumed = await options(launch=Launch("s", resume_from="s"))
    assert (resumed.session_id, resumed.resume, resumed.fork_session) == (None, "s", False)
    fork = await options(launch=Launch("s", resume_from="parent", at="m"))
    assert (fork.session_id, fork.resume, fork.fork_session, fork.resume_session_at) == ("s", "parent", True, "m")


async def test_a_preset_starts_from_the_safe_one_and_changes_what_it_says(toml: Path) -> None:
    toml.write_text('[reader]\nmodel = "m"\ntools = ["Read"]\nenv = { MORE = "1" }\nsettings = { theme = "dark" }\n')
    reader = await options(toml, "reader")
    assert (reader.model, reader.tools, reader.permission_mode) == ("m", ["Read"], "dontAsk")
    assert reader.env["FROM"] == "sidecar"
    assert reader.env["MORE"] == "1"
    settings = json.loads(reader.settings or "")
    assert settings["theme"] == "dark"
    assert "cleanupPeriodDays" in settings
    assert (await options(toml)).tools == []


async def test_an_agent_nobody_defined_is_unknown() -> None:
    with pytest.raises(UnknownAgent):
        agents().check("nobody")
    with pytest.raises(UnknownAgent):
        await options(name="nobody")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[a]\nmodle = "x"', r"\[a\]: modle is no option"),
        ('[a]\nmax_turns = "many"', r"\[a\]: max_turns: "),
        ('[a]\npermission_mode = "yolo"', r"\[a\]: permission_mode: "),
        ('[a]\nresume = "x"', r"\[a\]: resume cannot be set"),
        ("[a]\nfork_session = true", r"\[a\]: fork_session cannot be set"),
        ("[a]\nhooks = {}", r"\[a\]: hooks needs a function"),
        ('model = "x"', r"model is outside a table"),
        ("[a", r"cannot read"),
        ('[a]\nsettings = "{"', r"\[a\]: "),
    ],
)
def test_a_wrong_agents_file_is_refused_with_the_place(toml: Path, text: str, complaint: str) -> None:
    toml.write_text(text)
    with pytest.raises(SettingsError, match=complaint):
        agents(toml)


def test_a_missing_agents_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        agents(tmp_path / "none.toml")


async def test_the_examples_are_agents_that_start(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parent.parent / "examples" / "agents.toml"
    assert (await options(example)).max_turns == 1
    assert (await options(example, "reader")).allowed_tools == ["Read", "Grep", "Glob"]


def asked(key: ThreadKey, name: str) -> ClaudeAgentOptions:
    if name != "mine":
        raise LookupError(name)
    return safe_options(system_prompt=f"You serve {key.resource_id}.")


async def asked_slowly(key: ThreadKey, name: str) -> ClaudeAgentOptions:
    return asked(key, "mine")


def greedy(key: ThreadKey, name: str) -> ClaudeAgentOptions:
    return ClaudeAgentOptions(resume="something", fork_session=True)


def confused(key: ThreadKey, name: str) -> str:
    return "options"


def broken(key: ThreadKey, name: str) -> ClaudeAgentOptions:
    raise RuntimeError("secret")


async def test_a_function_answers_for_key_and_name() -> None:
    assert (await options("tests.test_agents:asked", "mine")).system_prompt == "You serve alice."
    assert (await options("tests.test_agents:asked_slowly")).system_prompt == "You serve alice."
    with pytest.raises(UnknownAgent):
        await options("tests.test_agents:asked", "nobody")


@pytest.mark.parametrize(
    ("function", "complaint"),
    [("greedy", "cannot set fork_session, resume"), ("confused", "must return"), ("broken", "raised RuntimeError")],
)
async def test_a_function_that_fails_is_the_operators_to_mend(function: str, complaint: str) -> None:
    with pytest.raises(AgentMisconfigured, match=complaint) as caught:
        await options(f"tests.test_agents:{function}")
    assert "secret" not in caught.value.detail


@pytest.mark.parametrize("source", ["no.such.module:f", "tests.test_agents:nothing", "tests.test_agents:KEY"])
def test_a_function_that_is_not_there_is_refused_at_start(source: str) -> None:
    with pytest.raises(SettingsError, match="SIDECAR_AGENTS"):
        agents(source)


def test_offline_takes_the_place_of_every_credential(tmp_path: Path) -> None:
    assert not credentials_configured(tmp_path, {})
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK"):
        assert credentials_configured(tmp_path, {name: "x"})
        assert offline_env("http://127.0.0.1:1")[name] in ("", "offline")
    (tmp_path / ".credentials.json").touch()
    assert credentials_configured(tmp_path, {})
