"""The process that reads long transcripts: jobs come in on stdin, answers go out on stdout. See pool.py.

It ends with the sidecar, at once and whatever becomes of that: stdin ends then.
"""

import gc
import os
import pickle
import queue
import sys
import threading
from typing import BinaryIO

from session_sidecar.agent.transcripts.reading.readers import LENGTH_BYTES


def main() -> None:
    """Take jobs until there is nobody any more to give any."""
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nobody may print between the answers
    if sys.platform == "linux":  # turns go first: of this it takes what is left
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)
    threading.Thread(target=_work, args=(jobs, answers), daemon=True).start()
    while length := sys.stdin.buffer.read(LENGTH_BYTES):
        jobs.put(sys.stdin.buffer.read(int.from_bytes(length)))
    os._exit(0)  # a job that is under way ends here too


def _work(jobs: "queue.SimpleQueue[bytes]", answers: BinaryIO) -> None:
    while True:
        # A long history is many objects, of which nothing is garbage before it is read.
        gc.disable()
        answer = pickle.dumps(_answer(jobs.get()))
        answers.write(len(answer).to_bytes(LENGTH_BYTES) + answer)
        answers.flush()
        gc.enable()
        gc.collect()


def _answer(job: bytes) -> tuple[object, Exception | None]:
    try:
        work, args = pickle.loads(job)  # noqa: S301 - from our own sidecar
        return work(*args), None
    except Exception as error:
        return None, error.with_traceback(None)


if __name__ == "__main__":
    main()
