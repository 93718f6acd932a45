"""One turn over httpx, to its end, however often the connection breaks: follow_httpx.py URL BODY."""

import json
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, connect_sse


def follow(url: str, body: Any) -> Iterator[ServerSentEvent]:
    """The events of the turn, each once. Raises RuntimeError with the problem's code where the sidecar refuses it."""
    # The key covers a break before the first event, the ID of the last event every later one.
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    timeout = httpx.Timeout(10)  # a comment comes every three seconds, so silence means that the connection is dead
    with httpx.Client(base_url=url, timeout=timeout) as client:
        while True:
            try:
                with connect_sse(client, "POST", "/v1/chat", json=body, headers=headers) as source:
                    if source.response.status_code == 204:
                        return  # nothing is left; `iter_sse` would raise an SSEError for want of a content type
                    if source.response.status_code != 200:
                        raise RuntimeError(json.loads(source.response.read())["code"])
                    for event in source.iter_sse():
                        headers["Last-Event-ID"] = event.id
                        yield event
                        if event.event == "end":
                            return
            except httpx.TransportError as error:
                print(f"the connection broke ({type(error).__name__}); going on", file=sys.stderr)
            time.sleep(0.5)


if __name__ == "__main__":
    for event in follow(sys.argv[1], json.loads(sys.argv[2])):
        print(event.id, event.event, flush=True)
