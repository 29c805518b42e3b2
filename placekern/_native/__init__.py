"""The native core, a half of it in `cpu` and one in `cuda`; only here tensors become addresses.

Callers say `_native.linear`, wherever that stands.
"""

from . import cpu, cuda
from .arrays import (
    ConvShape,
    Weight,
    on_16_bytes,
)
from .cpu import (
    available_isas,
    conv2d,
    conv2d_backward,
    force_way,
    get_isa,
    kmeans_assign,
    kmeans_optimal,
    linear,
    linear_backward,
    set_isa,
    way,
)
from .cuda import (
    GradY,
    Output,
    Source,
    cuda_architectures,
    cuda_devices,
    device_codebook_gradient,
    device_decode,
    device_direct,
    device_index,
    device_kmeans_assign,
    device_linear_backward,
    device_linear_backward_plan,
    device_matmul,
    device_properties,
    has_cuda,
    is_emulated,
    matmul_splits,
)

__all__ = [
    "ConvShape",
    "GradY",
    "Output",
    "Source",
    "Weight",
    "available_isas",
    "conv2d",
    "conv2d_backward",
    "cpu",
    "cuda",
    "cuda_architectures",
    "cuda_devices",
    "device_codebook_gradient",
    "device_decode",
    "device_direct",
    "device_index",
    "device_kmeans_assign",
    "device_linear_backward",
    "device_linear_backward_plan",
    "device_matmul",
    "device_properties",
    "force_way",
    "get_isa",
    "has_cuda",
    "is_emulated",
    "kmeans_assign",
    "kmeans_optimal",
    "linear",
    "linear_backward",
    "matmul_splits",
    "on_16_bytes",
    "set_isa",
    "way",
]
