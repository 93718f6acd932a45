"""`session-sidecar config`: the settings that `serve` would run with, who has said so, and no secret among them."""

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from session_sidecar.cli.config import MASK, config, masked
from session_sidecar.cli.serve import serve
from session_sidecar.settings import Settings, memory_bytes
from tests.terminal import Terminal, command


async def printed(*options: str, **env: str) -> dict[str, dict[str, Any]]:
    """What it says in a pipe, by setting."""
    ended = await command("http://127.0.0.1:1", "config", *options, **env)
    assert ended.code == 0, ended.err
    return {row["setting"]: row for row in map(json.loads, ended.out.splitlines())}


async def test_every_setting_is_told_with_its_value_and_who_has_said_so(tmp_path: Path) -> None:
    rows = await printed("--port", "8001", SIDECAR_PORT="9000", SIDECAR_TURN_SECONDS="60", SIDECAR_HOME=str(tmp_path))
    assert list(rows) == [f"SIDECAR_{name.upper()}" for name in Settings.model_fields]
    told = {name: (row["value"], row["origin"]) for name, row in rows.items()}
    assert told["SIDECAR_PORT"] == (8001, "option")
    assert told["SIDECAR_TURN_SECONDS"] == (60, "environment")
    assert told["SIDECAR_HOME"] == (str(tmp_path), "environment")
    assert told["SIDECAR_MODEL"] == ("live", "default")


async def test_what_the_machine_decides_is_told_as_it_works_out_here() -> None:
    rows = await printed()
    plain = Settings.load({})
    assert rows["SIDECAR_WARM_MEMORY"]["value"] == f"{memory_bytes() // 4 // 2**20}MiB"
    assert rows["SIDECAR_REPLAY_BYTES_TOTAL"]["value"] == plain.replay_bytes_of_all
    assert rows["SIDECAR_HOME"]["value"] == str(Path("var").absolute())
    rows = await printed(SIDECAR_WARM_SESSIONS="0")
    assert (rows["SIDECAR_WARM_SESSIONS"]["value"], rows["SIDECAR_WARM_MEMORY"]["value"]) == (0, None)


@pytest.mark.long
async def test_a_wrong_setting_is_told_as_serve_tells_it() -> None:
    for name in ("config", "serve"):
        ended = await command("", name, SIDECAR_PROT="9000")
        assert (ended.code, ended.out) == (1, "")
        assert ended.err == "Error: SIDECAR_PROT: no such setting; did you mean SIDECAR_PORT?\n"


async def test_nothing_else_of_the_environment_is_told() -> None:
    secrets = {"ANTHROPIC_API_KEY": "sk-ant-s3cret", "SIDECAR_TOKEN": "s3cret", "PGPASSWORD": "s3cret"}
    ended = await command("http://s3cret@127.0.0.1:1", "config", **secrets)
    assert ended.code == 0
    assert "s3cret" not in ended.out + ended.err


async def test_a_person_gets_a_table() -> None:
    async with Terminal("", "config", "--port", "8001") as terminal:
        assert await terminal.ended() == 0
    assert re.search(r"^setting +value +origin *$", terminal.screen, re.MULTILINE)
    assert re.search(r"^SIDECAR_PORT +8001 +option *$", terminal.screen, re.MULTILINE)


def test_it_has_the_options_of_serve() -> None:
    def options(command: click.Command) -> list[str]:
        return [name for parameter in command.params for name in parameter.opts]

    assert options(config) == options(serve)
    assert "--home" in options(config)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("token", "s3cret", MASK),
        ("tokens", "s3cret", MASK),
        ("metrics_api_key", "s3cret", MASK),
        ("signing_secret", "s3cret", MASK),
        ("database_password", "s3cret", MASK),
        ("tokens_file", "/run/secrets/tokens", "/run/secrets/tokens"),
        ("max_tokens", 4096, 4096),
        ("token", None, None),
        ("database", "postgresql://sidecar:s3cret@db:5432/map", f"postgresql://sidecar:{MASK}@db:5432/map"),
        ("database", "postgresql://sidecar:s3/cr@et@db/map", f"postgresql://sidecar:{MASK}@db/map"),
        ("database", "postgresql://sidecar@db/map", "postgresql://sidecar@db/map"),
        ("database", "postgresql://db/map?user=a&password=s3cret&x=1", f"postgresql://db/map?user=a&password={MASK}&x=1"),
        ("database", "host=db password=s3cret user=a", f"host=db password={MASK} user=a"),
        ("origins", "http://localhost:3000 https://chat.example", "http://localhost:3000 https://chat.example"),
        ("origins", ["http://u:s3cret@localhost", "http://b"], [f"http://u:{MASK}@localhost", "http://b"]),
        ("agents", "agents.toml", "agents.toml"),
    ],
)  # fmt: skip
def test_secrets_are_masked(name: str, value: object, told: object) -> None:
    assert masked(name, value) == told
