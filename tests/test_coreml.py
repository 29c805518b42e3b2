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


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_coremltools_makes_sparse_palettes(bits: int) -> None:
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
    pk.compress_(model.eval(), pk.CompressConfig(bits=bits, sparsity=0.6))
    x = torch.rand(1, 3, 16, 16)
    converted = ct.convert(
        torch.jit.trace(export_coreml(model), x),
        inputs=[ct.TensorType("x", shape=x.shape)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    (main,) = converted._mil_program.functions.values()
    palettes = [op for op in main.operations if op.op_type == "constexpr_lut_to_sparse"]
    layers = [layer for layer in model if hasattr(layer, "codebook")]
    assert len(palettes) == len(layers) == 3
    for op, layer in zip(palettes, layers, strict=True):
        mask, codes = op.indices_mask.val, op.indices_nonzero_data.val
        weight = layer.to_dense().weight.detach().numpy()
        decoded = np.zeros_like(weight)
        decoded[mask.astype(bool)] = op.lut.val.ravel()[codes]
        np.testing.assert_array_equal(decoded, weight)
        assert op.lut.val.size == 1 << (6 if bits == 5 else bits)
