"""`make bench`: everything is measured in one run, side by side. Parts can be named: `python -m bench latency`.

Those of ALONE are no part of it. Each has figures of its own, which a run of it alone puts into `results.json`.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import uvloop

from bench.report import conditions, draw, keep, tell
from bench.samples import Samples

ROUNDS = {"latency": 15, "throughput": 3, "deltas": 5, "mappings": 5, "replicas": 3}
ALONE = {"sizing": 1, "live": 1, "stampede": 1, "memory": 1, "lists": 5, "start": 5}
HERE = Path(__file__).parent


async def main(parts: list[str]) -> None:
    """Run the parts, one after another; a whole run replaces the figures and the picture that are kept here."""
    samples, run = Samples(), conditions()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        for part in parts:
            home = Path(directory) / part
            home.mkdir()
            print(f"measuring {part} …", flush=True)
            await importlib.import_module(f"bench.{part}").measure(home, samples, (ROUNDS | ALONE)[part])
    tell(samples, run)
    if parts == list(ROUNDS):
        keep(samples, run, HERE / "results.json")
        draw(samples, HERE / "results.png")
    elif set(parts) <= set(ALONE):
        keep(samples, run, HERE / "results.json", alone=parts)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:] or list(ROUNDS)))
