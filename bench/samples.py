"""What was measured, all of it; what is told of it is its median and its quartiles."""

import statistics
from collections import defaultdict


class Samples:
    """Lists of figures, each under a part of the bench, who was measured, and what (with its unit)."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.all: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, part: str, who: str, what: str, value: float) -> None:
        """Note one figure."""
        self.all[f"{part} | {who} | {what}"].append(round(value, 4))

    def of(self, part: str, who: str, what: str) -> list[float]:
        """All figures of one thing; KeyError if it was not measured."""
        found = self.all.get(f"{part} | {who} | {what}")
        if found is None:
            raise KeyError(f"{part} | {who} | {what}")
        return found

    def median(self, part: str, who: str, what: str) -> float:
        """The middle one."""
        return statistics.median(self.of(part, who, what))

    def told(self, part: str, who: str, what: str) -> str:
        """The median with its quartiles, or nothing where it was not measured."""
        try:
            values = self.of(part, who, what)
        except KeyError:
            return ""
        if len(values) < 2:
            return f"{values[0]:.3g}"
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return f"{_short(statistics.median(values))} ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
