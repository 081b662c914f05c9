"""Block-sparse convolution against the NumPy meaning of the dense one on masked weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgec.targets import sparsity
from edgec.targets.device import Device, device_names, load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Blocking, Conv2D
from edgec.targets.kernels.sparse import SparseConv2D, blocks_of, fastest, sparse
from tests.targets.kernel_cases import FLOAT_ACTIVATIONS, epilogue, geometry, host, operands
from tests.targets.kernel_runner import assert_close, run_calls, spec_call

# (dtype, input channels of a block): every way of multiplying that a block width can have.
KINDS = (("float32", 1), ("float32", 4), ("int8", 1), ("int8", 2), ("int8", 4), ("int8", 8), ("int8", 16))
BATCH = settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate])


def block_mask(rng: np.random.Generator, spec: Conv2D, block: tuple[int, int], balanced: bool) -> np.ndarray:
    """Random blocks, of the shape of the weights; unbalanced groups may be empty."""
    outputs, inputs = block
    kept = rng.random((-(-spec.co // outputs), spec.ci // inputs)) < rng.choice([0.1, 0.3, 0.6, 1.0])
    if balanced:
        count = int(rng.integers(1, kept.shape[1] + 1))
        kept = np.stack([rng.permutation(kept.shape[1]) < count for _ in kept])
    full = kept.repeat(outputs, 0)[: spec.co].repeat(inputs, 1)
    return np.broadcast_to(full[:, :, None, None], (spec.co, spec.ci, *spec.kernel))


@st.composite
def cases(draw: st.DrawFn, kind: tuple[str, int], lanes: int) -> tuple[Conv2D, tuple[int, int], bool, int]:
    """(dense template, block, balanced, seed): odd maps, strides, padding, dilation; blocks that do not divide."""
    dtype, inputs = kind
    shape = geometry(draw)
    if draw(st.integers(0, 2)) == 0:
        shape |= {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0, 0, 0)}
    outputs = lanes * draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    fused = epilogue(rng, dtype, draw(st.booleans()), draw(st.sampled_from(FLOAT_ACTIVATIONS)))
    x_zp = int(rng.integers(-128, 128)) if dtype == "int8" else 0
    co, ci = draw(st.integers(1, 3 * outputs)), inputs * draw(st.integers(1, 9))
    spec = Conv2D(ci=ci, co=co, dtype=dtype, x_zp=x_zp, epilogue=fused, **shape)
    return spec, (outputs, inputs), draw(st.booleans()), seed


def check(drawn: list[tuple[Conv2D, tuple[int, int], bool, int]], device: Device) -> None:
    calls, expected = [], []
    for dense, block, balanced, seed in drawn:
        mask = block_mask(np.random.default_rng(seed), dense, block, balanced)
        values = operands(dense, seed)
        values["w"] = values["w"] * mask
        spec, kept = sparse(dense, mask, block)
        assert not balanced or spec.balanced
        result = dense.reference(**values)
        weights = {k: v for k, v in values.items() if k not in ("x", "residual")} | {"mask": kept}
        after = [values["residual"]] if dense.residual else []
        # Where there is a residual, the result takes its place.
        at = spec.inplace[0] if spec.inplace else None
        calls.append(spec_call(spec, device, [values["x"]], result, after, at, **weights))
        expected.append(result)
    for (got,), want in zip(run_calls(calls, device), expected, strict=True):
        assert_close(got, want)


@pytest.mark.host
@pytest.mark.parametrize("lanes", (4, 8, 16))
def test_equals_the_dense_kernel_on_masked_weights(lanes: int) -> None:
    @BATCH
    @given(st.tuples(*(cases(kind, lanes) for kind in KINDS for _ in range(2))))
    def batch(drawn: tuple[Any, ...]) -> None:
        check(list(drawn), host() if lanes == 16 and host().lanes == 16 else host(lanes))

    batch()


@pytest.mark.qemu
@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a76", "cortex-x2", "cortex-a7"))
def test_on_arm_cores(name: str) -> None:
    @settings(BATCH, max_examples=1)
    @given(st.tuples(*(cases(kind, 4) for kind in KINDS for _ in range(2))))
    def batch(drawn: tuple[Any, ...]) -> None:
        check(list(drawn), load_device(name))

    batch()


@pytest.mark.qemu
def test_copy_with_a_border() -> None:
    device = load_device("cortex-a72")
    drawn = []
    for padding, dilation, balanced in (((1, 1, 1, 1), (1, 1), True), ((2, 0, 1, 2), (2, 1), False)):
        dense = Conv2D(18, 19, 6, 20, kernel=(3, 3), padding=padding, dilation=dilation)
        spec, _ = sparse(dense, block_mask(np.random.default_rng(3), dense, (16, 1), balanced), (16, 1))
        assert spec.expanded(device).padding == (0, 0, 0, 0)
        drawn.append((dense, (16, 1), balanced, 3))
    check(drawn, device)


@pytest.mark.pure
def test_ways_of_multiplying() -> None:
    """Loads stay within a block; where a block fills them, they are those of the dense kernel."""
    ways = {
        (name, dtype, c): type(SparseConv2D(9, 9, 64, 64, dtype=dtype, block=(16, c)).dot(load_device(name))).__name__
        for name, dtype, c in (
            ("cortex-a72", "float32", 1),
            ("cortex-a72", "float32", 4),
            ("cortex-a72", "int8", 8),
            ("cortex-a72", "int8", 4),
            ("cortex-a76", "int8", 4),
            ("cortex-x2", "int8", 4),
            ("cortex-x2", "int8", 8),
        )
    }
    assert list(ways.values()) == ["Dot", "Lane", "Smull", "Widening", "Sdot", "Sdot", "Smmla"]


@pytest.mark.pure
def test_packing_and_its_order() -> None:
    """Two groups that keep different blocks: weights of the second follow in its own order, offsets name the inputs."""
    device = replace(host(4), tuning={})
    dense = Conv2D(5, 5, 6, 8, kernel=(1, 3), dilation=(1, 2))
    mask = np.zeros((8, 6, 1, 3), bool)
    mask[:4, [1, 4]] = mask[4:, [0, 2, 5]] = True
    w = np.arange(mask.size, dtype=np.float32).reshape(mask.shape) * mask
    spec, kept = sparse(dense, mask, (4, 1))
    assert (spec.kept, spec.nnz, spec.balanced) == (3, 5, False)
    packed, offsets, counts, bias = spec.pack(device, w, None, mask=kept)
    assert offsets.dtype == np.uint8 and counts.tolist() == [2, 3] and bias.shape == (1, 8)
    # Columns are two pixels of six channels apart.
    assert offsets.tolist() == [[1, 4, 13, 16, 25, 28, 0, 0, 0], [0, 2, 5, 12, 14, 17, 24, 26, 29]]
    for g, channels in enumerate(([1, 4], [0, 2, 5])):
        want = w[4 * g : 4 * g + 4, channels, 0].transpose(2, 1, 0).reshape(-1, 4)
        np.testing.assert_array_equal(packed[g, 0, : len(want), 0], want)
        assert not packed[g, 0, len(want) :].any()
    assert spec.macs == 5 * 1 * 3 * 5 * 4
    assert dense.macs == 5 * 1 * 3 * 6 * 8


@pytest.mark.pure
def test_balanced_by_filling_up() -> None:
    """One block short of forty is filled with a zero; the loops then run equally long."""
    mask = np.ones((32, 40), bool)
    mask[:16, 7] = False
    spec, kept = sparse(Conv2D(1, 9, 40, 32), mask[..., None, None], (16, 1))
    assert kept.sum() == 79 and spec.nnz == 80 and spec.balanced
    spec, _ = sparse(Conv2D(1, 9, 40, 32), np.zeros((32, 40, 1, 1), bool), (16, 1))
    assert spec.kept == 1 and spec.balanced


@pytest.mark.pure
def test_many_inputs_have_longer_offsets() -> None:
    for inputs, kind in ((256, "uint8"), (257, "uint16"), (2**17, "int32")):
        assert SparseConv2D(1, 1, inputs, 16, block=(16, 1)).offset_type == kind
    assert SparseConv2D(9, 9, 86, 16, (3, 3), block=(16, 1)).offset_type == "uint16"


@pytest.mark.pure
def test_the_table_decides() -> None:
    """Sparse below the break-even density, dense above; of the blocks a mask allows, the ones expected fastest."""
    device = load_device("cortex-a72")
    dense, rng = Conv2D(14, 14, 64, 64), np.random.default_rng(0)

    def pruned(density: float, outputs: int) -> np.ndarray:
        kept = np.stack([rng.permutation(64) < round(64 * density) for _ in range(64 // outputs)])
        return kept.repeat(outputs, 0)[:, :, None, None]

    even = sparsity.break_even(device, "float32", (16, 1), "1x1")
    assert even is not None and 0.5 < even < 1
    spec, kept = fastest(dense, pruned(even - 0.05, 32), device)
    assert isinstance(spec, SparseConv2D) and kept is not None and spec.block == (16, 1)
    assert fastest(dense, pruned(even + 0.05, 32), device) == (dense, None)
    # Blocks of one output channel leave nearly no input to skip in sixteen.
    assert fastest(dense, pruned(0.5, 1), device)[1] is None
    assert fastest(replace(dense, groups=2), pruned(0.1, 16)[:, :32], device)[1] is None
    # Nothing was measured on this one.
    assert fastest(dense, pruned(0.1, 16), load_device("cortex-a7"))[1] is None


@pytest.mark.pure
def test_table_of_devices() -> None:
    measured = [name for name in device_names() if sparsity.best_block(load_device(name), "float32") is not None]
    assert set(measured) >= {"cortex-a53", "cortex-a72", "neoverse-n1", "cortex-x2"}
    for name in measured:
        device = load_device(name)
        for dtype in ("float32", "int8"):
            block = sparsity.best_block(device, dtype)
            if block is None:
                continue
            assert block[0] % device.lanes == 0
            for kernel in ("1x1", "3x3", "5x5"):
                even = sparsity.break_even(device, dtype, block, kernel)
                assert even is not None and 0.5 < even <= 1
                # A block of twice as many output channels is walked as two.
                assert (sparsity.break_even(device, dtype, (2 * block[0], block[1]), kernel) or 0) > 0.5
    assert sparsity.break_even(load_device("cortex-a7"), "float32", (4, 1), "1x1") is None


@pytest.mark.pure
def test_blocks_of_a_mask() -> None:
    mask = np.zeros((5, 4, 1, 2), bool)
    mask[4, 3, 0, 1] = True
    assert blocks_of(mask, (4, 2)).tolist() == [[False, False], [False, True]]


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("name", "dtype", "block"),
    [
        ("cortex-a72", "float32", (16, 1)),
        ("cortex-a72", "float32", (8, 1)),
        ("neoverse-n1", "float32", (16, 1)),
        ("neoverse-n1", "float32", (8, 1)),
        ("neoverse-n1", "int8", (8, 8)),
    ],
)
def test_inner_loop_does_not_spill(name: str, dtype: str, block: tuple[int, int]) -> None:
    import tvm

    from edgec.targets.codegen import build_objects, lower_kernels
    from edgec.targets.loops import inspect_kernel

    device = load_device(name)
    fused = Epilogue("clip", 0.0, 6.0) if dtype == "float32" else Epilogue(lo=-128, hi=127, requant="RQF")
    groups, kept = 384 // block[0], 384 // block[1] // 2
    spec = SparseConv2D(1, 196, 384, 384, dtype=dtype, epilogue=fused, block=block, kept=kept, nnz=kept * groups)
    function = spec.prim_func(device).with_attr("global_symbol", "kernel")
    lowered = lower_kernels(tvm.IRModule({"kernel": function}), device)
    report = inspect_kernel(build_objects(lowered, device)["kernel"], "kernel", device)
    assert not report.findings(device, dense=True), report.findings(device, dense=True)
    assert isinstance(spec.blocking(device), Blocking)
