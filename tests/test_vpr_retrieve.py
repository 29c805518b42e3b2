"""Describing in batches and exact search."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from placekern.cli.app import app
from placekern.vpr import _faiss
from placekern.vpr.index import Backend, Index, faiss_status, search_backend
from placekern.vpr.models import build
from placekern.vpr.retrieve import describe, device_of, search


class ChannelMeans(nn.Module):
    """Describes an image by its three mean channels, and records the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        self.modes.append(self.training)
        return images.mean((2, 3))


def test_mixed_sizes_keep_their_order_and_are_never_padded() -> None:
    sizes = [(4, 6), (4, 6), (4, 6), (5, 6), (4, 6)]
    images = [torch.full((3, *size), float(index)) for index, size in enumerate(sizes)]
    model = ChannelMeans()
    progress: list[tuple[str, int, int]] = []
    found = describe(model, images, batch_size=2, progress=lambda *step: progress.append(step))
    assert torch.equal(found, torch.arange(5.0)[:, None].expand(5, 3))
    assert [shape[0] for shape in model.shapes] == [2, 1, 1, 1]
    assert progress == [("describe", done, 5) for done in (2, 3, 4, 5)]


def test_batches_do_not_change_descriptors() -> None:
    model = build("tiny-netvlad", clusters=4)
    images = torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    single = torch.cat([model(image[None]) for image in images]).detach()
    torch.testing.assert_close(describe(model, images, batch_size=3), single, rtol=0, atol=1e-5)


def test_the_mode_is_kept_and_the_result_is_an_ordinary_tensor() -> None:
    model = ChannelMeans().train()
    found = describe(model, torch.rand(2, 3, 4, 4))
    assert model.modes == [False]
    assert model.training
    assert not found.is_inference()
    assert not found.requires_grad


def test_integer_images_are_scaled() -> None:
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    torch.testing.assert_close(describe(ChannelMeans(), images), torch.full((2, 3), 0.2))


def test_describe_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="no images"):
        describe(ChannelMeans(), [])
    with pytest.raises(ValueError, match="batch_size"):
        describe(ChannelMeans(), torch.rand(1, 3, 4, 4), batch_size=0)


def brute_force(references: Tensor, queries: Tensor, k: int) -> Tensor:
    distances = (queries[:, None].double() - references[None].double()).square().sum(2)
    return distances.argsort(dim=1, stable=True)[:, :k]


