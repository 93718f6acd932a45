"""A conversation as the AI SDK's `UIMessage`s: one of the user's for a prompt, and one of the assistant's for its turn.

They have the IDs and the parts that the turn's stream gave them; what the CLI has added of its own is left out.
"""

import urllib.parse
from collections.abc import Iterator
from typing import Any

from session_sidecar.api.calls.ai_sdk.parts import (
    NO_RESULT,
    TOOLS,
    Json,
    answer_id,
    dumped,
    is_result,
    of_thinking,
    output,
)
from session_sidecar.sessions.chats import Exchange


def written(thread_id: str, exchange: Exchange) -> str:
    """An exchange as its messages, between commas."""
    messages = []
    if exchange.prompt is not None:
        content = exchange.prompt.message.get("content")
        messages.append(user(thread_id, exchange.name, content if isinstance(content, list) else str(content)))
    parts = list(_answer(exchange))
    if parts:
        told = {"threadId": thread_id, "messageUuid": exchange.end}
        if exchange.prompt is not None:
            told["turnId"] = exchange.name
        messages.append({"id": answer_id(exchange.name), "role": "assistant", "metadata": told, "parts": parts})
    return ",".join(dumped(message) for message in messages)


def user(thread_id: str, turn_id: str, content: str | list[Any]) -> Json:
    """What a person has said."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [part for block in blocks if isinstance(block, dict) for part in _said(block)]
    told = {"threadId": thread_id, "turnId": turn_id}
    return {"id": turn_id, "role": "user", "metadata": told, "parts": parts or [{"type": "text", "text": ""}]}


def _said(block: Json) -> Iterator[Json]:
    if block.get("type") == "text":
        yield {"type": "text", "text": block["text"]}
    elif isinstance(source := block.get("source"), dict):
        image = block.get("type") == "image"
        media = source.get("media_type") or ("image/*" if image else "application/pdf")
        match source.get("type"):
            case "base64":
                url = f"data:{media};base64,{source.get('data')}"
            case "text":
                url = f"data:{media};charset=utf-8,{urllib.parse.quote(str(source.get('data')))}"
            case "url":
                url = str(source.get("url"))
            case _:
                return  # a file of the API's, which a page cannot show
        named = {"filename": block["title"]} if block.get("title") else {}
        yield {"type": "file", "mediaType": media, "url": url, **named}


def _answer(exchange: Exchange) -> Iterator[Json]:
    results: dict[str, Json] = {}
    said = exchange.messages[1:] if exchange.prompt is not None else exchange.messages
    contents = [(message, message.message.get("content")) for message in said]
    for _, content in contents:
        if isinstance(content, list):
            results |= {str(b.get("tool_use_id")): output(b) for b in content if isinstance(b, dict) and is_result(b)}
    reply = None
    for message, content in contents:
        if message.type == "user" or message.synthetic or not isinstance(content, list):
            continue
        if message.reply != reply or reply is None:
            reply = message.reply
            yield {"type": "step-start"}
        for block in content:
            yield from _part(block, results)


def _part(block: Json, results: dict[str, Json]) -> Iterator[Json]:
    match block.get("type"):
        case "text":
            yield {"type": "text", "text": block["text"], "state": "done"}
        case "thinking" | "redacted_thinking":
            yield {"type": "reasoning", "text": block.get("thinking", ""), "state": "done", **of_thinking(block)}
        case kind if kind in TOOLS:
            result = results.get(block["id"], {"errorText": NO_RESULT})
            yield {
                "type": "dynamic-tool",
                "toolName": block["name"],
                "toolCallId": block["id"],
                "state": "output-available" if "output" in result else "output-error",
                "input": block["input"],
                "providerExecuted": True,
                **result,
            }
