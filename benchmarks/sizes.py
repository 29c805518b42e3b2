"""What each row of the paper's table weighs as a file of ours: `python -m benchmarks.sizes`.

No trained weights are needed: a file's size follows from the shapes, the share that is pruned and
the frequencies of the codes. Weights are drawn from Student's t with four degrees of freedom, each
layer is pruned to the row's share, and the whole network is really written. Ten minutes, 4 GB.

With --weights, what entropy_lambda costs and saves on trained layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import placekern as pk
from placekern.compress.quantize import assign, fit_entropy_constrained
from placekern.io import entropy_bits, entropy_bytes, entropy_report
from placekern.nn import COMPRESSED_KINDS, quant_sparse_layers, replace_module

MB = 1_000_000
_SAMPLE = 1_000_000  # weights that entropy_lambda is sought with
_PIECE = 1 << 24


class Row(NamedTuple):
    """A row of the paper's table; pruned is a share, size in the paper's MB."""

    network: str
    bits: int
    threshold: float
    pruned: float
    paper: float


ROWS = (
    Row("alexnet", 8, 0.001, 0.2577, 41.4),
    Row("alexnet", 8, 0.005, 0.4844, 32.4),
    Row("alexnet", 8, 0.01, 0.6992, 20.0),
    Row("alexnet", 8, 0.05, 0.8577, 10.3),
    Row("alexnet", 5, 0.005, 0.5239, 19.5),
    Row("alexnet", 5, 0.01, 0.7495, 10.6),
    Row("vgg16", 8, 0.001, 0.2552, 89.6),
    Row("vgg16", 8, 0.005, 0.5177, 65.1),
    Row("vgg16", 8, 0.01, 0.6823, 40.5),
    Row("vgg16", 8, 0.05, 0.8468, 21.7),
    Row("vgg16", 5, 0.005, 0.5577, 42.1),
    Row("vgg16", 5, 0.01, 0.7566, 21.2),
)
DIM = 4096
_CLUSTERS = 64


@dataclass(frozen=True)
class Size:
    """A network as a file: bytes, the least by order-0 entropy, |w - compressed| / |w| of kept."""

    file: int
    bound: float
    error: float


def draw(count: int, seed: int, degrees: float = 4.0) -> Tensor:
    """Heavy-tailed weights, float32 [count]."""
    generator = np.random.default_rng(seed)
    values = np.empty(count, np.float32)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        values[start : start + size] = generator.standard_t(degrees, size)
    return torch.from_numpy(values)


def layers(network: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers that are compressed, without weights."""
    with torch.device("meta"):
        model = pk.vpr.build(f"{network}-netvlad", clusters=_CLUSTERS, dim=DIM)
    yield from ((n, m) for n, m in model.named_modules() if type(m) in COMPRESSED_KINDS)


def pruned_from(weights: Tensor, share: float) -> float:
    """The threshold below which that share of the weights lies."""
    return float(np.quantile(weights[: 8 * _SAMPLE].abs().numpy(), share))


def compress(
    weights: Tensor, shape: tuple[int, int], row: Row, entropy_lambda: float
) -> tuple[pk.QuantSparseWeight, float, float]:
    """A layer, its squared error and its sum of squares."""
    mask = weights.abs() >= pruned_from(weights, row.pruned)
    kept = weights[mask]
    codebook, boundaries = fit_entropy_constrained(kept, 1 << row.bits, entropy_lambda)
    codes = assign(kept, boundaries)
    error = square = 0.0
    for piece, code in zip(kept.split(_PIECE), codes.split(_PIECE), strict=True):
        error += float((piece - codebook[code.int()]).double().square().sum())
        square += float(piece.double().square().sum())
    return pk.QuantSparseWeight.from_mask(mask.view(shape), codes, codebook), error, square


def measure(row: Row, drawn: dict[str, Tensor], entropy_lambda: float = 0.0) -> Size:
    """Writes the network of a row and weighs it."""
    with torch.device("meta"):
        model = pk.vpr.build(f"{row.network}-netvlad", clusters=_CLUSTERS, dim=DIM)
    error = square = bound = 0.0
    for name, weights in drawn.items():
        module = model.get_submodule(name)
        shape = (module.weight.shape[0], module.weight.shape[1:].numel())
        weight, more_error, more_square = compress(weights, shape, row, entropy_lambda)
        replace_module(model, module, COMPRESSED_KINDS[type(module)].from_weight(weight, module))
        error, square = error + more_error, square + more_square
        bound += sum(entropy_bytes(weight)) + weight.codebook.nbytes
    arrays = {
        id(t) for _, layer in quant_sparse_layers(model) for t in (*layer.buffers(), layer.codebook)
    }
    for owner in model.modules():
        for name, tensor in owner.named_parameters(recurse=False):
            if tensor.is_meta:
                setattr(owner, name, nn.Parameter(torch.zeros(tensor.shape, dtype=tensor.dtype)))
    bound += sum(t.nbytes for t in model.state_dict(keep_vars=True).values() if id(t) not in arrays)
    with tempfile.TemporaryDirectory() as folder:
        size = pk.save(model, Path(folder) / "network.safetensors")
    return Size(size, bound, (error / square) ** 0.5)


