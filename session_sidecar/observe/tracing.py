"""A span for each turn, for operators who have set OpenTelemetry up; nothing is set up here, and nothing sent.

By the conventions for agents, which are in development still: open-telemetry/semantic-conventions-genai on GitHub,
docs/gen-ai/gen-ai-agent-spans.md, "Invoke agent internal span". The conversation is the SDK's session: a random ID
that the CLI's own spans have too. Threads and resources are the caller's names of people and their affairs, and stay
out of traces.

The SDK passes the context in which it connects a process on to it; `agent/processes/starts.py` says to which processes.
"""

import contextlib
import time
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Protocol

from opentelemetry import context, propagate, trace

from session_sidecar import __version__
from session_sidecar.observe.metrics import Usage

_tracer = trace.get_tracer("session_sidecar", __version__)  # whoever sets a provider up later has its spans, too


class Traced(Protocol):
    """What is asked of a turn."""

    usage: dict[str, Usage]
    times: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """The turn in its log line."""


@contextlib.contextmanager
def as_the_caller_says(headers: Mapping[str, str]) -> Iterator[None]:
    """What is begun in this block is part of the trace that a request's `traceparent` names.

    Where an instrumentation of the server has a span for the request already, it is part of that.
    """
    if "traceparent" not in headers or trace.get_current_span().get_span_context().is_valid:
        yield
        return
    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)


async def in_a_span(turn: Traced, agent: str, story: Coroutine[Any, Any, None]) -> None:
    """Run a turn's story, in a span that says how it ended."""
    attributes = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.agent.name": agent,
    }
    with _tracer.start_as_current_span(f"invoke_agent {agent}", attributes=attributes) as span:
        await story
        if span.is_recording():
            _describe(span, turn)


def _describe(span: trace.Span, turn: Traced) -> None:
    summary, used = turn.summary(), turn.usage.values()
    span.set_attributes(
        {
            f"session_sidecar.turn.{name}": summary[name]
            for name in ("status", "outcome", "origin", "process")
            if summary[name] is not None
        }
    )
    span.set_attribute("session_sidecar.turn.id", summary["turn_id"])
    if summary["sdk_session_id"] is not None:
        span.set_attribute("gen_ai.conversation.id", summary["sdk_session_id"])
    if used:
        cache_read, cache_creation = sum(u.cache_read for u in used), sum(u.cache_creation for u in used)
        span.set_attribute("gen_ai.usage.input_tokens", sum(u.input for u in used) + cache_read + cache_creation)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", cache_read)
        span.set_attribute("gen_ai.usage.cache_creation.input_tokens", cache_creation)
        span.set_attribute("gen_ai.usage.output_tokens", sum(u.output for u in used))
    if "first_delta" in turn.times:
        span.set_attribute("gen_ai.response.time_to_first_chunk", turn.times["first_delta"] - turn.times["asked"])
    for stage in ("running", "init", "first_delta"):
        if stage in turn.times:
            ago = time.monotonic() - turn.times[stage]
            span.add_event(stage, timestamp=time.time_ns() - round(ago * 1e9))
    if summary["status"] == "failed" or summary["code"] is not None:
        span.set_attribute("error.type", summary["code"] or "_OTHER")
        span.set_status(trace.StatusCode.ERROR, summary["code"])
