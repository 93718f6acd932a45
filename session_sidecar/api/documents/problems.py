"""Which problems a call can have: its own, and those of all calls of its kind.

`python -m session_sidecar.api.documents.problems > docs/problems.md` writes the list of them.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from session_sidecar import errors
from session_sidecar.api.http import Call, Nothing
from session_sidecar.errors import SidecarError

Calls = Callable[[Call[Any]], bool]


def _has_the_thread(call: Call[Any]) -> bool:
    """Whether a call is for the replica that has a thread, where there are several."""
    asked_there = call.method != "GET" or call.path == "/v1/chat" or call.of_header
    return "resource_id" in call.asks.model_fields and asked_there


# What is the same for all calls of a kind. Most of it is told before a call is looked at.
_COMMON: tuple[tuple[Calls, tuple[type[SidecarError], ...]], ...] = (
    (lambda _: True, (errors.ForbiddenHost, errors.ForbiddenOrigin, errors.HeaderTooLarge, errors.InternalError)),
    (lambda _: True, (errors.RequestTimeout,)),
    (lambda call: call.admits != "anybody", (errors.Unauthorized,)),
    (lambda call: call.admits == "token" and "resource_id" in call.asks.model_fields, (errors.SessionNotFound,)),
    (lambda call: call.method != "GET", (errors.ReadOnlyToken,)),
    (_has_the_thread, (errors.HeldElsewhere,)),
    (lambda call: _has_the_thread(call) and call.has_body, (errors.AnswerLost,)),
    (lambda call: call.admits in {"unrestricted", "metrics"}, (errors.UnrestrictedOnly,)),
    (lambda call: call.asks is not Nothing, (errors.InvalidRequest,)),
    (lambda call: call.has_body, (errors.InvalidJson, errors.UnsupportedMediaType)),
    (lambda call: call.has_body, (errors.BodyTooLarge, errors.TooManyUploads)),
    (lambda call: call.path.startswith("/v1/") or call.path == "/readyz", (errors.StoreFailed,)),
)
# What no call has, but a request that is none.
OF_NO_CALL: tuple[type[SidecarError], ...] = (errors.NotFound, errors.MethodNotAllowed)


def problems_of(call: Call[Any]) -> list[type[SidecarError]]:
    """Every problem that a call can be answered with, by status."""
    common = [problem for applies, problems in _COMMON if applies(call) for problem in problems]
    return sorted({*call.problems, *common}, key=_in_order)


def title(problem: type[SidecarError]) -> str:
    """What it says in one line."""
    return (problem.__doc__ or "").strip()


def page(calls: Iterable[Call[Any]]) -> str:
    """docs/problems.md: each code, its status and title, and which calls have it."""
    having: dict[type[SidecarError], list[str]] = {problem: [] for problem in OF_NO_CALL}
    names = []
    for call in calls:
        names.append(f"`{call.method} {call.path}`")
        for problem in problems_of(call):
            having.setdefault(problem, []).append(names[-1])
    rows = (
        f"| `{problem.code}` | {problem.status} | {title(problem)} | {_listed(having[problem], names)} |"
        for problem in sorted(having, key=_in_order)
    )
    return _PAGE.format(rows="\n".join(rows))


def _listed(having: list[str], names: list[str]) -> str:
    if not having:
        return "none: there is no such call"
    if len(having) == len(names):
        return "all"
    if len(having) > len(names) // 2:
        return "all but " + ", ".join(name for name in names if name not in having)
    return ", ".join(having)


def _in_order(problem: type[SidecarError]) -> tuple[int, str]:
    return problem.status, problem.code


_PAGE = """\
# Problems

Errors are `application/problem+json` (RFC 9457) with a stable `code`: that is what programs go by. `detail` says what
was wrong and what to do, `request_id` is in the server's log too, `retry_after` (seconds) is the `Retry-After` header.
The `error` of an `end` event has the same members, but for the `request_id`.

| code | status | title | calls |
|---|---|---|---|
{rows}

Written by `python -m session_sidecar.api.documents.problems > docs/problems.md`.
"""

if __name__ == "__main__":
    from session_sidecar.api.routes import CALLS

    sys.stdout.write(page(CALLS))