def lambda_for(row: Row, plain: Size, drawn: dict[str, Tensor]) -> float | None:
    """The smallest entropy_lambda that brings the file to the paper's MB; None when none does."""
    largest = max(drawn.values(), key=len)[: 4 * _SAMPLE]
    kept = largest[largest.abs() >= pruned_from(largest, row.pruned)][:_SAMPLE]
    total = sum(map(len, drawn.values())) * (1 - row.pruned)

    def bits_a_code(entropy_lambda: float) -> float:
        _, boundaries = fit_entropy_constrained(kept, 1 << row.bits, entropy_lambda)
        codes = assign(kept, boundaries)
        return entropy_bits(torch.bincount(codes.int()).numpy()) / len(codes)

    before = bits_a_code(0.0)
    wanted = before - (plain.file - row.paper * MB) * 8 / total
    wanted *= 0.985  # what a coder spends beyond the entropy
    if wanted >= before:
        return 0.0
    low, high = 1e-7, 3.0
    if wanted <= 0 or bits_a_code(high) > wanted:
        return None
    for _ in range(18):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if bits_a_code(middle) > wanted else (low, middle)
    return high


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    yield (
        "| network, bits | threshold | pruned | paper MB | entropy MB | file MB | over entropy "
        "| file - paper | error | entropy_lambda | file MB | error |"
    )
    yield "|" + " --- |" * 2 + " ---: |" * 10
    network, drawn = "", {}
    for row in rows:
        if row.network != network:
            drawn.clear()
            network = row.network
            for seed, (name, module) in enumerate(layers(network)):
                drawn[name] = draw(module.weight.numel(), seed)
        plain = measure(row, drawn)
        price = lambda_for(row, plain, drawn)
        cells = ["none reaches it", "", ""]
        if price:
            while (spent := measure(row, drawn, price)).file > row.paper * MB:
                price *= 1.1  # the sample's tail is not the layer's
            cells = [f"{price:.1e}", f"{spent.file / MB:.1f}", f"{spent.error:.3f}"]
        elif price == 0:
            cells = ["not needed", "", ""]
        yield (
            f"| {row.network} {row.bits} | {row.threshold} | {row.pruned:.2%} | {row.paper} "
            f"| {plain.bound / MB:.1f} | {plain.file / MB:.1f} "
            f"| {plain.file / plain.bound - 1:+.1%} | {plain.file / MB - row.paper:+.1f} "
            f"| {plain.error:.4f} | {' | '.join(cells)} |"
        )


LAMBDAS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def trade(layers: dict[str, Tensor], sparsity: float) -> Iterator[str]:
    """Bytes against error for some layers, each pruned to the same share; lines of Markdown."""
    yield "| bits | entropy_lambda | bits a code | streams kB | over entropy | error |"
    yield "|" + " ---: |" * 6
    for bits in (8, 5):
        for entropy_lambda in LAMBDAS:
            config = pk.CompressConfig(bits, sparsity=sparsity, entropy_lambda=entropy_lambda)
            error = square = bound = codes_bound = 0.0
            nnz = size = 0
            for values in layers.values():
                weight = config.compress_tensor(values)
                report = entropy_report(weight)
                kept = values.reshape(weight.shape)[config.mask(values).reshape(weight.shape)]
                codes = weight.to_csr()[2]
                error += float((kept - weight.codebook[codes.int()]).double().square().sum())
                square += float(kept.double().square().sum())
                bound, codes_bound = bound + report.bound, codes_bound + report.codes_bound
                size, nnz = size + report.bytes, nnz + weight.nnz
            yield (
                f"| {bits} | {entropy_lambda:g} | {8 * codes_bound / nnz:.2f} | {size / 1000:.1f} "
                f"| {size / bound - 1:+.1%} | {(error / square) ** 0.5:.4f} |"
            )


def main() -> None:
    """Prints the table, a row as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=("alexnet", "vgg16"), help="only its rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--weights", type=Path, help="instead: bytes against error for an .npz of <layer>.weight"
    )
    parser.add_argument("--sparsity", type=float, default=0.7, help="with --weights")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.weights is None:
        lines = table(row for row in ROWS if chosen.network in (None, row.network))
    else:
        with np.load(chosen.weights) as arrays:
            names = [name for name in arrays.files if name.endswith(".weight")]
            trained = {n: torch.from_numpy(arrays[n].astype(np.float32)) for n in names}
        lines = trade(trained, chosen.sparsity)
    for line in lines:
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
