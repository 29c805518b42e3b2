"""What a layer's forward pass consists of on the CPU, and its time at given rates.

A pass is split into a few kinds of work, each counted from shapes alone: non-zeros looked up,
multiply-adds, pixels gathered. Time is their sum, each times what one of it takes on this machine.
The counts follow the loops of csrc/cpu; no time stands here. The surprise: dense linear layers
have no such sum. How their time grows with the batch is the library's choice, so it is measured at
the batch that is asked for and interpolated between sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..packing import WINDOW, Layout, choose_layout

# As in csrc/cpu; tests/test_cost.py compares them with the sources.
TILE_PIXELS = {"scalar": 32, "avx2": 32, "avx512": 64}
DECODE_DENSITY = {"scalar": 0.7, "avx2": 0.58, "avx512": 0.55}
TASK_TILES, MOST_TILE_ROWS, BLOCK_ROWS = 4, 512, 32
FEW_ROWS, DYNAMIC_ROWS, BATCH_ROWS, BATCH_COLUMNS = 4, 32, 8, 64


@dataclass(frozen=True)
class LinearCall:
    """x [N, K] -> y [N, M]."""

    N: int


@dataclass(frozen=True)
class ConvCall:
    """x [batch, channels, height, width] -> y [batch, M, out_height, out_width]."""

    batch: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride: int = 1
    groups: int = 1
    pointwise: bool = False

    @property
    def pixels(self) -> int:
        """Output pixels of the whole batch."""
        return self.batch * self.out_height * self.out_width


Call = LinearCall | ConvCall


@dataclass(frozen=True)
class Matrix:
    """A weight [M, K] as far as time depends on it: non-zeros and the bits of a code."""

    M: int
    K: int
    nnz: int
    bits: int

    @property
    def density(self) -> float:
        """Non-zeros / positions; 0 for an empty matrix."""
        return self.nnz / (self.M * self.K) if self.M * self.K else 0.0

    def at_density(self, density: float) -> Matrix:
        """The same sizes with another share of non-zeros."""
        return Matrix(self.M, self.K, round(density * self.M * self.K), self.bits)


@dataclass(frozen=True)
class Rates:
    """What this machine takes for each kind of work.

    Attributes:
        isa: level of the kernels that were measured.
        threads: with which they were measured.
        seconds: of one unit of each kind of work.
        dense_linear: by batch, (weights, seconds) of dense linear layers in rising order of size.
        misfit: how far at most, as a share, nine in ten of the measured layers lie from their sums.
            It is about 0.15 on a quiet machine, and large where other jobs disturbed the measuring.
    """

    isa: str
    threads: int
    seconds: Mapping[str, float]
    dense_linear: Mapping[int, tuple[tuple[int, float], ...]]
    misfit: float = 0.0

    def compressed(self, call: Call, matrix: Matrix) -> float:
        """Seconds of one pass of a compressed layer.

        Raises:
            ValueError: a rate that this takes is not there; so does `dense`.
        """
        return self._time(compressed_work(call, matrix, self.isa, self.threads))

    def dense(self, call: Call, matrix: Matrix) -> float:
        """Seconds of one pass of the dense layer."""
        if isinstance(call, ConvCall):
            return self._time(dense_conv2d_work(call, matrix))
        batch = dense_batch(call.N)
        points = self.dense_linear.get(batch)
        if not points:
            raise ValueError(
                f"the rates have no dense linear layers at batch {batch}; leave `rates` out to "
                "have them measured"
            )
        return _interpolated(points, max(matrix.M * matrix.K, 1)) * max(call.N / batch, 1.0)

    def _time(self, work: Mapping[str, float]) -> float:
        try:
            return sum(count * self.seconds[kind] for kind, count in work.items())
        except KeyError as error:
            raise ValueError(
                f"the rates have no {error.args[0]!r}; leave `rates` out to have it measured"
            ) from None


def dense_batch(N: int) -> int:
    """The batch at which a dense linear layer is measured: beyond 128 time grows with N."""
    return min(max(N, 1), 128)


def compressed_work(call: Call, matrix: Matrix, isa: str, threads: int) -> dict[str, float]:
    """How much there is of each kind of work in a pass of a compressed layer."""
    if isinstance(call, ConvCall):
        return _conv2d_work(call, matrix, isa, threads)
    return _linear_work(call, matrix, threads)


def dense_conv2d_work(call: ConvCall, matrix: Matrix) -> dict[str, float]:
    """The same for a dense convolution.

    A pointwise one is a product of matrices as they lie; for others the library brings weight and
    image into an order of its own, so their bytes cost more.
    """
    image = call.batch * call.channels * call.height * call.width
    kind = "pointwise " if call.pointwise else ""
    return {
        "dense conv2d call": 1,
        "dense conv2d multiply-add": matrix.M * matrix.K * call.pixels,
        f"dense conv2d {kind}weight byte": 4 * matrix.M * matrix.K,
        f"dense conv2d {kind}image byte": 4 * (image + matrix.M * call.pixels),
    }


def _linear_work(call: LinearCall, matrix: Matrix, threads: int) -> dict[str, float]:
    M, K, nnz, N = matrix.M, matrix.K, matrix.nnz, call.N
    mask = choose_layout(M, K, nnz) == Layout.MASK
    windows = M * _pieces(K, WINDOW)
    if N <= FEW_ROWS:
        work = {"linear row": M}
        if mask:
            work |= {
                "linear position": M * K,
                "linear multiply-add": M * K * max(N - 1, 0),
                f"linear lookup, {matrix.bits} bits": nnz,
            }
        else:
            work |= {
                "linear window": windows,
                "linear listed entry": nnz * N,
                "linear listed lookup": nnz,
            }
        items = _pieces(M, DYNAMIC_ROWS)
    else:
        decodings = _pieces(N, BATCH_COLUMNS)
        work = {
            "linear batch output": M * N,
            "linear batch multiply-add": M * K * N,
            "linear batch window": windows * decodings,
        }
        name = f"lookup, {matrix.bits} bits" if mask else "listed lookup"
        work[f"linear batch {name}"] = nnz * decodings
        items = _pieces(M, BATCH_ROWS) * decodings
    return _shared_out(work, items, threads) | {
        "linear batch call" if N > FEW_ROWS else "linear call": 1
    }


def _conv2d_work(call: ConvCall, matrix: Matrix, isa: str, threads: int) -> dict[str, float]:
    M, K, nnz = matrix.M, matrix.K, matrix.nnz
    mask = choose_layout(M, K, nnz) == Layout.MASK
    decode = nnz > DECODE_DENSITY[isa] * M * K
    tiles = _pieces(call.pixels, TILE_PIXELS[isa])
    wanted = 1 if threads == 1 else 2 * threads
    task_tiles = max(min(_pieces(tiles * call.groups, wanted), TASK_TILES), 1)
    tasks = _pieces(tiles, task_tiles)
    group_rows = max(M // call.groups, 1)
    rows = min(group_rows, MOST_TILE_ROWS)
    while rows > BLOCK_ROWS and tasks * call.groups * _pieces(group_rows, rows) < threads:
        rows = (rows + 1) // 2
    row_blocks = _pieces(group_rows, rows)

    windows = M * _pieces(K, WINDOW)
    gathered = K * call.groups * row_blocks
    runs = tiles + call.batch * (1 if call.pointwise else call.out_height)
    way = "dense" if decode else "direct"
    work = {
        f"conv2d {'strided ' if call.stride > 1 else ''}gather": gathered * tiles,
        "conv2d run": gathered * runs,
        "conv2d output": M * tiles,
        f"conv2d {way} block": windows * tiles,
        f"conv2d {way} multiply-add": (M * K if decode else nnz) * tiles,
        f"conv2d {'mask' if mask else 'listed'} window": windows * tasks,
        f"conv2d lookup, {matrix.bits} bits": nnz * tasks,
    }
    items = tasks * call.groups * row_blocks
    return _shared_out(work, items, threads) | {"conv2d call": 1}


def _shared_out(work: dict[str, float], items: int, threads: int) -> dict[str, float]:
    """More where the last round of items leaves threads idle."""
    idle = _pieces(items, threads) * threads / max(items, 1)
    return {kind: count * idle for kind, count in work.items()}


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def _interpolated(points: tuple[tuple[int, float], ...], size: int) -> float:
    """Seconds at a size, along straight lines in log-log; beyond the last, in proportion."""
    first, last = points[0], points[-1]
    if size <= first[0]:
        return first[1]
    if size >= last[0]:
        return last[1] * size / last[0]
    after = next(i for i, (known, _) in enumerate(points) if known >= size)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    share = math.log(size / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** share
