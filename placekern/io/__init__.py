"""Files: placekern's own format, the architectures it can rebuild, and those of other tools."""

from .architectures import build_architecture, register_architecture
from .deep_compression import load_deep_compression, save_deep_compression
from .entropy import EntropyReport, entropy_bytes, entropy_report
from .export import export_coreml, export_layers, save_matrix_market, save_npz
from .file import FORMAT_VERSION, load, read_header, save
from .sizes import FileSizes, LayerSizes, file_sizes, planned_sizes
from .streams import entropy_bits

__all__ = [
    "FORMAT_VERSION",
    "EntropyReport",
    "FileSizes",
    "LayerSizes",
    "build_architecture",
    "entropy_bits",
    "entropy_bytes",
    "entropy_report",
    "export_coreml",
    "export_layers",
    "file_sizes",
    "load",
    "load_deep_compression",
    "planned_sizes",
    "read_header",
    "register_architecture",
    "save",
    "save_deep_compression",
    "save_matrix_market",
    "save_npz",
]
