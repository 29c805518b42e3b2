"""Recall, latency and size of a network, dense and at each compression setting.

The surprise: recalls are fractions of all queries, those without any positive among them, as the
street-view benchmarks count; a data set where 3 of 100 queries have no match cannot pass 0.97.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from placekern.compress import CompressConfig, compress_
from placekern.io import save
from placekern.vpr.datasets import PlaceDataset
from placekern.vpr.retrieve import Progress, describe, device_of, search

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Evaluation:
    """What a network does on a data set.

    Attributes:
        recalls: recall@N in [0, 1] by N.
        latency_ms: median milliseconds to describe one query at batch 1.
        indices: int64 [q, k], the references found for each query, nearest first; k = max N, or all
            references.
        descriptor_dim: values in a descriptor.
    """

    recalls: dict[int, float]
    latency_ms: float
    indices: Tensor = field(repr=False)
    descriptor_dim: int

    def __str__(self) -> str:
        recalls = ", ".join(f"R@{n}: {100 * recall:.1f}" for n, recall in self.recalls.items())
        return f"{recalls}, {self.latency_ms:.2f} ms a query, {self.descriptor_dim} values"


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        label: "dense", or the setting in words.
        config: the setting; None for the dense network.
        recalls: recall@N in [0, 1] by N.
        pruned: fraction of the compressed layers' weights that are absent.
        disk_bytes: size of the saved file, every byte of it.
        resident_bytes: what the network's parameters and buffers take in memory.
        latency_ms: median milliseconds to describe one query at batch 1.
        indices: int64 [q, k], as in `Evaluation`.
    """

    label: str
    config: CompressConfig | None = field(repr=False)
    recalls: dict[int, float]
    pruned: float
    disk_bytes: int
    resident_bytes: int
    latency_ms: float
    indices: Tensor = field(repr=False)


def recall_at(
    indices: Tensor, positives: Sequence[Sequence[int]], ns: Sequence[int] = RECALLS
) -> dict[int, float]:
    """Fraction of the queries with a positive among their first N references.

    Args:
        indices: integer [q, k], the references found for each query, nearest first.
        positives: the right references of each query; a query without any is counted and never
            right.
        ns: the values of N, each at most k.

    Returns:
        Recall in [0, 1] by N.

    Raises:
        ValueError: shapes that do not fit, or an N out of range.
    """
    if indices.ndim != 2 or len(indices) != len(positives) or not len(indices):
        raise ValueError(
            f"indices must be [q, k] with a list of positives for each query, "
            f"got {list(indices.shape)} and {len(positives)} lists"
        )
    if not all(1 <= n <= indices.shape[1] for n in ns):
        raise ValueError(
            f"each N must be between 1 and the {indices.shape[1]} references found, got {list(ns)}"
        )
    correct = torch.tensor(
        [
            [found in accepted for found in row]
            for row, accepted in zip(indices.tolist(), map(set, positives), strict=True)
        ]
    )
    return {n: correct[:, :n].any(1).double().mean().item() for n in ns}


def latency_ms(model: nn.Module, image: Tensor, repeats: int = 30, warmup: int = 5) -> float:
    """Median time to describe one image at batch 1, in milliseconds.

    The image is on the model's device beforehand; decoding and transfer are not counted. Runs under
    inference mode with the current number of threads.

    Args:
        model: [1, 3, H, W] to [1, D].
        image: [3, H, W] or [1, 3, H, W].
        repeats: timed runs, at least 1.
        warmup: runs before them.

    Raises:
        ValueError: more than one image, or no repeats.
    """
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(
            f"latency is of one image [3, H, W] or [1, 3, H, W], got {list(image.shape)}"
        )
    if repeats < 1:
        raise ValueError(f"repeats must be positive, got {repeats}")
    device = device_of(model)
    image = image.to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times = []
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(warmup):
                model(image)
            for _ in range(repeats):
                wait()
                start = time.perf_counter()
                model(image)
                wait()
                times.append(time.perf_counter() - start)
    finally:
        model.train(training)
    return 1e3 * median(times)


