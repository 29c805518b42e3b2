"""From a trained network to a compressed one: pruning, codebooks, the swap and its report."""

from .config import CompressConfig
from .quantize import fit_kmeans, fit_uniform
from .report import CompressReport, LayerReport
from .swap import compress_

__all__ = [
    "CompressConfig",
    "CompressReport",
    "LayerReport",
    "compress_",
    "fit_kmeans",
    "fit_uniform",
]
