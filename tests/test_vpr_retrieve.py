"""Describing in batches and exact search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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


def test_all_references_can_be_asked_for() -> None:
    references = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    found = search(references, references, k=20, chunk=6)
    assert torch.equal(found, brute_force(references, references, 20))
    assert torch.equal(found[:, 0], torch.arange(20))


def test_equal_distances_come_in_order_of_index() -> None:
    references = torch.tensor([[2.0], [1.0], [1.0], [1.0], [0.0], [1.0]])
    for chunk in (1, 2, 6):
        found = search(references, torch.tensor([[1.0]]), k=6, chunk=chunk)
        assert found.tolist() == [[1, 2, 3, 5, 0, 4]]


def test_search_without_queries_is_empty() -> None:
    assert search(torch.rand(5, 3), torch.rand(0, 3), k=2).shape == (0, 2)


@pytest.mark.parametrize(
    ("references", "queries", "k", "message"),
    [
        (torch.rand(5, 3), torch.rand(2, 4), 1, r"\[n, D\] and \[q, D\]"),
        (torch.rand(5, 3), torch.rand(3), 1, r"\[n, D\] and \[q, D\]"),
        (torch.rand(5, 3), torch.rand(2, 3), 6, "between 1 and the 5 references, got 6"),
        (torch.rand(5, 3), torch.rand(2, 3), 0, "between 1 and the 5 references, got 0"),
    ],
)
def test_search_refuses_what_does_not_fit(
    references: Tensor, queries: Tensor, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search(references, queries, k)
    with pytest.raises(ValueError, match="chunk"):
        search(torch.rand(5, 3), torch.rand(2, 3), 1, chunk=0)


def test_device_of_a_model_without_tensors_is_the_cpu() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
