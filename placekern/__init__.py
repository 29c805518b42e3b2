"""Pruned, codebook-quantized networks that run straight from their compressed weights."""

from . import vpr
from ._native import available_isas, get_isa, set_isa
from ._version import __version__
from .compress import CompressConfig, CompressReport, Recipe, RecipeConfig, compress_
from .io import load, save
from .nn import QuantSparseConv2d, QuantSparseLinear
from .packing import Layout
from .weight import QuantSparseWeight

__all__ = [
    "CompressConfig",
    "CompressReport",
    "Layout",
    "QuantSparseConv2d",
    "QuantSparseLinear",
    "QuantSparseWeight",
    "Recipe",
    "RecipeConfig",
    "__version__",
    "available_isas",
    "compress_",
    "get_isa",
    "load",
    "save",
    "set_isa",
    "vpr",
]