def evaluate(
    model: nn.Module,
    dataset: PlaceDataset,
    ns: Sequence[int] = RECALLS,
    batch_size: int = 16,
    repeats: int = 30,
    progress: Progress | None = None,
) -> Evaluation:
    """Describe references and queries, search, and score.

    Args:
        model: [B, 3, H, W] to [B, D].
        dataset: with at least one query and one reference.
        ns: the values of N; one above the number of references counts all of them.
        batch_size: as in `describe`.
        repeats: timed runs on the first query.
        progress: called as progress(label, done, total).

    Raises:
        ValueError: an empty data set, or an N that is not positive.
    """
    if not ns or min(ns) < 1:
        raise ValueError(f"ns must be positive numbers of references, got {list(ns)}")
    references = describe(model, dataset.references, batch_size, progress)
    queries = describe(model, dataset.queries, batch_size, progress)
    k = min(max(ns), len(references))
    device = device_of(model)  # where faiss may have a GPU to search on
    indices = search(references.to(device), queries.to(device), k).cpu()
    recalls = recall_at(indices, dataset.positives, sorted({min(n, k) for n in ns}))
    return Evaluation(
        recalls={n: recalls[min(n, k)] for n in ns},
        latency_ms=latency_ms(model, dataset.queries[0], repeats),
        indices=indices,
        descriptor_dim=queries.shape[1],
    )


def compare(
    model: nn.Module,
    dataset: PlaceDataset,
    settings: Sequence[CompressConfig] | Mapping[str, CompressConfig],
    ns: Sequence[int] = RECALLS,
    batch_size: int = 16,
    repeats: int = 30,
    finetune: Callable[[nn.Module, CompressConfig], object] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """A row for the dense network, then one for each compression setting; `model` is left as it is.

    Args:
        model: the dense network.
        dataset, ns, batch_size, repeats, progress: as in `evaluate`.
        settings: configurations, each applied to a copy of `model`; as a mapping, with their
            labels.
        finetune: called with each compressed copy and its setting before it is measured, for
            training codebooks.

    Returns:
        Rows in the order of `settings`, the dense one first. Files are saved to a temporary folder
        to be counted.
    """
    labelled = (
        list(settings.items())
        if isinstance(settings, Mapping)
        else [(label_of(config), config) for config in settings]
    )

    def measure(
        label: str, config: CompressConfig | None, network: nn.Module, pruned: float, resident: int
    ) -> Row:
        result = evaluate(network, dataset, ns, batch_size, repeats, progress)
        return Row(
            label=label,
            config=config,
            recalls=result.recalls,
            pruned=pruned,
            disk_bytes=_saved_bytes(network),
            resident_bytes=resident,
            latency_ms=result.latency_ms,
            indices=result.indices,
        )

    rows = [measure("dense", None, model, 0.0, _tensor_bytes(model))]
    for label, config in labelled:
        compressed = copy.deepcopy(model)
        report = compress_(compressed, config, progress=_under(f"compress {label}", progress))
        if finetune is not None:
            finetune(compressed, config)
        rows.append(measure(label, config, compressed, report.pruned, report.resident_bytes))
    return rows


def _under(label: str, progress: Progress | None) -> Progress | None:
    # One label for all layers, so that a display draws one bar.
    if progress is None:
        return None
    return lambda _, done, total: progress(label, done, total)


def label_of(config: CompressConfig) -> str:
    """A setting in words, such as "8-bit, threshold 0.005" or "5-bit uniform, 50 % pruned"."""
    words = f"{config.bits}-bit" + (" uniform" if config.method == "uniform" else "")
    if config.threshold is not None:
        words += f", threshold {config.threshold:g}"
    if config.sparsity is not None:
        words += f", {100 * config.sparsity:g} % pruned"
    return words + (", with layer rules" if config.layers else "")


def _tensor_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory(prefix="placekern-") as folder:
        return save(model, Path(folder) / "model.safetensors")
