"""Whoever reads is worked for as long as they are there."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response

Endpoint = Callable[[Request], Awaitable[Response]]


def for_a_reader(endpoint: Endpoint) -> Endpoint:
    """An endpoint that changes nothing, and so is left where it is when its client has gone."""

    @wraps(endpoint)
    async def serve(request: Request) -> Response:
        answer, gone = asyncio.ensure_future(endpoint(request)), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=499)  # nobody reads this, but the log has nginx's status
            return answer.result()
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.wait((answer, gone))

    return serve


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
