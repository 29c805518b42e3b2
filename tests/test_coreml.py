"""coremltools, where it is installed, reads the buffers of export_coreml as sparse palettes.

It converts on Linux too; only running the result takes an Apple machine.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import placekern as pk
from placekern.io import export_coreml


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_coremltools_makes_sparse_palettes(bits: int, group_size: int | None) -> None:
    ct = pytest.importorskip("coremltools")
    torch.manual_seed(bits)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 64),
    )
    pk.compress_(model.eval(), pk.CompressConfig(bits=bits, sparsity=0.6, group_size=group_size))
    x = torch.rand(1, 3, 16, 16)
    converted = ct.convert(
        torch.jit.trace(export_coreml(model), x),
        inputs=[ct.TensorType("x", shape=x.shape)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    (main,) = converted._mil_program.functions.values()
    found = [op for op in main.operations if op.op_type == "constexpr_lut_to_sparse"]
    layers = [layer for layer in model if hasattr(layer, "codebook")]
    assert len(found) == len(layers) == 3
    for op, layer in zip(found, layers, strict=True):
        mask, codes = op.indices_mask.val, op.indices_nonzero_data.val
        weight = layer.to_dense().weight.detach().numpy()
        entries = 1 << (6 if bits == 5 else bits)
        palettes = op.lut.val.reshape(-1, entries)
        assert len(palettes) == layer.codebooks
        kept = mask.astype(bool)
        channel = np.nonzero(kept)[0]
        decoded = np.zeros_like(weight)
        decoded[kept] = palettes[channel // layer.group_size, codes]
        np.testing.assert_array_equal(decoded, weight)
