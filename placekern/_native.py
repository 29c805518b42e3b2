"""Loads the native core and hands it tensors; the only file that calls data_ptr().

torch is imported first on purpose: the core then finds torch's OpenMP library already loaded and
both share one pool of threads. Sizes and dtypes are checked by the caller; see `ops`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from . import _cpu
except ImportError as error:
    raise ImportError(
        f"placekern's native core could not be loaded ({error}); build it with `pip install .`, "
        "or in place with `python setup.py build_ext --inplace`"
    ) from error

if find_spec("placekern._cuda") is None:  # built without nvcc: all but CUDA tensors works
    _cuda = None
else:
    from . import _cuda

_cpu.get_isa()  # a PLACEKERN_ISA that cannot be had is an error at import, not at the first forward


class Weight(NamedTuple):
    """The arrays of a QuantSparseWeight [M, K], as an op receives them."""

    M: int
    K: int
    bits: int
    layout: int
    row_ptr: Tensor
    positions: Tensor
    codes: Tensor
    codebook: Tensor


def available_isas() -> list[str]:
    """Levels that this processor runs, lowest first."""
    return _cpu.available_isas()


def get_isa() -> str:
    """The level in use."""
    return _cpu.get_isa()


def set_isa(name: str) -> None:
    """Uses level `name` from now on, in every thread.

    Raises:
        ValueError: the level is unknown, or this processor lacks it.
    """
    _cpu.set_isa(name)


_WAYS = ("auto", "direct", "decode")
_way = "auto"


def force_way(way: str) -> None:
    """Computes every convolution "direct" or by "decode" from now on; "auto" goes by density.

    Raises:
        ValueError: another word.
    """
    global _way
    if way not in _WAYS:
        raise ValueError(f"way is {way!r}, expected one of {', '.join(_WAYS)}")
    _way = way


def cuda_devices() -> int:
    """CUDA devices that `_cuda` can use; 0 when it was not built."""
    return _cuda.device_count() if _cuda is not None else 0


def cuda_architectures() -> str | None:
    """The GPUs that `_cuda` was built for ("75 80 86"), None when it was not built."""
    return _cuda.architectures if _cuda is not None else None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _weight(module: Any, weight: Weight) -> Any:
    kind = module.WeightDouble if weight.codebook.dtype == torch.float64 else module.WeightFloat
    return kind(
        M=weight.M,
        K=weight.K,
        bits=weight.bits,
        layout=weight.layout,
        row_ptr=weight.row_ptr.data_ptr(),
        wide=weight.row_ptr.dtype == torch.int64,
        positions=weight.positions.data_ptr(),
        codes=weight.codes.data_ptr(),
        codebook=weight.codebook.data_ptr(),
    )


def linear(weight: Weight, x: Tensor, bias: Tensor | None, y: Tensor, relu: bool) -> None:
    """Fills y, N * M elements, from x [N, K]; all contiguous and of the codebook's dtype."""
    sizes = {"N": x.shape[0], "x": x.data_ptr(), "bias": _pointer(bias), "y": y.data_ptr()}
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        native = _weight(_cuda, weight)
        _cuda.linear(native, **sizes, relu=relu, device=x.device.index, stream=stream)
    else:
        _cpu.linear(_weight(_cpu, weight), **sizes, relu=relu, threads=torch.get_num_threads())


def linear_backward(
    weight: Weight, x: Tensor, grad_y: Tensor, grad_x: Tensor | None, grad_codebook: Tensor | None
) -> None:
    """Fills grad_x [N, K] and grad_codebook, float64 [2^bits], where they are given."""
    _cpu.linear_backward(
        _weight(_cpu, weight),
        N=x.shape[0],
        x=x.data_ptr(),
        grad_y=grad_y.data_ptr(),
        grad_x=_pointer(grad_x),
        grad_codebook=_pointer(grad_codebook),
        threads=torch.get_num_threads(),
    )


def conv2d(
    weight: Weight, shape: dict[str, int], x: Tensor, bias: Tensor | None, y: Tensor, relu: bool
) -> None:
    """Fills y [batch, M, out_h, out_w] from x; any strides. `shape`: the fields of ConvShape."""
    _cpu.conv2d(
        _weight(_cpu, weight),
        _cpu.ConvShape(**shape),
        x=x.data_ptr(),
        x_strides=x.stride(),
        bias=_pointer(bias),
        y=y.data_ptr(),
        y_strides=y.stride(),
        relu=relu,
        way=_WAYS.index(_way),
        threads=torch.get_num_threads(),
    )


def conv2d_backward(
    weight: Weight,
    shape: dict[str, int],
    x: Tensor,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_codebook: Tensor | None,
) -> None:
    """Adds to grad_x (any strides, zeroed before) and fills grad_codebook, float64 [2^bits]."""
    _cpu.conv2d_backward(
        _weight(_cpu, weight),
        _cpu.ConvShape(**shape),
        x=x.data_ptr(),
        x_strides=x.stride(),
        grad_y=grad_y.data_ptr(),
        grad_y_strides=grad_y.stride(),
        grad_x=_pointer(grad_x),
        grad_x_strides=(0, 0, 0, 0) if grad_x is None else grad_x.stride(),
        grad_codebook=_pointer(grad_codebook),
        threads=torch.get_num_threads(),
    )


def kmeans_assign(
    points: Tensor, boundaries: Tensor, codes: Tensor, sums: Tensor, counts: Tensor
) -> None:
    """Fills codes uint8 [n], sums float64 [C] and counts int64 [C] by boundaries [C - 1]."""
    _cpu.kmeans_assign(
        n=points.numel(),
        count=sums.numel(),
        points=points.data_ptr(),
        boundaries=boundaries.data_ptr(),
        codes=codes.data_ptr(),
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        threads=torch.get_num_threads(),
    )


def kmeans_optimal(points: Tensor, weights: Tensor, starts: Tensor) -> None:
    """Fills starts int64 [C] with the first point of each cluster of the exact optimum.

    points (sorted) and weights are float64 [n] on the CPU.
    """
    _cpu.kmeans_optimal(
        n=points.numel(),
        clusters=starts.numel(),
        points=points.data_ptr(),
        weights=weights.data_ptr(),
        starts=starts.data_ptr(),
    )
