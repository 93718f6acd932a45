"""What schemathesis leaves out: tests/schemathesis.toml names it."""

from typing import Any

import schemathesis

BEGIN_TURNS = ("POST /v1/chat", "POST /v1/chat/fork", "POST /v1/ai-sdk/chat")
HAS_NO_END = "GET /v1/events"


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Nothing valid for what begins turns or has no end: a negated header may come out as a good one."""
    valid = case.meta is not None and case.meta.generation.mode.is_positive
    return not (valid and case.operation.label in (*BEGIN_TURNS, HAS_NO_END))