NO_FAISS = _faiss.reason_against(torch.device("cpu"))
needs_faiss = pytest.mark.skipif(NO_FAISS is not None, reason=str(NO_FAISS))
BACKENDS = ["torch", pytest.param("faiss", marks=needs_faiss)]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100, 65_536])
def test_search_is_exact_in_any_chunks(unit: bool, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(100, 9, generator=generator)
    queries = torch.randn(300, 9, generator=generator)  # more than one block of queries
    if unit:
        references = nn.functional.normalize(references, dim=1)
    found = search(references, queries, k=6, chunk=chunk)
    assert found.dtype == torch.int64
    assert torch.equal(found, brute_force(references, queries, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 19, 20, 300])  # faiss goes two ways, below 20 and from there
@pytest.mark.parametrize("k", [1, 6, 99, 100])
def test_an_index_is_exact_time_and_again(backend: Backend, count: int, k: int) -> None:
    references = torch.randn(100, 9)
    index = Index(references, backend)
    assert (index.backend, len(index)) == (backend, 100)
    for _ in range(2):
        queries = torch.randn(count, 9)
        assert torch.equal(index.search(queries, k), brute_force(references, queries, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_descriptors_are_found_in_order_up_to_rounding(backend: Backend) -> None:
    references = nn.functional.normalize(torch.randn(3000, 512), dim=1)
    queries = nn.functional.normalize(torch.randn(40, 512), dim=1)
    found = search(references, queries, 200, backend=backend)
    distances = torch.cdist(queries.double(), references.double()).square()
    torch.testing.assert_close(
        distances.gather(1, found), distances.sort(1).values[:, :200], rtol=0, atol=1e-6
    )
    assert all(len(row.unique()) == 200 for row in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_references_can_be_asked_for(backend: Backend) -> None:
    references = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    found = search(references, references, k=20, chunk=6, backend=backend)
    assert torch.equal(found, brute_force(references, references, 20))
    assert torch.equal(found[:, 0], torch.arange(20))


def test_equal_distances_come_in_order_of_index() -> None:
    references = torch.tensor([[2.0], [1.0], [1.0], [1.0], [0.0], [1.0]])
    for chunk in (1, 2, 6):
        found = search(references, torch.tensor([[1.0]]), k=6, chunk=chunk)
        assert found.tolist() == [[1, 2, 3, 5, 0, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [7, 65_536])
@pytest.mark.parametrize("k", [1, 3, 30, 150, 299, 300])
def test_ties_at_the_last_place_go_to_the_first_in_order(
    backend: Backend, chunk: int, k: int
) -> None:
    # Small whole numbers: every distance is exact, and most are shared by many references.
    references = torch.randint(-1, 2, (300, 3)).float()
    for count in (3, 40):
        queries = torch.randint(-1, 2, (count, 3)).float()
        found = search(references, queries, k, chunk, backend)
        assert torch.equal(found, brute_force(references, queries, k))


@needs_faiss
@pytest.mark.parametrize("k", [1, 3, 30, 299, 300])
def test_whichever_ties_faiss_returns(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(
        references: Tensor, squares: Tensor, queries: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        shuffled = torch.randperm(len(references))
        assert torch.equal(squares, references.square().sum(1))
        found = brute_force(references[shuffled], queries, k)
        rows = references[shuffled][found]
        return (rows - queries[:, None]).square().sum(2), shuffled[found]

    monkeypatch.setattr(_faiss, "nearest", nearest)
    references, queries = (torch.randint(-1, 2, (rows, 3)).float() for rows in (300, 40))
    found = search(references, queries, k, backend="faiss")
    assert torch.equal(found, brute_force(references, queries, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_references_that_are_all_the_same(backend: Backend) -> None:
    found = search(torch.ones(5000, 2), torch.ones(1, 2), 200, backend=backend)
    assert torch.equal(found, torch.arange(200)[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_infinitely_far(backend: Backend) -> None:
    references = torch.randn(40, 4)
    references[3, 1], references[5, 0], references[7, 2] = math.nan, math.inf, 1e30
    queries = torch.randn(25, 4)
    expected = brute_force(references[[*range(3), 4, 6, *range(8, 40)]], queries, 37)
    names = torch.tensor([*range(3), 4, 6, *range(8, 40)])
    found = search(references, queries, 40, 9, backend)
    assert torch.equal(found[:, :37], names[expected])
    assert torch.equal(found[:, 37:], torch.tensor([3, 5, 7]).expand(25, 3))

    for value in (math.nan, math.inf, 1e30):
        queries[2, 3] = value
        again = search(references[8:], queries, 32, backend=backend)
        assert torch.equal(again[2], torch.arange(32))
        assert torch.equal(again[3:], brute_force(references[8:], queries[3:], 32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_distance_that_overflows_is_not_lost(backend: Backend) -> None:
    references = torch.tensor([[-1.5e19], [1.5e19], [0.0]])  # squares fit in float32, sums do not
    for queries in (torch.full((1, 1), 1.5e19), torch.full((30, 1), 1.5e19)):
        found = search(references, queries, 3, backend=backend)
        assert torch.equal(found, torch.tensor([[1, 2, 0]]).expand(len(queries), 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors_and_gradients(backend: Backend) -> None:
    references = torch.randn(9, 60).T
    queries = torch.randn(30, 18)[:, ::2].requires_grad_()
    index = Index(references, backend)
    assert index.references.is_contiguous() == (backend == "faiss")
    found = index.search(queries, 5)
    assert torch.equal(found, brute_force(references, queries, 5))
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_searched_by_torch(dtype: torch.dtype) -> None:
    references, queries = torch.randn(500, 64).to(dtype), torch.randn(30, 64).to(dtype)
    references *= 100  # past float16 when squared
    index = Index(references)
    assert index.backend == "torch"
    assert torch.equal(index.search(queries, 20), brute_force(references, queries, 20))
    if NO_FAISS is None:
        with pytest.raises(ValueError, match=r"faiss searches float32, got .* backend='torch'"):
            Index(references, "faiss")


def test_half_precision_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placekern.vpr.index._ELEMENTS_AT_ONCE", 100)
    references, queries = torch.randn(50, 9).half(), torch.randn(4, 9).half()
    assert torch.equal(search(references, queries, 7), brute_force(references, queries, 7))


def test_float64_sees_what_float32_does_not() -> None:
    references = 1.0 + torch.tensor([[3e-12], [2e-12], [1e-12]], dtype=torch.float64)
    assert search(references, torch.zeros(1, 1).double(), 3).tolist() == [[2, 1, 0]]


def test_autocast_does_not_reach_the_search() -> None:
    references, queries = torch.randn(2000, 32), torch.randn(20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = search(references, queries, 10)
    assert torch.equal(found, brute_force(references, queries, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_without_queries_is_empty(backend: Backend) -> None:
    assert search(torch.rand(5, 3), torch.rand(0, 3), k=2, backend=backend).shape == (0, 2)


@needs_faiss
def test_faiss_uses_the_threads_of_torch() -> None:
    # Imported before torch, in a process of its own: only then do the two not share their threads.
    script = """
import faiss, torch
from placekern.vpr.retrieve import search

knn, seen = faiss.knn, []
faiss.knn = lambda *arguments: seen.append(faiss.omp_get_max_threads()) or knn(*arguments)
faiss.omp_set_num_threads(3)
torch.set_num_threads(1)
search(torch.rand(5, 3), torch.rand(2, 3), 1, backend="faiss")
print(seen, faiss.omp_get_max_threads())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[1] 3\n", result.stderr


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a module `faiss` with the given source before any other."""

    def put(source: str) -> None:
        (tmp_path / "faiss.py").write_text(source)
        _faiss._load.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    yield put
    _faiss._load.cache_clear()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ModuleNotFoundError(name='faiss')", "is not installed: install placekern.cpu."),
        ("import a_missing_module", "does not load .*a_missing_module.*: install it again"),
        ("raise RuntimeError('libcudart.so.12 is missing')", "RuntimeError: libcudart.so.12"),
        ("__version__ = '1.2.0'", "does not load .ImportError: 1.2.0 has no knn"),
        ("", "of unknown version has no knn"),
    ],
)
def test_a_faiss_that_cannot_be_used(
    installed: Callable[[str], None], source: str, reason: str
) -> None:
    installed(source)
    with pytest.raises(RuntimeError, match=f"faiss .*{reason}.*, or use backend='torch'"):
        Index(torch.rand(5, 3), "faiss")
    assert Index(torch.rand(5, 3)).backend == "torch"
    assert search_backend("cuda") == "torch"
    assert faiss_status() != ""


@needs_faiss
def test_faiss_says_where_it_cannot_search() -> None:
    assert "does not search on mps" in str(_faiss.reason_against(torch.device("mps")))
    if importlib.import_module("faiss").get_num_gpus() == 0:
        assert "install placekern[gpu]" in str(_faiss.reason_against(torch.device("cuda")))
        assert search_backend("cuda") == "torch"


@pytest.mark.skipif(search_backend("cuda") == "torch", reason="faiss has no GPU here")
def test_faiss_on_a_gpu_agrees_with_torch() -> None:
    references = torch.randint(-1, 2, (5000, 8), device="cuda").float()
    queries = torch.randint(-1, 2, (300, 8), device="cuda").float()
    index = Index(references)
    assert index.backend == "faiss"
    with torch.cuda.stream(torch.cuda.Stream()):
        for k in (1, 50, 2047, 2048, 5000):
            found = index.search(queries, k)
            assert torch.equal(found, Index(references, "torch").search(queries, k))
            assert torch.equal(found.cpu(), brute_force(references, queries, k).cpu())


def test_info_says_what_searches() -> None:
    result = CliRunner().invoke(app, ["info", "--json"])
    facts = json.loads(result.stdout)
    assert facts["faiss"] == faiss_status()
    assert facts["search"][0] == "torch on cpu"


@pytest.mark.parametrize(
    ("references", "queries", "k", "message"),
    [
        (torch.rand(5, 3), torch.rand(2, 4), 1, r"\[n, D\] and \[q, D\]"),
        (torch.rand(5, 3), torch.rand(3), 1, r"\[n, D\] and \[q, D\]"),
        (torch.rand(5), torch.rand(2, 3), 1, r"references must be \[n, D\], got \[5\]"),
        (torch.rand(5, 3), torch.rand(2, 3).half(), 1, "one dtype and device, got torch.float32"),
        (torch.rand(5, 3), torch.rand(2, 3, device="meta"), 1, "cpu and torch.float32 on meta"),
        (torch.rand(5, 3), torch.rand(2, 3), 6, "between 1 and the 5 references, got 6"),
        (torch.rand(5, 3), torch.rand(2, 3), 0, "between 1 and the 5 references, got 0"),
        (torch.rand(0, 3), torch.rand(2, 3), 1, "between 1 and the 0 references, got 1"),
    ],
)
def test_search_refuses_what_does_not_fit(
    references: Tensor, queries: Tensor, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search(references, queries, k)


def test_an_index_refuses_what_it_cannot_be_built_from() -> None:
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        search(torch.rand(5, 3), torch.rand(2, 3), 1, chunk=0)
    with pytest.raises(ValueError, match="auto, torch, faiss, got 'numpy'"):
        Index(torch.rand(5, 3), "numpy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype torch.int64, expected a floating dtype"):
        Index(torch.ones(5, 3, dtype=torch.int64))


def test_device_of_a_model_without_tensors_is_the_cpu() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
