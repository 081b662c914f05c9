"""Timing of contestants that take turns in one process, and what to say about the figures."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

# One measurement of one contestant lasts at least this long, in seconds: a thousand times the clock's resolution.
BURST = 0.02
MICRO = 1e6


@dataclass(frozen=True)
class Timing:
    """Microseconds of one inference over the rounds.

    cpu, wall: median; cpu_min, wall_min: the fastest round; spread: interquartile range of the CPU time by its median.
    calls: inferences timed in one round.
    """

    cpu: float
    cpu_min: float
    wall: float
    wall_min: float
    spread: float
    calls: int
    rounds: int

    @staticmethod
    def of(cpu: Sequence[float], wall: Sequence[float], calls: int) -> Timing:
        """cpu, wall: seconds of one inference, one figure per round."""
        middle = statistics.median(cpu)
        low, _, high = statistics.quantiles(cpu, n=4) if len(cpu) > 1 else (middle,) * 3
        return Timing(
            cpu=middle * MICRO,
            cpu_min=min(cpu) * MICRO,
            wall=statistics.median(wall) * MICRO,
            wall_min=min(wall) * MICRO,
            spread=(high - low) / middle if middle else 0.0,
            calls=calls,
            rounds=len(cpu),
        )

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure(contestants: Mapping[str, Callable[[], object]], rounds: int, burst: float = BURST) -> dict[str, Timing]:
    """Time the contestants, round by round, each for about `burst` seconds a round.

    Every contestant is called once, untimed, before each of its turns, so that it finds its weights cached and not
    those of the one before it; the order is turned by one from round to round. CPU time is that of all threads of the
    process: a contestant that works in a thread of its own is charged for it, and contestants that wait use none.
    """
    calls = {name: _calls(function, burst) for name, function in contestants.items()}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        for name in order:
            function, count = contestants[name], calls[name]
            function()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(count):
                function()
            cpu[name].append((time.process_time() - cpu_start) / count)
            wall[name].append((time.perf_counter() - wall_start) / count)
        order.append(order.pop(0))
    return {name: Timing.of(cpu[name], wall[name], calls[name]) for name in contestants}


def _calls(function: Callable[[], object], burst: float) -> int:
    """How many calls last about `burst` seconds, after two that warm up."""
    function()
    function()
    start = time.perf_counter()
    function()
    return max(1, round(burst / max(time.perf_counter() - start, 1e-7)))


def ratios(times: Mapping[str, float], peers: Collection[str]) -> dict[str, float]:
    """Each time over that of the fastest of `peers`; empty when there is none."""
    found = [times[name] for name in peers]
    return {name: value / min(found) for name, value in times.items()} if found else {}


def pin(cores: Sequence[int]) -> None:
    """Keep this thread, and those it starts from now on, on these cores."""
    os.sched_setaffinity(0, cores)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; all columns but the first `text` are right-aligned."""
    lines = [" | ".join(header), " | ".join("---" if i < text else "---:" for i in range(len(header)))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
