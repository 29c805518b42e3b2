"""Measures the rates of this machine: one to three seconds, once a process for what a model needs.

Small layers of our kernels and of dense torch are run in turn, each layer once a round, and the
fastest round counts: what else runs on a machine only ever makes a round longer, and on a busy one
medians of few rounds were off by a factor of two. The rates are then fitted by non-negative least
squares on relative errors. The surprise: no rate is measured alone. Only sums of them can be, and
layers that differ in one kind of work tell them apart. The caller's default dtype and device and
autocast are left aside; the precision of float32 products, which kernels follow, is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, ops
from ..weight import QuantSparseWeight
from .cost_work import (
    FEW_ROWS,
    Call,
    ConvCall,
    LinearCall,
    Matrix,
    Rates,
    compressed_work,
    dense_batch,
    dense_conv2d_work,
)

_ROUNDS = 9
_LEAST_ROUNDS = 5
_WARM_RUNS, _WARM_SECONDS = 5, 8e-4
_SECONDS = 1.0  # after which no round begins, when the least are done


class _Conv(NamedTuple):
    """x [1, channels, size, size] -> y [1, M, ., .]."""

    channels: int
    M: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1


# Few and many channels, pixels and columns, with and without strides: each kind of work is a large
# part of the time of at least one. Densities are taken in turns: decoded and direct, mask and
# window.
_CONVOLUTIONS = (
    _Conv(3, 64, 3, 112),
    _Conv(3, 48, 7, 112, stride=2),
    _Conv(16, 64, 3, 56),
    _Conv(64, 64, 3, 56),
    _Conv(128, 128, 3, 28),
    _Conv(512, 128, 3, 7),
    _Conv(256, 64, 1, 28),
    _Conv(64, 256, 1, 28),
    _Conv(64, 96, 3, 28, stride=2),
    _Conv(32, 32, 3, 56, groups=32),
    _Conv(256, 256, 3, 14),
)
_DENSE_CONVOLUTIONS = (
    *_CONVOLUTIONS,
    _Conv(3, 64, 3, 160),
    _Conv(512, 512, 3, 7),
    _Conv(64, 256, 1, 56),
    _Conv(1024, 256, 1, 7),
    _Conv(512, 64, 1, 14),
)
_MATRICES = ((64, 64), (1024, 256), (256, 1024), (128, 4096))
_BATCH_MATRICES = ((64, 64), (512, 128), (64, 2048))
_DENSITIES = ((1.0, 0.4, 0.1), (0.65, 0.15, 0.05))
_DENSE_SIDES = (64, 256, 1024, 4096)
_LARGEST = 1 << 28  # multiply-adds of a dense linear layer that is measured
_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@dataclass(frozen=True)
class Needs:
    """What is to be predicted.

    Attributes:
        bits: of the codes of linear layers.
        conv2d_bits: of the codes of convolutions.
        batches: of dense linear layers, as `dense_batch` gives them.
    """

    bits: frozenset[int]
    conv2d_bits: frozenset[int]
    batches: frozenset[int]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Call, Matrix]]) -> Needs:
        """What these calls of these weights need."""
        pairs = list(pairs)
        linear = [(call, m) for call, m in pairs if isinstance(call, LinearCall)]
        return cls(
            frozenset(m.bits for _, m in linear),
            frozenset(m.bits for call, m in pairs if isinstance(call, ConvCall)),
            frozenset(dense_batch(call.N) for call, _ in linear),
        )


@dataclass
class _Case:
    """A layer that is timed, and what its time is made of."""

    run: Callable[[], object]
    family: str
    work: Mapping[str, float]
    seconds: float = 0.0


_MEASURED: dict[tuple[str, int, str], Rates] = {}


def measured_rates(needs: Needs) -> Rates:
    """The rates of this machine at the kernels' level and torch's threads and precision of now.

    What was measured before in this process is not measured again.
    """
    level, threads = _native.get_isa(), torch.get_num_threads()
    key = (level, threads, torch.get_float32_matmul_precision())
    if key not in _MEASURED:
        _MEASURED[key] = Rates(level, threads, {}, {})
    with torch.autocast("cpu", enabled=False):
        _MEASURED[key] = _with(needs, _MEASURED[key])
    return _MEASURED[key]


def _with(needs: Needs, known: Rates) -> Rates:
    """What is `known`, and what is needed beside it."""
    key = (known.isa, known.threads)
    seconds, dense_linear = dict(known.seconds), dict(known.dense_linear)
    cases: list[_Case] = []
    with torch.device("cpu"):  # not around the timing: it makes every call of torch longer
        if not _has(seconds, "conv2d", needs.conv2d_bits):
            cases += _conv2d_cases(*key, needs.conv2d_bits | _bits(seconds, "conv2d"))
        if not _has(seconds, "linear", needs.bits):
            cases += _linear_cases(*key, needs.bits | _bits(seconds, "linear"))
        batches = sorted(needs.batches - dense_linear.keys())
        dense = {batch: _dense_linear_cases(batch) for batch in batches}
    if not cases and not dense:
        return known
    _time([*cases, *(case for by_size in dense.values() for _, case in by_size)])
    misfit = known.misfit
    for family in sorted({case.family for case in cases}):
        rates, off = _fit([case for case in cases if case.family == family])
        seconds |= rates
        misfit = max(misfit, off)
    for batch, by_size in dense.items():
        dense_linear[batch] = tuple((size, case.seconds) for size, case in by_size)
    return Rates(*key, seconds, dense_linear, misfit)


def _bits(seconds: Mapping[str, float], op: str) -> frozenset[int]:
    """The bits whose lookup in an op has a rate."""
    return frozenset(b for b in range(1, 9) if f"{op} lookup, {b} bits" in seconds)


def _has(seconds: Mapping[str, float], op: str, bits: frozenset[int]) -> bool:
    return bits <= _bits(seconds, op)


def _conv2d_cases(isa: str, threads: int, bits: frozenset[int]) -> list[_Case]:
    cases = []
    for shape in _DENSE_CONVOLUTIONS:
        x, dense, call, sizes = _convolution(shape)
        matrix = Matrix(shape.M, dense[0].numel(), 0, 8)
        run = partial(F.conv2d, x, dense, **sizes)
        cases.append(_Case(run, "dense conv2d", dense_conv2d_work(call, matrix)))
    turns = cycle(sorted(bits))
    for shape, densities in zip(_CONVOLUTIONS, cycle(_DENSITIES), strict=False):
        x, dense, call, sizes = _convolution(shape)
        for density in densities:
            weight = _weight(shape.M, dense[0].numel(), density, next(turns))
            run = partial(ops.conv2d, x, weight, kernel_size=(shape.kernel,) * 2, **sizes)
            work = compressed_work(call, _matrix(weight), isa, threads)
            cases.append(_Case(run, "conv2d", work))
    return cases


def _convolution(shape: _Conv) -> tuple[Tensor, Tensor, ConvCall, dict[str, Any]]:
    """Input, dense weight, shapes, and the arguments that F.conv2d and ours have in common."""
    x = torch.ones(1, shape.channels, shape.size, shape.size, **_FLOAT)
    sizes = (shape.M, shape.channels // shape.groups, shape.kernel, shape.kernel)
    dense = torch.ones(sizes, **_FLOAT)
    padding = shape.kernel // 2
    out = (shape.size + 2 * padding - shape.kernel) // shape.stride + 1
    call = ConvCall(
        batch=1,
        channels=shape.channels,
        height=shape.size,
        width=shape.size,
        out_height=out,
        out_width=out,
        stride=shape.stride,
        groups=shape.groups,
        pointwise=shape.kernel == shape.stride == 1,
    )
    steps = {"stride": (shape.stride,) * 2, "padding": (padding,) * 2, "groups": shape.groups}
    return x, dense, call, steps


def _linear_cases(isa: str, threads: int, bits: frozenset[int]) -> list[_Case]:
    cases = []
    for family, all_sides, batches in (
        ("linear", _MATRICES, (1, FEW_ROWS)),
        ("linear batch", _BATCH_MATRICES, (8, 64)),
    ):
        turns = cycle(sorted(bits))
        for M, K in all_sides:
            for density in chain(*_DENSITIES):
                weight = _weight(M, K, density, next(turns))
                for batch in batches:
                    work = compressed_work(LinearCall(batch), _matrix(weight), isa, threads)
                    run = partial(ops.linear, torch.ones(batch, K, **_FLOAT), weight)
                    cases.append(_Case(run, family, work))
    return cases


def _dense_linear_cases(batch: int) -> list[tuple[int, _Case]]:
    """Square layers by their number of weights; the largest streams from beyond the caches."""
    cases = []
    for side in _DENSE_SIDES:
        if batch * side * side > _LARGEST:
            continue
        x, weight = torch.ones(batch, side, **_FLOAT), torch.ones(side, side, **_FLOAT)
        run = partial(F.linear, x, weight)
        cases.append((side * side, _Case(run, "dense linear", {})))
    return cases


def _matrix(weight: QuantSparseWeight) -> Matrix:
    return Matrix(*weight.shape, weight.nnz, weight.bits)


def _weight(M: int, K: int, density: float, bits: int) -> QuantSparseWeight:
    """Random positions and codes, from a generator of their own."""
    drawn: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(M + K)}
    mask = torch.rand(M, K, **drawn, **_FLOAT) < density
    count = int(mask.sum())
    codes = torch.randint(0, 1 << bits, (count,), **drawn, dtype=torch.uint8, device="cpu")
    return QuantSparseWeight.from_mask(mask, codes, torch.linspace(-1, 1, 1 << bits, **_FLOAT))


def _time(cases: list[_Case]) -> None:
    times: list[list[float]] = [[] for _ in cases]
    with torch.inference_mode():
        end = time.perf_counter() + _SECONDS
        for done in range(_ROUNDS):
            if done >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for case, seen in zip(cases, times, strict=True):
                seen.append(_warm_seconds(case.run))
    for case, seen in zip(cases, times, strict=True):
        case.seconds = min(seen)


def _warm_seconds(run: Callable[[], object]) -> float:
    """The last of a few runs: its weight lies in the caches then, as far as it fits."""
    begin = start = time.perf_counter()
    for _ in range(_WARM_RUNS):
        start = time.perf_counter()
        run()
        if start - begin > _WARM_SECONDS:
            break
    return time.perf_counter() - start


def _fit(cases: list[_Case]) -> tuple[dict[str, float], float]:
    """Seconds of one unit of each kind of work, never negative, and the misfit; see `Rates`."""
    from scipy.optimize import nnls  # here, so that compressing needs no scipy

    kinds = sorted({kind for case in cases for kind in case.work})
    counts = np.array([[case.work.get(kind, 0.0) for kind in kinds] for case in cases])
    seconds = np.array([case.seconds for case in cases])
    scale = counts.max(axis=0)
    shares = counts / scale / seconds[:, None]
    rates, _ = nnls(shares, np.ones(len(cases)))
    misfit = float(np.quantile(np.abs(shares @ rates - 1), 0.9))
    return dict(zip(kinds, (rates / scale).tolist(), strict=True)), misfit
