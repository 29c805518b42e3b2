"""Shared by all tests: seeds, the ISA fixture, random weights, and where real data may be found."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from cuda_emulation import build as cuda_emulation
from torch import Tensor

import placekern as pk
from placekern import QuantSparseWeight, _native
from placekern.io import architectures
from placekern.packing import Layout

if TYPE_CHECKING:
    from io_files import Network

# One thread unless a test asks for more: on a busy machine, threads that wait for each other spin,
# and tests of small layers take thirty times as long.
torch.set_num_threads(1)

# A machine that holds little more than torch runs what needs none of these, and says what it skips.
OPTIONAL = ("PIL", "faiss", "hypothesis", "matplotlib", "rich", "scipy", "typer", "zstandard")
MISSING = {name for name in OPTIONAL if find_spec(name) is None}


def _needs(path: Path) -> list[str]:
    """Missing packages that a test file imports at its top."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return sorted(names & MISSING)


class _SkippedModule(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        names = ", ".join(_needs(self.path))
        pytest.skip(f"{self.path.name} needs {names}", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return _SkippedModule.from_parent(parent, path=module_path) if _needs(module_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in MISSING:
            raise
        pytest.skip(f"needs {error.name}")


pytest_runtest_setup = pytest_runtest_call


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=pk.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test at every level of this processor."""
    before = pk.get_isa()
    pk.set_isa(request.param)
    yield request.param
    pk.set_isa(before)


class Gpu:
    """A device for the CUDA kernels: a real one, or the emulator, which works on CPU tensors."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def weight(
        self, weight: QuantSparseWeight, layout: Layout | None = None, taps: int = 1
    ) -> QuantSparseWeight:
        layout = weight.best_layout("cuda") if layout is None else layout
        packed, to = weight.to_layout(layout, taps), self.tensor
        return QuantSparseWeight.trusted(
            weight.shape,
            weight.bits,
            layout,
            weight.nnz,
            to(packed.row_ptr),
            to(packed.positions),
            to(packed.codes),
            to(packed.codebook),
            packed.taps,
        )


def end_after_a_fault() -> None:
    """After a fault on the device nothing works in this process: ends one of several workers.

    pytest-xdist names the test and starts another, so that the others are not lost.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def faults_end_the_worker() -> Iterator[None]:
    """For tests of a real GPU that do without `gpu`."""
    yield
    end_after_a_fault()


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Runs a test on the emulator of tests/cuda_emulation, and on a GPU where there is one."""
    if request.param == "cuda":
        if not torch.cuda.is_available() or _native.cuda_devices() == 0:
            pytest.skip("no GPU, or built without CUDA")
        yield Gpu("cuda")
        end_after_a_fault()
        return
    variant = os.environ.get("PLACEKERN_EMULATION", "plain")
    monkeypatch.setattr(_native.cuda, "_cuda", cuda_emulation.load(variant))
    for cached in (_native.device_properties, _native.matmul_splits):
        cached.cache_clear()
    yield Gpu("cpu")
    for cached in (_native.device_properties, _native.matmul_splits):
        cached.cache_clear()


@pytest.fixture
def exact_conv() -> Iterator[None]:
    """Lets cuDNN's float32 be float32; by default it is TF32."""
    # Attributes can no longer be set once torch's own test helpers were imported, as opcheck does.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def any_way() -> Iterator[None]:
    """Lets a test force a way to compute."""
    yield
    _native.force_way("auto")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Network:
    """The compressed network of the tests of files, with an architecture that `load` can build."""
    import io_files

    monkeypatch.setattr(architectures, "_BUILDERS", dict(architectures._BUILDERS))
    architectures.register_architecture("network", io_files.Network)
    return io_files.compressed_network()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file that is not there yet."""
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights and photographs, where a developer has them."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("PLACEKERN_DATA", root.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the real data is not here; PLACEKERN_DATA may point to it")
    return path
