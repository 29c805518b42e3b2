"""Sensitivity and suggest on real tasks: the tables and the picture of docs/sensitivity.md.

    python -m benchmarks.sensitivity digits -o FOLDER
    python -m benchmarks.sensitivity corridor -o FOLDER --weights W.npz --dataset D --size 240x320

digits is the network of benchmarks/digits.py: settings are chosen by the accuracy on one set of
digits and tested on another. corridor is SqueezeNet with NetVLAD: settings are chosen by the
descriptors of the references, and tested by the recall of the queries. Each suggestion stands
beside the best uniform setting that gives a file of the same size: one number of bits, and one
sparsity or one threshold, for all layers; the best by the same metric.

FOLDER keeps the measurements: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import placekern as pk
from benchmarks import digits
from placekern.cli.sensitivity import cosine_metric, recall_metric
from placekern.cli.settings import image_size
from placekern.compress.sensitivity import BITS_TRIED, Sensitivity, sensitivity
from placekern.compress.suggest import MB, Suggestion, suggest
from placekern.nn import COMPRESSED_KINDS

Metric = Callable[[nn.Module], float]

_GRID = 48  # uniform sparsities from 0 to 94 %


@dataclass(frozen=True)
class Task:
    """A network, what its settings are chosen by, and what they are tested by."""

    title: str
    model: nn.Module
    metric: Metric
    test: Metric
    metric_name: str
    test_name: str
    budgets: tuple[float, ...]
    drops: tuple[float, ...]


def digits_task() -> Task:
    """The digits network, trained anew: the same each time."""
    torch.manual_seed(0)
    training, choosing, testing = (
        digits.draw_digits(count, seed) for count, seed in ((4000, 1), (2000, 2), (10_000, 3))
    )
    model = digits.network()
    digits.train(model, training, epochs=20, lr=3e-3)
    return Task(
        "Digits network: each layer alone pruned or quantized",
        model.eval(),
        lambda other: digits.accuracy(other, choosing),
        lambda other: digits.accuracy(other, testing),
        "accuracy",
        "accuracy on other digits",
        (0.020, 0.015, 0.012, 0.010, 0.008),
        (0.005, 0.01, 0.02, 0.05),
    )


def corridor_task(weights: Path, dataset: Path, size: str | None) -> Task:
    """SqueezeNet with NetVLAD, fitted to the references of a data set like VPR-Bench's corridor."""
    data = pk.vpr.load_corridor(dataset, image_size(size))
    data = pk.vpr.PlaceDataset(
        *(torch.stack(list(images)) for images in (data.queries, data.references)), data.positives
    )
    model = pk.vpr.load("squeezenet1_1-netvlad", weights)
    pk.vpr.fit_(model, data.references)
    return Task(
        "SqueezeNet 1.1 with NetVLAD on an indoor corridor: each layer alone pruned or quantized",
        model,
        cosine_metric(model, data.references, batch_size=4),
        recall_metric(data, batch_size=4),
        "mean cosine to the dense descriptors",
        "recall@1 of the queries",
        (1.4, 1.1, 0.9, 0.75, 0.65),
        (0.01, 0.03, 0.1),
    )


class Setting(NamedTuple):
    """One number of bits and one way to prune for all layers, pruned by `step` fiftieths.

    By sparsity that is the share of each layer; by threshold the share of all weights together.
    """

    bits: int
    kind: str
    step: int


