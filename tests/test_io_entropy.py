"""The file weighs what its codes and positions must: within 3 % of their order-0 entropy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import placekern as pk
from placekern.io import entropy_bits, entropy_report, gaps, load_deep_compression, streams
from placekern.packing import Layout

# ---- gaps, the other way to write positions ----


def weight_of(mask: Tensor, bits: int = 4) -> pk.QuantSparseWeight:
    codes = torch.randint(0, 1 << bits, (int(mask.sum()),), dtype=torch.uint8)
    return pk.QuantSparseWeight.from_mask(mask, codes, torch.randn(1 << bits))


def gaps_by_hand(mask: Tensor) -> list[int]:
    """Byte by byte, from the words of docs/format.md."""
    flat = mask.flatten().tolist()
    mark = not 2 * sum(flat) > len(flat)
    out, run = [], 0
    for bit in flat:
        if bit == mark:
            out.append(run)
            run = 0
        else:
            run += 1
            if run == 255:
                out.append(255)
                run = 0
    # Positions behind the last mark are not written.
    while out and out[-1] == 255:
        out.pop()
    return out


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 40),
    K=st.integers(1, 700),
    density=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_gaps_are_those_of_the_specification_and_come_back(
    M: int, K: int, density: float, seed: int
) -> None:
    mask = torch.rand(M, K, generator=torch.Generator().manual_seed(seed)) < density
    weight = weight_of(mask)
    raw = gaps.encode(weight)
    assert raw.tolist() == gaps_by_hand(mask)
    low, high = gaps.gap_bytes(M, K, weight.nnz)
    assert low <= len(raw) <= high
    for step in (1, 7, 1 << 20):
        pieces = (raw[i : i + step] for i in range(0, len(raw), step))
        back = gaps.decode("gaps", weight.layout, M, K, weight.nnz, pieces)
        assert torch.equal(torch.from_numpy(back), weight.positions)


def test_gaps_across_pieces_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placekern.packing._CHUNK", 1000)
    for density in (0.02, 0.4, 0.97):
        weight = weight_of(torch.rand(37, 333) < density)
        raw = gaps.encode(weight)
        assert len(raw) == len(gaps_by_hand(weight.to_dense() != 0))
        back = gaps.decode("gaps", weight.layout, 37, 333, weight.nnz, [raw[:90], raw[90:]])
        assert torch.equal(torch.from_numpy(back), weight.positions)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("nnz", [0, 1, 7, 8, 9, 1001])
def test_codes_come_back_at_every_width(bits: int, nnz: int) -> None:
    mask = torch.zeros(7, 300, dtype=torch.bool)
    mask.view(-1)[:nnz] = True
    weight = weight_of(mask, bits)
    encoded = streams.encode(weight)
    back = streams.decode(
        "a", (7, 300), bits, nnz, encoded.positions, encoded.codes, weight.codebook, encoded.coding
    )
    for name in ("row_ptr", "positions", "codes"):
        assert torch.equal(getattr(back, name), getattr(weight, name)), name


def skewed(bits: int, nnz: int = 60_000) -> pk.QuantSparseWeight:
    """Codes of which a few are far commoner than the rest."""
    generator = np.random.default_rng(bits)
    drawn = np.minimum(generator.geometric(0.5, nnz) - 1, (1 << bits) - 1)
    codes = generator.permutation(1 << bits)[drawn].astype(np.uint8)
    mask = torch.zeros(2, nnz, dtype=torch.bool)
    mask[0] = True
    return pk.QuantSparseWeight.from_mask(mask, torch.from_numpy(codes), torch.randn(1 << bits))


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_digits_and_rare_codes_come_back_and_weigh_what_they_must(
    bits: int, tmp_path: Path
) -> None:
    weight = skewed(bits)
    encoded = streams.encode(weight)
    assert len(encoded.common) in (1, 3, 15)
    assert encoded.rare is not None
    codes = weight.to_csr()[2].numpy()
    # By the words of docs/format.md.
    rare = zstandard.ZstdDecompressor().decompress(encoded.rare.numpy().tobytes())
    assert list(rare) == [code for code in codes if code not in encoded.common]
    whole = zstandard.ZstdDecompressor().decompress(encoded.codes.numpy().tobytes())
    width = {1: 1, 3: 2, 15: 4}[len(encoded.common)]
    number = int.from_bytes(whole, "little")
    table = [*encoded.common, None]
    for i in range(0, 4000, 7):
        digit = number >> (i * width) & ((1 << width) - 1)
        assert table[digit] == (codes[i] if codes[i] in encoded.common else None)
    report = entropy_report(weight)
    assert report.codes_bytes < 1.05 * report.codes_bound
    model = nn.Sequential(pk.QuantSparseLinear(60_000, 2, bits=bits, bias=False, device="meta"))
    model[0].weight = weight
    pk.save(model, tmp_path / "a")
    back = pk.load(tmp_path / "a", nn.Sequential(nn.Linear(60_000, 2, bias=False, device="meta")))
    assert torch.equal(back[0].codes, weight.codes)
    pk.save(back, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"common": [0, 2, 1]}, "common codes"),
        ({"common": [0, 1]}, "common codes"),
        ({"common": [0, 1, 32]}, "common codes"),
        ({"common": [-1, 0, 1]}, "common codes"),
        ({"common": [1, 1, 1]}, "common codes"),
        ({"rare": None}, "common codes"),
        ({"rare": "short"}, r"a\.rare unpacks to"),
        ({"rare": "large"}, r"rare ones\)\[0\] is 255, expected < 32"),
        ({"codes": "short"}, r"a\.codes unpacks to"),
    ],
)
def test_damaged_digits_are_refused(change: dict[str, object], message: str) -> None:
    weight = skewed(5)
    encoded = streams.encode(weight)
    arrays: dict[str, object] = {**encoded._asdict(), **change}
    for name in ("codes", "rare"):
        raw = getattr(encoded, name).numpy().tobytes()
        raw = zstandard.ZstdDecompressor().decompress(raw)
        if arrays[name] == "short":
            arrays[name] = stream(raw[:-1])
        elif arrays[name] == "large":
            arrays[name] = stream(b"\xff" * len(raw))
    with pytest.raises(ValueError, match=message):
        streams.decode("a", (2, 60_000), 5, weight.nnz, codebook=weight.codebook, **arrays)


def stream(raw: bytes) -> Tensor:
    packed = zstandard.ZstdCompressor().compress(raw)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def test_a_promise_that_no_frame_of_that_length_keeps_is_not_believed() -> None:
    # 40 GB from a frame of 22 bytes: refused before room is made for them.
    frame = bytes.fromhex("28b52ffde0") + (40 << 30).to_bytes(8, "little") + bytes(9)
    M, K = 1 << 19, 5 << 17
    packed = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    with pytest.raises(ValueError, match="promises 42949672960 bytes from 22, more than zstd"):
        streams.decode("a", (M, K), 8, M * K, packed, packed, torch.zeros(256))


# ---- the bound ----


def test_entropy_bits_by_hand() -> None:
    assert entropy_bits([]) == entropy_bits([0, 0]) == entropy_bits([7]) == 0
    assert entropy_bits([1, 1]) == 2
    assert entropy_bits([2, 1, 1, 0]) == 6
    assert entropy_bits(np.full(256, 3)) == pytest.approx(256 * 3 * 8)


def test_the_report_adds_up() -> None:
    weight = weight_of(torch.rand(40, 500) < 0.25)
    report = entropy_report(weight)
    encoded = streams.encode(weight)
    assert report.positions_bytes == encoded.positions.numel()
    assert report.codes_bytes == encoded.codes.numel()
    d = weight.density
    expected = -(d * math.log2(d) + (1 - d) * math.log2(1 - d)) * 20_000 / 8
    assert report.positions_bound == pytest.approx(expected)
    counts = torch.bincount(weight.to_csr()[2].int(), minlength=16).double()
    expected = float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
    assert report.codes_bound == pytest.approx(expected)
    assert report.excess == pytest.approx(report.bytes / report.bound - 1)
    for layout in (Layout.DENSE, Layout.PAIRS):
        assert entropy_report(weight.to_layout(layout)) == report


# ---- within 3 % ----


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
@pytest.mark.parametrize("density", [0.05, 0.1423, 0.25, 0.5, 0.7423, 0.97])
def test_heavy_tailed_layers(density: float, bits: int) -> None:
    # Student's t with four degrees of freedom; a strip of a whitening layer of 16,384 inputs.
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.standard_t(4, (128, 16_384)).astype(np.float32))
    weight = pk.CompressConfig(bits=bits, sparsity=1 - density).compress_tensor(values)
    report = entropy_report(weight)
    assert report.bytes < 1.03 * report.bound, report


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("entropy_lambda", [1e-3, 1e-2, 0.1, 0.3])
def test_layers_that_were_fitted_for_few_bytes(bits: int, entropy_lambda: float) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_t(4, (64, 16_384)))
    config = pk.CompressConfig(bits=bits, sparsity=0.7, entropy_lambda=entropy_lambda)
    report = entropy_report(config.compress_tensor(values.float()))
    assert report.bytes < 1.03 * report.bound, report


def test_a_whole_file_of_a_whitening_layer(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    layer = nn.Linear(16_384, 512, bias=False)
    values = generator.standard_t(4, (512, 16_384)).astype(np.float32)
    layer.weight = nn.Parameter(torch.from_numpy(values))
    model = nn.Sequential(layer)
    pk.compress_(model, {"bits": 5, "sparsity": 0.7495})
    size = pk.save(model, tmp_path / "layer.safetensors")
    assert size < 1.03 * entropy_report(model[0].weight).bound


def test_layers_with_structure_weigh_less_than_their_entropy() -> None:
    mask = torch.rand(256, 4096) < 0.9
    mask[::2] = False  # every other output is gone
    mask[:, 1000:2000] = False
    codes = torch.zeros(int(mask.sum()), dtype=torch.uint8)
    report = entropy_report(pk.QuantSparseWeight.from_mask(mask, codes, torch.randn(4)))
    assert report.positions_bytes < 0.8 * report.positions_bound


LAYERS = ["conv10", "fire9.expand3x3", "fire5.expand1x1", "fire9.squeeze1x1"]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("bits", "sparsity"), [(8, 0.5), (5, 0.75), (5, 0.5)])
def test_trained_layers(data_dir: Path, name: str, bits: int, sparsity: float) -> None:
    path = data_dir / "squeezenet_coreml" / "squeezenet_v11_fp16.npz"
    if not path.is_file():
        pytest.skip("the trained SqueezeNet is not here")
    with np.load(path) as arrays:
        stored = {key.replace("/", "."): arrays[key] for key in arrays.files}
    values = torch.from_numpy(stored[f"{name}.weight"].astype(np.float32))
    weight = pk.CompressConfig(bits=bits, sparsity=sparsity).compress_tensor(values)
    report = entropy_report(weight)
    # A table of code lengths, some 100 bytes, stands before each stream.
    assert report.bytes < 1.03 * report.bound + 200, (weight, report)


def test_a_network_that_was_pruned_in_training(data_dir: Path) -> None:
    from test_deep_compression import squeezenet

    path = data_dir / "squeezenet_deep_compression" / "compressed_SqueezeNet.net"
    if not path.is_file():
        pytest.skip("the Deep Compression SqueezeNet is not here")
    model = load_deep_compression(path, squeezenet())
    reports = [entropy_report(layer.weight) for _, layer in pk.nn.quant_sparse_layers(model)]
    assert sum(r.bytes for r in reports) < 1.03 * sum(r.bound for r in reports)
