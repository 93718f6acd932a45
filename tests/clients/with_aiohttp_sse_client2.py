"""aiohttp-sse-client2: it repeats its POST with the ID of the last event, once somebody catches what aiohttp raises."""

import asyncio
import json
import sys

from aiohttp import ClientPayloadError
from aiohttp_sse_client2.client import EventSource


async def main(url: str, body: str) -> None:
    source = EventSource(f"{url}/v1/chat", option={"method": "POST"}, json=json.loads(body))
    async with source:
        while True:
            try:
                async for event in source:
                    print(event.last_event_id, event.type, flush=True)
                    if event.type == "end":
                        return
            except ClientPayloadError:
                await source.connect(1)


asyncio.run(main(*sys.argv[1:]))
