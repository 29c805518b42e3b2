"""Times on a GPU: CUDA graphs between events, with the caches cold or warm.

Cold is what a layer meets in a network whose other layers have been through the caches since. The
surprise: the L2 cache is emptied by reading, not by writing. A cache full of written lines sends
them to memory while the next kernel runs, and a kernel that reads little would pay most for it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds: median and quartiles with cold caches, median with warm ones."""

    us: float
    low: float
    high: float
    warm: float

    @staticmethod
    def of(cold: list[float], warm: list[float]) -> Timing:
        low, _, high = quantiles(cold, n=4) if len(cold) > 1 else (cold[0],) * 3
        return Timing(median(cold), low, high, median(warm))


class CudaClock:
    """Times calls on the current CUDA device, side by side."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = getattr(properties, "L2_cache_size", 64 << 20)
        self.flushed_bytes = max(256 << 20, 4 * cache)
        self._buffer = torch.zeros(self.flushed_bytes // 4, dtype=torch.int32, device="cuda")
        self._most = torch.zeros((), dtype=torch.int32, device="cuda")
        self._stream = torch.cuda.Stream()  # one for all: libraries keep memory for each

    def measure(self, runs: dict[str, Run], rounds: int = 25) -> dict[str, Timing]:
        """A timing of each call. All are captured in CUDA graphs, and take turns.

        A turn empties the cache, then runs twice: first cold, then warm. While the cache is
        emptied, the host gets ahead, so that launches are not in the times.

        Args:
            runs: calls by name; each launches work on the current stream and waits for nothing.
            rounds: turns of each.
        """
        graphs = {name: captured(run, self._stream) for name, run in runs.items()}
        events = {name: [[_event() for _ in range(3)] for _ in range(rounds)] for name in runs}
        for i in range(rounds):
            for name, graph in graphs.items():
                torch.amax(self._buffer, 0, out=self._most)
                events[name][i][0].record()
                graph.replay()
                events[name][i][1].record()
                graph.replay()
                events[name][i][2].record()
        torch.cuda.synchronize()
        return {name: _timing(turns) for name, turns in events.items()}

    def measure_calls(self, runs: dict[str, Run], calls: int = 200) -> dict[str, float]:
        """Microseconds from call to call without a graph: what Python and the launch take."""
        result = {}
        for name, run in runs.items():
            times = []
            for _ in range(4):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                torch.cuda.synchronize()
                times.append(1e6 * (time.perf_counter() - start) / calls)
            result[name] = min(times)
        return result


class HostClock:
    """The same on the host, for dry runs on the emulated device; its times mean nothing."""

    flushed_bytes = 0

    def measure(self, runs: dict[str, Run], rounds: int = 25) -> dict[str, Timing]:
        """As `CudaClock.measure`, with one round."""
        result = {}
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken = 1e6 * (time.perf_counter() - start)
            result[name] = Timing.of([taken], [taken])
        return result

    def measure_calls(self, runs: dict[str, Run], calls: int = 200) -> dict[str, float]:
        """As `CudaClock.measure_calls`, with one call."""
        return {name: timing.us for name, timing in self.measure(runs).items()}


Clock = CudaClock | HostClock


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _timing(turns: list[list[torch.cuda.Event]]) -> Timing:
    cold, warm = ([1e3 * t[i].elapsed_time(t[i + 1]) for t in turns] for i in range(2))
    return Timing.of(cold, warm)


def captured(run: Run, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of one run, after a warm-up on the same stream, as capturing demands."""
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would collect garbage and empty torch's cache first: a tenth of a second for
    # each of some thousand graphs. Nothing may be freed while one is captured, though.
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                run()
            finally:
                graph.capture_end()
    finally:
        gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    return graph
