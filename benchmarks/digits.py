"""A recipe against one-shot compression on digits that Pillow draws: the table of docs/training.md.

    python -m benchmarks.digits            8 to 2 bits, 71 to 90 % pruned, one shot and by recipe
    python -m benchmarks.digits --l1       proximal L1 against a plain penalty

Digits are drawn with a random size, place, slant, stroke colour and noise; the network is a small
convolutional one, trained first. Everything is drawn from seeds: on one machine the table repeats.
"""

from __future__ import annotations

import argparse
import copy
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import placekern as pk

SIDE = 20
BATCH = 50


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images float32 [count, 1, 20, 20] of mean 0, labels int64 [count]."""
    g = np.random.default_rng(seed)
    labels = g.integers(0, 10, count)
    images = np.empty((count, SIDE, SIDE), np.float32)
    fonts = [ImageFont.load_default(size) for size in (12, 13, 14, 15)]
    for image, label in zip(images, labels, strict=True):
        canvas = Image.new("L", (SIDE, SIDE), 0)
        place = tuple(g.integers(1, 6, 2).tolist())
        ink = int(g.integers(160, 256))
        ImageDraw.Draw(canvas).text(place, str(label), ink, fonts[g.integers(4)])
        canvas = canvas.rotate(g.uniform(-15, 15), Image.Resampling.BILINEAR)
        image[:] = np.asarray(canvas, np.float32) / 255 + g.normal(0, 0.08, (SIDE, SIDE))
    return torch.from_numpy(images - images.mean())[:, None], torch.from_numpy(labels)


def network() -> nn.Sequential:
    """27,000 weights, most of them in one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def batches(images: Tensor, labels: Tensor, epochs: int, seed: int):
    """Batches of BATCH, in an order that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            yield images[rows], labels[rows]


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, config=None, sgd=False
) -> pk.Recipe | None:
    """Adam with a falling rate; with a config of a recipe also compresses the model, in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    recipe = None
    if config is not None:
        recipe = pk.Recipe(model, config, optimizer)
        recipe.prepare()
    steps = epochs * -(-len(data[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    model.train()
    for images, labels in batches(*data, epochs, seed=1):
        loss = nn.functional.cross_entropy(model(images), labels)
        if recipe:
            loss = loss + recipe.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recipe:
            recipe.step()
        schedule.step()
    if recipe:
        recipe.finalize()
    return recipe


@torch.inference_mode()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, 0 to 1."""
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def recipe_config(bits: int, sparsity: float, steps: int, **settings) -> dict:
    """Pruned by the cubic schedule in the first half, quantized at three fifths."""
    return {
        "compress": {"bits": bits, "sparsity": sparsity},
        "schedule": "polynomial",
        "prune_end": steps // 2,
        "prune_every": 5,
        "quantize_at": steps * 3 // 5,
        **settings,
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--l1", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, test = draw_digits(4000, seed=1), draw_digits(2000, seed=2)
    begun = time.perf_counter()
    dense = network()
    train(dense, data, epochs=20, lr=3e-3)
    base = accuracy(dense, test)
    seconds = time.perf_counter() - begun
    print(f"dense: {base:.4f} on {len(test[0])} digits, trained in {seconds:.0f} s, 1 thread")
    epochs = 8
    steps = epochs * -(-len(data[0]) // BATCH)
    if arguments.l1:
        compare_l1(dense, data, test, epochs, steps)
        return
    longer = copy.deepcopy(dense)
    train(longer, data, epochs, 2e-3)
    print(f"dense, trained as much longer as a recipe trains: {accuracy(longer, test):.4f}")
    print("\n| bits | pruned | one shot | pruned in training | recipe | of the loss recovered |")
    print("|--:|--:|--:|--:|--:|--:|")
    for bits in (8, 5, 3, 2):
        for sparsity in (0.71, 0.8, 0.9):
            shot = copy.deepcopy(dense)
            report = pk.compress_(shot, pk.CompressConfig(bits=bits, sparsity=sparsity))
            trained = copy.deepcopy(dense)
            train(trained, data, epochs, 2e-3, recipe_config(bits, sparsity, steps))
            pruned = copy.deepcopy(dense)
            config = recipe_config(bits, sparsity, steps, quantize_at=None)
            train(pruned, data, epochs, 2e-3, config)  # its codebooks are fitted and not trained
            results = [accuracy(model, test) for model in (shot, pruned, trained)]
            share = (results[2] - results[0]) / (base - results[0])
            cells = " | ".join(f"{result:.4f}" for result in results)
            print(f"| {bits} | {report.pruned:.1%} | {cells} | {share:.0%} |")


def compare_l1(dense, data, test, epochs: int, steps: int) -> None:
    """One threshold, L1 before it: which mode leaves more accuracy at the same share pruned?"""
    runs = {
        ("Adam", "proximal"): (0, 0.01, 0.03, 0.1, 0.2, 0.3),
        ("Adam", "penalty"): (1e-5, 1e-4, 1e-3, 3e-3, 6e-3),
        ("SGD", "proximal"): (0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2),
        ("SGD", "penalty"): (1e-4, 3e-4, 1e-3, 2e-3, 3e-3),
    }
    print("\n| optimiser | L1 | strength | pruned | accuracy |\n|:--|:--|--:|--:|--:|")
    for (optimizer, mode), strengths in runs.items():
        sgd = optimizer == "SGD"
        for strength in strengths:
            model = copy.deepcopy(dense)
            config = {
                "compress": {"bits": 5, "threshold": 0.02},
                "prune_begin": steps // 2,
                "quantize_at": steps * 3 // 5,
                "l1": strength,
                "l1_mode": mode,
                "codebook_lr": 0.01 if sgd else 1.0,
            }
            recipe = train(model, data, epochs, 0.03 if sgd else 2e-3, config, sgd)
            pruned, right = recipe.report().pruned, accuracy(model, test)
            print(f"| {optimizer} | {mode} | {strength:g} | {pruned:.1%} | {right:.4f} |")


if __name__ == "__main__":
    main()
