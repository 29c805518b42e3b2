"""How the ops behave on a real GPU: streams, graphs, memory, devices, errors, torch.compile.

Everything here needs what the emulator has not: a driver, a second stream, torch's allocator. What
the kernels compute is tested in test_cuda_linear.py and its sisters.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import random_weight, relative_error
from torch import Tensor

import placekern as pk
from placekern import QuantSparseWeight, _native, device, ops
from placekern.packing import Layout

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or _native.cuda_devices() == 0,
        reason="no GPU, or built without CUDA",
    ),
    pytest.mark.usefixtures("faults_end_the_worker"),
]

LAYOUTS = [Layout.DENSE, Layout.PAIRS]
BUSY = 50_000_000  # cycles, some hundredths of a second


def on_gpu(
    weight: QuantSparseWeight, layout: Layout | None = None, taps: int = 1
) -> QuantSparseWeight:
    layout = weight.best_layout("cuda") if layout is None else layout
    packed = weight.to_layout(layout, taps)
    arrays = (packed.row_ptr, packed.positions, packed.codes, packed.codebook)
    on_device = (array.cuda() for array in arrays)
    return QuantSparseWeight.trusted(
        weight.shape, weight.bits, layout, weight.nnz, *on_device, packed.taps
    )


def gradients(x: Tensor, weight: QuantSparseWeight, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.placekern.linear_backward(grad_y, x, *ops.common.arrays(weight), [True, True])


@pytest.fixture
def any_way() -> Iterator[None]:
    yield
    _native.force_way("auto")


def linear_runs(layout: Layout) -> dict[str, Callable[[], Any]]:
    """Calls of linear, forward and backward, that take every way through device.py."""
    weight = on_gpu(random_weight(48, 520, 0.4, 8), layout)
    runs: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for N in (1, 2, 9, 64, 300):
            x = torch.randn(N, 520, device="cuda", dtype=dtype)
            grad_y = torch.randn(N, 48, device="cuda", dtype=dtype)
            runs[f"linear {dtype} {N}"] = lambda x=x: ops.linear(x, weight, relu=True)
            runs[f"backward {dtype} {N}"] = lambda x=x, dy=grad_y: gradients(x, weight, dy)
    return runs


def conv_runs(layout: Layout) -> dict[str, Callable[[], Any]]:
    """Calls of conv2d, of few pixels and of many."""
    portable = random_weight(24, 8 * 9, 0.4, 8)
    runs: dict[str, Callable[[], Any]] = {}
    for form, taps in ((torch.contiguous_format, 1), (torch.channels_last, 9)):
        weight = on_gpu(portable, layout, taps)
        for dtype in (torch.float32, torch.bfloat16):
            for size in (5, 40):
                x = torch.randn(2, 8, size, size, device="cuda", dtype=dtype)
                x = x.contiguous(memory_format=form)
                runs[f"conv2d {dtype} {size} {form}"] = lambda x=x, weight=weight: ops.conv2d(
                    x, weight, kernel_size=(3, 3), padding=(1, 1)
                )
    return runs


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check_close(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    # Not equal to the last bit: the dense libraries may choose another algorithm.
    for one, other in zip(results, expected, strict=True):
        assert relative_error(one, other) < 5e-3, name


# ---- streams, graphs, waiting ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_goes_to_the_callers_stream(layout: Layout) -> None:
    weight = random_weight(32, 300, 0.5, 8)
    moved, dense = on_gpu(weight, layout), weight.to_dense()
    for N in (1, 20, 200):
        late = torch.randn(N, 300).cuda()
        x = torch.zeros_like(late)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY)
            x.copy_(late)  # a kernel on another stream would see zeros
            y = ops.linear(x, moved)
        stream.synchronize()
        assert relative_error(y.cpu(), late.cpu() @ dense.T) < 2e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_streams_at_once(layout: Layout) -> None:
    runs = {**linear_runs(layout), **conv_runs(layout)}
    expected = {name: as_tuple(run()) for name, run in runs.items()}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[dict[str, tuple[Tensor, ...]]] = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append({name: as_tuple(run()) for name, run in runs.items()})
    torch.cuda.synchronize()
    for result in results:
        for name, tensors in result.items():
            check_close(name, tensors, expected[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_replay_what_was_captured(layout: Layout) -> None:
    runs = {**linear_runs(layout), **conv_runs(layout)}
    for name, run in runs.items():
        expected = as_tuple(run())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = as_tuple(run())
        for result in results:
            result.fill_(7)  # what the replay must overwrite
        graph.replay()
        check_close(name, results, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_device(layout: Layout) -> None:
    runs = {**linear_runs(layout), **conv_runs(layout)}
    for run in runs.values():
        run()  # libraries may wait when they are first used
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in runs.values():
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_waits_for_nothing() -> None:
    layers = torch.nn.Sequential(
        pk.QuantSparseConv2d(3, 16, 3, bits=5),
        torch.nn.Flatten(),
        pk.QuantSparseLinear(16 * 36, 10, bits=8),
    ).cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layers(x).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in layers.parameters())


# ---- memory ----


def added(run: Callable[[], Any]) -> int:
    """Bytes by which torch's peak rises above what is in use before, results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_pass_writes_the_dense_weight(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    M, K = 1024, 12_288
    weight = on_gpu(random_weight(M, K, 0.3, 8), layout)
    dense = 2 * M * K  # bytes in bfloat16
    monkeypatch.setattr(device, "SCRATCH_BYTES", dense // 8)
    for N in (1, 2, 16, 64, 1024):
        x = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
        assert added(lambda x=x: ops.linear(x, weight)) < dense, N
    x, grad_y = x[:32].contiguous(), torch.randn(32, M, device="cuda", dtype=torch.bfloat16)
    assert added(lambda: gradients(x, weight, grad_y)) < 2 * dense  # a dense gradient in float32


def test_memory_does_not_grow() -> None:
    runs = {**linear_runs(Layout.PAIRS), **conv_runs(Layout.DENSE)}
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for run in runs.values():
            run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_running_out_of_memory_leaves_the_layer_usable() -> None:
    layer = pk.QuantSparseLinear(128, 64, bits=8).cuda()
    x = torch.randn(1, 128, device="cuda")
    before = layer(x)
    _, total = torch.cuda.mem_get_info()
    rows = 2 * total // (4 * 64)
    with pytest.raises(torch.cuda.OutOfMemoryError), torch.no_grad():
        layer(x.expand(rows, 128))
    assert torch.equal(layer(x), before)


# ---- errors ----


def test_a_launch_that_fails_says_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = on_gpu(random_weight(16, 64, 0.5, 8), Layout.DENSE)
    x = torch.randn(1, 64, device="cuda")
    before = ops.linear(x, weight)
    with monkeypatch.context() as patch:
        patch.setattr(device, "_direct_splits", lambda *_: 70_000)  # a grid has 65,535 at most
        with pytest.raises(RuntimeError, match=r"M = 16, K = 64, N = 1, grid 1 x 70000 x 1"):
            ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight), before)  # the error is not found by a later call


