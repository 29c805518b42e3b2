"""What a benchmark is given: the device, a clock, and a place for its rows.

A result is compared with plain torch in higher precision before its time counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock, Run, Timing
from benchmarks.gpu.sizes import Sizes


@dataclass(frozen=True)
class Row:
    """Our time beside that of the best peer.

    Attributes:
        section: the benchmark.
        case: what was run, by label.
        times: of every run.
        ours, peer: names of the quickest runs with cold caches.
        ratio, warm_ratio: the peer's time over ours, cold and warm.
        target: what the ratio should reach; None: no target.
        bytes: that our run must move at least.
        error: of our results, relative.
    """

    section: str
    case: dict[str, Any]
    times: dict[str, Timing]
    ours: str
    peer: str
    ratio: float
    warm_ratio: float
    target: float | None
    bytes: int
    error: float


@dataclass
class Bench:
    """One run of the benchmarks."""

    device: torch.device
    clock: Clock
    sizes: Sizes
    ends: float  # by time.monotonic()
    rows: list[Row] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    earlier: dict[str, Any] = field(default_factory=dict)  # results that this run goes on from

    @property
    def emulated(self) -> bool:
        """Whether this is a dry run on CPU tensors."""
        return self.device.type == "cpu"

    def in_time(self, what: str) -> bool:
        """Whether there is time left; otherwise what is left out is noted."""
        if time.monotonic() < self.ends:
            return True
        self.facts.setdefault("left out for want of time", []).append(what)
        return False

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """Notes an error and goes on: the other rows are worth having."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
            print(f"FAILED {self.problems[-1]}", flush=True)
        if not self.emulated:
            with suppress(RuntimeError):  # after a fault on the device, nothing works any more
                torch.cuda.empty_cache()

    def has_fault(self) -> bool:
        """Whether the device has met an error after which nothing works in this process."""
        if self.emulated:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def check(self, name: str, actual: Tensor, expected: Tensor, bound: float) -> float:
        """The relative error of a result.

        Raises:
            AssertionError: it is above the bound, or not a number.
        """
        # In slices, so that the copies in float64 stay small.
        parts = zip(actual.flatten().split(1 << 24), expected.flatten().split(1 << 24), strict=True)
        difference = size = 0.0
        for a, e in parts:
            difference += float((a.double() - e.double()).square().sum())
            size += float(e.double().square().sum())
        error = (difference / max(size, 1e-30)) ** 0.5
        assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}"
        assert error < bound, f"{name} is off by {error:.2e}, at most {bound:.0e} was expected"
        return error

    def compare(
        self,
        section: str,
        case: dict[str, Any],
        ours: dict[str, Run],
        peers: dict[str, Run],
        *,
        error: float,
        bytes: int,
        target: float | None = None,
        rounds: int | None = None,
    ) -> Row:
        """Times runs side by side and keeps the row."""
        times = self.clock.measure({**ours, **peers}, rounds or self.sizes.rounds)
        own = min(ours, key=lambda name: times[name].us)
        peer = min(peers, key=lambda name: times[name].us)
        warm = [min(times[n].warm for n in names) for names in (peers, ours)]
        ratio = times[peer].us / times[own].us
        row = Row(section, case, times, own, peer, ratio, warm[0] / warm[1], target, bytes, error)
        self.rows.append(row)
        words = ", ".join(f"{k} {v}" for k, v in case.items())
        print(
            f"{section}: {words}: {times[own].us:.1f} us, {peer} {times[peer].us:.1f} us, "
            f"{ratio:.2f} x{f' (target {target})' if target else ''}",
            flush=True,
        )
        return row

    def result(self) -> dict[str, Any]:
        """Everything that was measured, for JSON."""
        own = {
            **self.facts,
            "problems": self.problems,
            "rows": [asdict(row) for row in self.rows],
            "sweeps": self.sweeps,
        }
        joined = {k: self.earlier.get(k, []) + v for k, v in own.items() if isinstance(v, list)}
        return {**own, **self.earlier, **joined}


def randn(bench: Bench, *size: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Normal numbers on the device."""
    generator = torch.Generator(bench.device).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=bench.device).to(dtype)
