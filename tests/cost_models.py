"""The network that tests of predicted times look at."""

from __future__ import annotations

from torch import nn

import placekern as pk


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1, stride=2),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 300),
        nn.Dropout(0.5),
        nn.Linear(300, 70, bias=False),
    )


def compressed(sparsity: float = 0.4) -> nn.Sequential:
    model = network()
    pk.compress_(model, {"bits": 5, "sparsity": sparsity})
    return model
