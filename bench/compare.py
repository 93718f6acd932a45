"""`make bench-compare`: the figures of `results.json` beside those that were kept of the last version.

Each is the ratio of the two medians. It is within noise where the quartiles overlap: half of the figures of either run
lie between them. Where what the sidecar is compared with has changed as much, it was the machine.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.samples import Samples

HERE = Path(__file__).parent
MORE_IS_BETTER = ("a second", "warm, %")  # how the names of such figures end


class Change(NamedTuple):
    """What became of one figure."""

    name: str
    then: str  # the median, and its quartiles
    now: str
    ratio: float  # now / then
    verdict: str  # better, worse, or within noise


def changes(now: Samples, then: Samples) -> Iterator[Change]:
    """Each figure that both have."""
    for name in now.all:
        if name in then.all:
            part, who, what = name.split(" | ")
            mine, theirs = now.all[name], then.all[name]
            before, after = statistics.median(theirs), statistics.median(mine)
            ratio = after / before if before else float(after == before)
            (low, high), (their_low, their_high) = _quartiles(mine), _quartiles(theirs)
            better = after > before if what.endswith(MORE_IS_BETTER) else after < before
            verdict = "within noise" if low <= their_high and their_low <= high else "better" if better else "worse"
            yield Change(name, then.told(part, who, what), now.told(part, who, what), ratio, verdict)


def _quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third; of a single figure, itself."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def kept(directory: Path) -> list[Path]:
    """The figures that were kept of versions, the oldest first."""
    return sorted(directory.glob("*.json"), key=lambda path: [int(number) for number in path.stem.split(".")])


def main() -> None:
    """Print what got slower, what got faster, and how much of the rest is noise."""
    last = kept(HERE / "results")[-1]
    now, then = (json.loads(path.read_text(encoding="utf-8")) for path in (HERE / "results.json", last))
    print(f"now, beside {last.stem}")
    for name in sorted(now["conditions"].keys() | then["conditions"].keys()):
        mine, theirs = now["conditions"].get(name), then["conditions"].get(name)
        if mine != theirs and not isinstance(mine, dict):
            print(f"  {name}: {mine}, then {theirs}")
    found = list(changes(_samples(now), _samples(then)))
    for verdict in ("worse", "better"):
        print(f"\n{verdict}:")
        for one in sorted((one for one in found if one.verdict == verdict), key=lambda one: one.ratio):
            print(f"  {one.ratio:6.2f}×  {one.now:28} {one.then:28} {one.name}")
    noise = [one.ratio for one in found if one.verdict == "within noise"]
    print(f"\nwithin noise: {len(noise)} figures" + (f", {min(noise):.2f}× to {max(noise):.2f}×" if noise else ""))


def _samples(run: dict[str, Any]) -> Samples:
    samples = Samples()
    samples.all.update(run["samples"])
    return samples


if __name__ == "__main__":
    main()
