"""What the SDK's messages say about a turn's answer."""

import math
from typing import Any

from session_sidecar.errors import AgentFailed, ApiFailed, SidecarError, TurnLimit

Message = dict[str, Any]
"""One SDK message as the CLI emitted it: what the TypeScript SDK documents as `SDKMessage`."""


def says_session(message: Message) -> bool:
    """Whether this message's `session_id` is to be believed: `init` has the turn's, a reset the one it leaves.

    No other is: the error results of a failed resume, for one, carry fresh IDs that mean nothing.
    """
    kind = message["type"]
    return kind == "conversation_reset" or (kind == "system" and message.get("subtype") == "init")


def text_of(message: Message) -> str:
    """The text of an `assistant` message of the main thread; empty for a subagent's and for tool calls alone."""
    if message.get("parent_tool_use_id") is not None:
        return ""
    content = message["message"].get("content", [])
    return "".join(block.get("text", "") for block in content if block.get("type") == "text")


def failure_of(result: Message, last_retry: Message | None = None) -> SidecarError | None:
    """The error that a `result` message reports, from its fields and never from its prose; None for a success.

    `last_retry` is the newest `api_retry` message of the turn: the only place where a Retry-After of the API shows.
    """
    if not result.get("is_error"):
        return None
    if (status := result.get("api_error_status")) is not None:
        delay = last_retry.get("retry_delay_ms") if last_retry and last_retry.get("error_status") == status else None
        return ApiFailed(
            f"The model's API answered {status}. The message is in the history.",
            api_status=status,
            retry_after=math.ceil(delay / 1000) if delay else None,
        )
    reason = result.get("terminal_reason")
    if reason == "api_error":
        return ApiFailed("The model's API could not be reached or broke off. The message is in the history.")
    subtype = str(result.get("subtype"))
    if subtype.startswith("error_max_"):
        return TurnLimit(f"The agent's {subtype.removeprefix('error_')} was reached; what it did so far is kept.")
    return AgentFailed(f"The agent ended with {subtype} ({reason}).")
