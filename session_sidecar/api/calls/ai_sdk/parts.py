"""What a stream and a history have in common: the IDs and the parts of the AI SDK's messages.

Only fields and types that 5.0.277, 6.0 and 7.0 all take.
"""

import json
from typing import Any

Json = dict[str, Any]

NO_RESULT = "There was no result when the turn ended."
ANSWER = "-answer"
TOOLS = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
# The agent runs them: without `providerExecuted` the client would send their results, and begin a turn with that.
RUN_HERE = {"dynamic": True, "providerExecuted": True}


def dumped(value: object) -> str:
    """JSON in one line of ASCII: half an emoji is no UTF-8, but can be escaped."""
    return json.dumps(value, separators=(",", ":"))


def answer_id(name: str) -> str:
    """The ID of the message that answers the prompt of this name: the user's message has the name itself as its ID."""
    return name + ANSWER


def is_result(block: Json) -> bool:
    """Whether a block of a message is the result of a tool, of the agent's own or of one that the API has run."""
    return str(block.get("type")).endswith("tool_result")


def output(block: Json) -> Json:
    """What a tool's result is: `output`, or `errorText` where it failed."""
    content = block.get("content")
    if isinstance(content, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in content):
        content = "\n".join(one["text"] for one in content)
    if not block.get("is_error"):
        return {"output": "" if content is None else content}
    return {"errorText": content if isinstance(content, str) else dumped(content)}


def of_thinking(block: Json) -> Json:
    """What goes with the text of a `thinking` block, or takes the place of it."""
    if block.get("type") == "redacted_thinking":
        return {"providerMetadata": {"anthropic": {"redactedData": block.get("data", "")}}}
    signature = block.get("signature")
    return {"providerMetadata": {"anthropic": {"signature": signature}}} if signature else {}


def usage(result: Json) -> Json:
    """The tokens of a turn, of an SDK's result message."""
    used = result.get("usage") or {}
    names = {
        "inputTokens": "input_tokens",
        "outputTokens": "output_tokens",
        "cacheReadInputTokens": "cache_read_input_tokens",
        "cacheCreationInputTokens": "cache_creation_input_tokens",
    }
    return {name: used[theirs] for name, theirs in names.items() if isinstance(used.get(theirs), int)}


def without_nulls(message: Json, *but: str) -> Json:
    """A message without some of its members, and without those that are null."""
    return {name: value for name, value in message.items() if value is not None and name not in but}
