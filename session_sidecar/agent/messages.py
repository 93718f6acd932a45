"""What the SDK's messages say about a turn's answer."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from session_sidecar.agent.credentials import MISSING
from session_sidecar.errors import AgentFailed, ApiFailed, NotConfigured, SidecarError, TurnLimit
from session_sidecar.observe.metrics import Usage

UNAUTHORIZED = (401,)
SURE = 2  # refusals, after which credentials are wrong and not only old

Message = dict[str, Any]
"""One SDK message as the CLI emitted it: what the TypeScript SDK documents as `SDKMessage`."""

Tokens = Annotated[int, Field(ge=0)]


class _ModelUsage(BaseModel):
    """What a result says of one model."""

    input: Tokens = Field(alias="inputTokens")
    output: Tokens = Field(alias="outputTokens")
    cache_read: Tokens = Field(alias="cacheReadInputTokens")
    cache_creation: Tokens = Field(alias="cacheCreationInputTokens")
    cost: float = Field(alias="costUSD", ge=0, allow_inf_nan=False)


_usage_by_model = TypeAdapter(dict[str, _ModelUsage])


def says_session(message: Message) -> bool:
    """Whether this message's `session_id` is to be believed: `init` has the turn's, a reset the one it leaves.

    No other is: the error results of a failed resume, for one, carry fresh IDs that mean nothing.
    """
    return message["type"] == "conversation_reset" or is_init(message)


def is_init(message: Message) -> bool:
    """Whether it is the `system` message with which a turn begins; it names paths, tools and the version."""
    return message["type"] == "system" and message.get("subtype") == "init"


def text_of(message: Message) -> str:
    """The text of an `assistant` message of the main thread; empty for a subagent's and for tool calls alone."""
    if message.get("parent_tool_use_id") is not None:
        return ""
    content = message["message"].get("content", [])
    return "".join(block.get("text", "") for block in content if block.get("type") == "text")


def usage_of(result: Message) -> dict[str, Usage]:
    """What has been used by model since the result before this one; empty where the CLI is too old to say that.

    It is the one figure that can be summed up: `total_cost_usd` and `modelUsage` grow over a session's turns, and a
    fork begins with its parent's; `usage` leaves subagents out. The CLI describes it so in its schema of messages.
    """
    try:
        said = _usage_by_model.validate_python(result.get("model_usage_since_last_result", {}))
    except ValidationError:
        return {}
    return {model: Usage(**used.model_dump()) for model, used in said.items()}


def refused_of(retry: Message) -> SidecarError | None:
    """What to end a turn with that the API refuses whoever asks again; None of any other message.

    The first attempt's refusal may be of a token that the CLI then gets anew; it would go on for seconds or minutes.
    """
    status = retry.get("error_status")
    if retry.get("subtype") != "api_retry" or status not in UNAUTHORIZED or retry.get("attempt", 0) < SURE:
        return None
    return ApiFailed(
        f"The model's API answered {status}: it does not take the sidecar's credentials. The message is in the "
        "history.",
        api_status=status,
    )


def failure_of(result: Message, last_retry: Message | None = None, said: str | None = None) -> SidecarError | None:
    """The error that a `result` message reports, from its fields and never from its prose; None for a success.

    `last_retry` is the newest `api_retry` message of the turn: the only place where a Retry-After of the API shows.
    `said` is the `error` of the newest `assistant` message: `authentication_failed` with no status of the API is the
    CLI's own, of a login that is missing or has expired.
    """
    if not result.get("is_error"):
        return None
    if (status := result.get("api_error_status")) is not None:
        again = last_retry and status not in UNAUTHORIZED and last_retry.get("error_status") == status
        delay = last_retry.get("retry_delay_ms") if last_retry and again else None
        return ApiFailed(
            f"The model's API answered {status}. The message is in the history.",
            api_status=status,
            retry_after=math.ceil(delay / 1000) if delay else None,
        )
    reason = result.get("terminal_reason")
    if reason == "api_error" and said == "authentication_failed":
        return NotConfigured(f"{MISSING} The message is in the history.")
    if reason == "api_error":
        return ApiFailed("The model's API could not be reached or broke off. The message is in the history.")
    subtype = str(result.get("subtype"))
    if subtype.startswith("error_max_"):
        return TurnLimit(f"The agent's {subtype.removeprefix('error_')} was reached; what it did so far is kept.")
    return AgentFailed(f"The agent ended with {subtype} ({reason}).")