def test_tensors_on_two_kinds_of_device_are_refused() -> None:
    layer = pk.QuantSparseLinear(16, 8, bits=5).cuda()
    with pytest.raises(ValueError, match="move the layer"):
        layer(torch.randn(2, 16))
    with pytest.raises(ValueError, match="move the layer"):
        layer.cpu()(torch.randn(2, 16, device="cuda"))


# ---- devices ----


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    weight = random_weight(40, 300, 0.4, 8)
    dense = weight.to_dense()
    with torch.cuda.device(0):
        moved = weight.to("cuda:1")
        for N in (1, 20, 300):
            x = torch.randn(N, 300)
            y = ops.linear(x.to("cuda:1"), moved)
            assert y.device == torch.device("cuda", 1)
            assert relative_error(y.cpu(), x @ dense.T) < 2e-3
        assert torch.cuda.current_device() == 0
        with pytest.raises(ValueError, match="move the layer"):
            ops.linear(torch.randn(1, 300, device="cuda:0"), moved)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (pk.QuantSparseLinear(100, 40, bits=8), torch.randn(3, 100)),
        lambda: (pk.QuantSparseConv2d(4, 20, 3, bits=5, groups=2), torch.randn(2, 4, 9, 9)),
    ],
    ids=["linear", "conv2d"],
)
def test_layers_move_between_devices_and_are_copied(
    make: Callable[[], tuple[torch.nn.Module, Tensor]],
) -> None:
    layer, x = make()
    before = layer(x)
    empty = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    layer.cuda()
    assert all(t.is_cuda for t in layer.state_dict().values())
    assert relative_error(layer(x.cuda()).cpu(), before) < 2e-3
    for target in (copy.deepcopy(empty), copy.deepcopy(empty).cuda()):
        target.load_state_dict(layer.state_dict())
        where = target.codebook.device
        assert relative_error(target(x.to(where)).cpu(), before) < 2e-3
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x.cuda()), layer(x.cuda()))
    assert torch.equal(layer.cpu()(x), before)


def test_filters_are_packed_tap_by_tap_in_channels_last() -> None:
    layer = pk.QuantSparseConv2d(16, 24, 3, padding=1)
    x = torch.randn(2, 16, 9, 9)
    wanted = layer(x)
    portable = {name: array.clone() for name, array in layer.state_dict().items()}
    layer.cuda()
    assert layer.weight.taps == 1
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.taps == 9
    image = x.cuda().contiguous(memory_format=torch.channels_last)
    y = layer(image.bfloat16())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y.cpu(), wanted) < 1.2e-2
    fresh = pk.QuantSparseConv2d(16, 24, 3, padding=1).to("cuda", memory_format=torch.channels_last)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.weight.taps == 9
    assert torch.equal(fresh(image.bfloat16()), y)
    compressed = pk.QuantSparseConv2d.from_float(fresh.to_dense(), pk.CompressConfig(bits=8))
    assert compressed.weight.taps == 9
    assert compressed.weight.to("cpu").taps == 1
    assert compressed.weight.to("cpu").to("cuda", taps=9).taps == 9
    layer.cpu()
    for name, array in layer.state_dict().items():
        assert torch.equal(array, portable[name])


def test_autocast_takes_half_precision() -> None:
    layer = pk.QuantSparseLinear(100, 40, bits=8).cuda()
    x = torch.randn(5, 100, device="cuda")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert relative_error(y.cpu(), layer(x).cpu()) < 2e-2


def test_compiled_layers_agree() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton on a GPU")
    layer = pk.QuantSparseLinear(100, 40, bits=8, relu=True).cuda()
    x = torch.randn(5, 100, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda x: layer(2 * x).sum(0), fullgraph=True)
    expected = layer(2 * x).sum(0)
    assert relative_error(compiled(x), expected) < 1e-5
    gradients = torch.autograd.grad(expected.sum(), [x, layer.codebook])
    compiled(x).sum().backward()
    assert relative_error(x.grad, gradients[0]) < 1e-5
    assert relative_error(layer.codebook.grad, gradients[1]) < 1e-5