class Uniform:
    """Files and metrics of uniform settings, computed when asked for."""

    def __init__(self, task: Task) -> None:
        self._task = task
        layers = [m for m in task.model.modules() if type(m) in COMPRESSED_KINDS]
        self._sorted = torch.cat([m.weight.detach().abs().flatten() for m in layers]).sort().values
        self.bytes = cache(self._bytes)
        self.metric = cache(lambda setting: task.metric(self.compressed(setting)))

    def label(self, setting: Setting) -> str:
        """In words."""
        words = f"{setting.bits} bits"
        return words + (f", {setting.kind} {self._value(setting):.3g}" if setting.step else "")

    def compressed(self, setting: Setting) -> nn.Module:
        """The network at a setting."""
        model = copy.deepcopy(self._task.model)
        pruning = {setting.kind: self._value(setting)}
        pk.compress_(model, pk.CompressConfig(bits=setting.bits, **pruning))
        return model.eval()

    def best(self, budget: float) -> Setting | None:
        """The setting of the best metric among the least pruned ones within a budget of bytes."""
        fitting = []
        for bits in BITS_TRIED:
            for kind in ("sparsity", "threshold"):
                steps = [Setting(bits, kind, step) for step in range(_GRID)]
                first = bisect_left(steps, True, key=lambda s: self.bytes(s) <= budget)
                fitting += steps[first : first + 1]
        return max(fitting, key=self.metric, default=None)

    def _value(self, setting: Setting) -> float:
        share = setting.step / 50
        if setting.kind == "sparsity":
            return share
        return float(self._sorted[round(share * len(self._sorted))]) * (share > 0)

    def _bytes(self, setting: Setting) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return pk.save(self.compressed(setting), Path(folder) / "model.safetensors")


def compare(task: Task, found: Sensitivity) -> None:
    """Prints suggestions for budgets of MB beside uniform settings of the same MB, then of drop."""
    uniform = Uniform(task)
    dense = task.test(task.model)
    print(f"\ndense: {task.metric_name} {found.baseline:.4f}, {task.test_name} {dense:.4f}\n")
    print(
        f"| budget MB | file MB | predicted drop | measured drop | {task.test_name} "
        f"| best uniform | file MB | drop | {task.test_name} |\n"
        "|--:|--:|--:|--:|--:|:--|--:|--:|--:|"
    )
    for budget in task.budgets:
        chosen = suggest(found, task.model, budget_mb=budget, metric=task.metric)
        cells = [f"{budget:g}", *_cells(task, chosen)]
        setting = uniform.best(budget * MB)
        if setting is None:
            cells += ["none fits", "", "", ""]
        else:
            cells += [
                uniform.label(setting),
                f"{uniform.bytes(setting) / MB:.4g}",
                f"{found.baseline - uniform.metric(setting):.4f}",
                f"{task.test(uniform.compressed(setting)):.4f}",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)

    print(
        f"\n| largest drop | file MB | predicted drop | measured drop | {task.test_name} "
        "| networks measured | file MB by the prediction alone |\n|--:|--:|--:|--:|--:|--:|--:|"
    )
    for drop in task.drops:
        chosen = suggest(found, task.model, max_drop=drop, metric=task.metric, evaluations=12)
        predicted = suggest(found, task.model, max_drop=drop)
        cells = [f"{drop:g}", *_cells(task, chosen), str(chosen.evaluations)]
        cells.append(f"{predicted.file_bytes / MB:.4g}")
        print(f"| {' | '.join(cells)} |", flush=True)


def _cells(task: Task, chosen: Suggestion) -> list[str]:
    model = copy.deepcopy(task.model)
    pk.compress_(model, chosen.config)
    return [
        f"{chosen.file_bytes / MB:.4g}",
        f"{chosen.predicted_drop:.4f}",
        f"{chosen.measured_drop:.4f}",
        f"{task.test(model.eval()):.4f}",
    ]


def main() -> None:
    """Measures, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("digits", "corridor"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.task == "digits":
        task = digits_task()
    elif arguments.weights is None or arguments.dataset is None:
        parser.error("corridor needs --weights and --dataset")
    else:
        task = corridor_task(arguments.weights, arguments.dataset, arguments.size)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = arguments.output / arguments.task
    found = sensitivity(
        task.model,
        task.metric,
        resume=name.with_suffix(".csv"),
        progress=lambda layer, done, total: print(f"\r{done}/{total} {layer:40}", end=""),
    )
    print(f"\n{found}")
    found.plot(name.with_suffix(".png"), task.title, task.metric_name)
    compare(task, found)


if __name__ == "__main__":
    main()
