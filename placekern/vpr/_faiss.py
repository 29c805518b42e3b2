"""Calls faiss, which is optional; the only file that imports it.

The surprise: faiss-cpu and faiss-gpu install one and the same module. Whether it can search on a
GPU is asked of the module, and a faiss that is there but does not load is no error until somebody
asks for it by name.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MAX_K_ON_GPU = 2048
"""The most neighbours that faiss selects on a GPU; without limit on the CPU."""

# The GPU's temporary memory belongs to one search at a time.
_gpu_lock = Lock()


def status() -> str:
    """The version of faiss, "not installed", or why the one installed does not load."""
    module, trouble = _load()
    return trouble if module is None else module.__version__


def reason_against(device: torch.device) -> str | None:
    """Why faiss cannot search on a device, and what to do; None if it can."""
    module, trouble = _load()
    if module is None:
        if trouble == "not installed":
            return "faiss is not installed: install placekern[cpu], or placekern[gpu] for a GPU"
        return f"faiss {trouble}: install it again"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"faiss does not search on {device.type}: move the descriptors to the CPU or CUDA"
    if not hasattr(module, "bfKnn") or module.get_num_gpus() == 0:
        return (
            f"faiss {module.__version__} has no GPU, as faiss-cpu never has: "
            "install placekern[gpu] in its place"
        )
    try:
        import_module("faiss.contrib.torch_utils")
    except Exception as error:
        return f"faiss does not take torch's tensors ({error}): install it again"
    return None


def nearest(references: Tensor, squares: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest references to each query, by faiss's exact search, without an index of its own.

    Args:
        references: contiguous float32 [n, D] on the CPU or a CUDA device; read in place.
        squares: float32 [n], the squared length of each reference.
        queries: contiguous float32 [q, D] on the same device, q at least 1.
        k: at most n, and at most `MAX_K_ON_GPU` on a GPU.

    Returns:
        Squared distances, float32 [q, k], and indices, int64 [q, k], nearest first; which of equal
        distances come first, or at all, is up to faiss. On a GPU the search is queued on torch's
        current stream.
    """
    search = _nearest_on_gpu if references.is_cuda else _nearest_on_cpu
    return search(references, squares, queries, k)


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = import_module("faiss")
        if not callable(getattr(module, "knn", None)):
            version = getattr(module, "__version__", "of unknown version")
            raise ImportError(f"{version} has no knn")
    except ModuleNotFoundError as error:
        if error.name == "faiss":
            return None, "not installed"
        return None, f"does not load ({error})"
    # A faiss-gpu without its CUDA libraries raises RuntimeError, one built for another numpy
    # AttributeError: whatever it is, torch can search.
    except Exception as error:
        return None, f"does not load ({type(error).__name__}: {error})"
    return module, ""


def _nearest_on_cpu(
    references: Tensor, squares: Tensor, queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    faiss = import_module("faiss")
    # Imported before torch, faiss has an OpenMP library of its own, and torch.set_num_threads does
    # not reach that. Imported after it, as here, both share torch's.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        distances, indices = faiss.knn(queries.numpy(), references.numpy(), k)
    finally:
        faiss.omp_set_num_threads(threads)
    return torch.from_numpy(distances), torch.from_numpy(indices)


def _nearest_on_gpu(
    references: Tensor, squares: Tensor, queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    with _gpu_lock, torch.cuda.device(references.device):
        resources = _gpu_resources()
        arguments = _gpu_arguments(references, squares, queries, distances, indices)
        with import_module("faiss.contrib.torch_utils").using_stream(resources):
            import_module("faiss").bfKnn(resources, arguments)
    return distances, indices


def _gpu_arguments(
    references: Tensor, squares: Tensor, queries: Tensor, distances: Tensor, indices: Tensor
) -> Any:
    # faiss.knn_gpu would do the same, but sums the references' squares again in every search.
    faiss = import_module("faiss")
    pointers = import_module("faiss.contrib.torch_utils")
    arguments = faiss.GpuDistanceParams()
    arguments.metric = faiss.METRIC_L2
    arguments.k = distances.shape[1]
    arguments.dims = references.shape[1]
    arguments.vectors = pointers.swig_ptr_from_FloatTensor(references)
    arguments.vectorNorms = pointers.swig_ptr_from_FloatTensor(squares)
    arguments.numVectors = len(references)
    arguments.queries = pointers.swig_ptr_from_FloatTensor(queries)
    arguments.numQueries = len(queries)
    arguments.outDistances = pointers.swig_ptr_from_FloatTensor(distances)
    arguments.outIndices = pointers.swig_ptr_from_IndicesTensor(indices)
    return arguments


@lru_cache(maxsize=1)
def _gpu_resources() -> Any:
    # One for all devices and the life of the process: making one costs milliseconds, and each
    # holds up to 1.5 GiB of a device for temporaries. Pinned memory only serves copies from the
    # CPU, and there are none.
    resources = import_module("faiss").StandardGpuResources()
    resources.setPinnedMemory(0)
    return resources
