"""Files: placekern's own format, the architectures it can rebuild, and importers of others'."""

from .architectures import build_architecture, register_architecture
from .deep_compression import load_deep_compression
from .file import FORMAT_VERSION, load, read_header, save

__all__ = [
    "FORMAT_VERSION",
    "build_architecture",
    "load",
    "load_deep_compression",
    "read_header",
    "register_architecture",
    "save",
]
