"""Shared by all tests: seeds, the ISA fixture, random weights, and where real data may be found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import placekern as pk

# One thread unless a test asks for more: on a busy machine, threads that wait for each other spin,
# and tests of small layers take thirty times as long.
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights and photographs, where a developer has them."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("PLACEKERN_DATA", root.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the real data is not here; PLACEKERN_DATA may point to it")
    return path
