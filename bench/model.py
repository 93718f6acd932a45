"""The stand-in for the Messages API as a process of its own, so that its work is on nobody's account."""

import asyncio
import re
from collections.abc import AsyncIterator

import uvloop
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from session_sidecar.offline.model import OfflineModel, frames
from session_sidecar.offline.reply import Json, prompts, text_block

_DELTAS = re.compile(r"(\d+) deltas")


class Model(OfflineModel):
    """Answers at once; a last prompt like "2000 deltas" is answered with so many, as fast as they can be sent."""

    async def reply(self, request: Request, body: Json) -> Response:
        """Answer one request."""
        said = prompts(body["messages"])
        wanted = _DELTAS.search(said[-1]) if said and body.get("stream") else None
        if wanted is None:
            return await super().reply(request, body)
        return StreamingResponse(_stream(body, int(wanted[1])), media_type="text/event-stream")


async def _stream(body: Json, deltas: int) -> AsyncIterator[str]:
    for frame in frames(body, [text_block("word " * deltas)]):
        yield frame


async def main() -> None:
    """Serve until the process is ended."""
    async with Model() as model:
        print(f"running on {model.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
