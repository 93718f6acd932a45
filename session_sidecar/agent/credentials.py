"""Whether a CLI has a way to a real model: guessed before one was started, and by its own word afterwards."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from session_sidecar.errors import NotConfigured

_VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "CLAUDE_CODE_OAUTH_TOKEN",
              "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY")  # fmt: skip

MISSING = (
    "The CLI has no credentials. Set ANTHROPIC_API_KEY (or CLAUDE_CODE_OAUTH_TOKEN, or what your cloud provider takes) "
    "for the sidecar and start it again; without any, --model offline answers from the built-in stand-in."
)


def credentials_configured(claude_config: Path, environ: Mapping[str, str] | None = None) -> bool:
    """Whether it looks as if the CLI would find a key, a token, a cloud provider, a gateway or a login."""
    environ = os.environ if environ is None else environ
    return any(environ.get(name) for name in _VARIABLES) or (claude_config / ".credentials.json").exists()


def offline_env(url: str) -> dict[str, str]:
    """The environment in which the CLI talks to the stand-in at `url`, whatever this process has in its own."""
    return {**dict.fromkeys(_VARIABLES, ""), "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "offline"}


def check_credentials(info: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Raise NotConfigured if a CLI that has been connected says that it has none.

    `info` is its answer to `initialize`. `account` names the sources of a token and of a key, or another provider than
    Anthropic's own API; of headers that a gateway wants, in ANTHROPIC_CUSTOM_HEADERS, it says nothing (CLI 2.1.330).
    """
    account = info.get("account")
    if account is None or account.get("apiProvider") != "firstParty" or environ.get("ANTHROPIC_CUSTOM_HEADERS"):
        return
    if account.get("tokenSource") == "none" and "apiKeySource" not in account:
        raise NotConfigured(MISSING)
