"""A page of a list with what the transcripts tell, as a frontend asks for it: read for the first time, and again."""

import os
import time
from pathlib import Path

from bench.names import AGAIN, FIRST
from bench.samples import Samples
from bench.seeds import Seeds
from bench.servers import quiet, sidecar, stand_in

THREADS, MESSAGES = 50, 100
TIMES = 5  # asked again


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """In each round the transcripts have changed: the first answer reads them all."""
    async with stand_in(home / "model.log") as model, sidecar(home / "lists", model.url) as server:
        seeds = Seeds(home / "seeds" / "claude", home / "seeds" / "workspace", model.url)
        await seeds.make(MESSAGES)
        config = home / "lists" / "claude"
        for number in range(THREADS):
            session_id = seeds.copy(MESSAGES, config, home / "lists" / "workspace")
            key = {"thread_id": str(number), "resource_id": "bench"}
            (await server.http.put("/v1/session", json={**key, "sdk_session_id": session_id})).raise_for_status()
        page = {"resource_id": "bench", "limit": str(THREADS), "include": "metadata"}
        for _ in range(rounds):
            for transcript in config.glob("projects/*/*.jsonl"):
                os.utime(transcript)
            await quiet()
            for number in range(1 + TIMES):
                began = time.perf_counter()
                answer = await server.http.get("/v1/sessions", params=page)
                took = (time.perf_counter() - began) * 1000
                told = [session["metadata"]["last_message"] for session in answer.json()["data"]]
                if len(told) != THREADS or not all(told):
                    raise RuntimeError(f"a page without what the transcripts tell: {told}")
                samples.add("list", AGAIN if number else FIRST, "ms", took)
