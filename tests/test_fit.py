"""Networks that do not fit are made to fit, with the same result, or refused with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import fit as benchmark
from benchmarks import mobilenet
from edgec import fit
from edgec.bundle import build_bundle
from edgec.errors import EdgecError
from edgec.fit import check_flash, fit_memory
from edgec.frontend import load_model
from edgec.lowering.device_io import device_io
from edgec.lowering.lower import lower_staged, lower_torch
from edgec.plan import Plan, PlanBuilder
from edgec.program import Program, is_call
from edgec.targets.device import load_device
from tests.fitting import plan_of
from tests.lowering.helpers import load, samples
from tests.lowering.test_tiles import Builder

aten = torch.ops.aten
edgec = torch.ops.edgec
POINT, SAME = ((1, 1), (1, 1), [0] * 4, (1, 1)), ((3, 3), (1, 1), [1] * 4, (1, 1))
HALF = ((3, 3), (2, 2), [1] * 4, (1, 1))


def mobile(seed: int = 0, size: int = 24) -> Program:
    """Inverted residuals behind a convolution, then a mean: int8 [1, size, size, 3] to [1, 24]."""
    b = Builder(seed, (1, size, size, 3))
    x = b.conv(b.x, 8, *HALF)
    for c, stride in ((8, 1), (12, 2), (12, 1), (24, 2), (24, 1)):
        wide = b.conv(x, 4 * x.meta["val"].shape[3], *POINT)
        deep = b.conv(
            wide, wide.meta["val"].shape[3], *(HALF if stride == 2 else SAME), groups=wide.meta["val"].shape[3]
        )
        same = stride == 1 and c == x.meta["val"].shape[3]
        x = b.conv(deep, c, *POINT, residual=x if same else None)
    side = size // 8
    b.call(edgec.qmean.default, x, [1, 2], False, 2**28 // side**2, 28, 0, 0, -128, 127)
    return Program("mobile", b.module(), (b.example,))


def run(program: Program, seed: int = 3) -> torch.Tensor:
    shape = program.inputs[0].shape
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return program(codes)[0]


@pytest.mark.pure
def test_what_fits_stays() -> None:
    program = mobile()
    needed = plan_of(program).arena_bytes
    assert fit_memory(program, plan_of, needed) == (program, [])


@pytest.mark.pure
@pytest.mark.parametrize("methods", [("strips", "patches"), ("patches",)])
@pytest.mark.parametrize("share", [0.6, 0.35])
def test_a_network_is_tiled_to_a_share_of_its_memory(methods: tuple[str, ...], share: float) -> None:
    program = mobile(size=32)
    whole = plan_of(program)
    budget = int(whole.arena_bytes * share)
    fitted, lines = fit_memory(program, plan_of, budget, methods)
    plan = plan_of(fitted)
    assert plan.arena_bytes <= budget
    assert torch.equal(run(fitted), run(program))
    assert lines
    for line in lines:
        assert any(f" in {m} of " in line for m in methods)
        assert "no more MACs" in line or " in patches of " in line
    macs = [sum(fit.macs_of(n) for n in p.graph.nodes) for p in (program, fitted)]
    if "strips" in methods:
        assert macs[1] <= macs[0]
    else:
        assert macs[0] < macs[1] < 1.5 * macs[0]
    assert fit_memory(program, plan_of, budget, methods)[0].text() == fitted.text()


@pytest.mark.pure
def test_a_residual_network_is_streamed_over_its_strides() -> None:
    """Maps of equal size, a block with a residual, and one with a stride in both of its branches."""
    b = Builder(2, (1, 24, 24, 3))
    x = b.conv(b.x, 8, *SAME)
    x = b.conv(b.conv(x, 8, *SAME), 8, *SAME, residual=x)
    side = b.conv(x, 16, (1, 1), (2, 2), [0] * 4, (1, 1))
    x = b.conv(b.conv(x, 16, *HALF), 16, *SAME, residual=side)
    b.call(edgec.qmean.default, x, [1, 2], False, 2**20, 28, 0, 0, -128, 127)
    program = Program("residual", b.module(), (b.example,))
    whole = plan_of(program).arena_bytes
    fitted, lines = fit_memory(program, plan_of, whole * 7 // 10)
    assert plan_of(fitted).arena_bytes <= whole * 7 // 10
    assert torch.equal(run(fitted), run(program))
    assert all("no more MACs" in line for line in lines)


@pytest.mark.pure
def test_another_order_comes_first() -> None:
    b = Builder(0, (1, 8, 8, 4))
    wide = [b.conv(b.x, 16, *POINT) for _ in range(3)]
    narrow = [b.conv(w, 2, *POINT) for w in wide]
    rest = (600, 500, 10, 1, 2, 3, -128, 127)
    b.call(edgec.qadd.default, b.call(edgec.qadd.default, *narrow[:2], *rest), narrow[2], *rest)
    program = Program("branches", b.module(), (b.example,))
    fitted, lines = fit_memory(program, plan_of, 1500)
    assert lines == ["order of the steps: 3,200 to 1,280 bytes"]
    assert plan_of(fitted).arena_bytes == 1280
    assert torch.equal(run(fitted), run(program))


@pytest.mark.pure
def test_plans_that_need_more_than_promised_are_tried_again() -> None:
    """Kernels whose scratch memory the model cannot know: a fifth is added to every plan."""

    def larger(program: Program) -> Plan:
        plan = plan_of(program)
        return dataclasses.replace(plan, arena_bytes=plan.arena_bytes * 6 // 5)

    program = mobile()
    budget = larger(program).arena_bytes // 2
    fitted, _ = fit_memory(program, larger, budget)
    assert larger(fitted).arena_bytes <= budget
    assert torch.equal(run(fitted), run(program))


@pytest.mark.pure
def test_what_cannot_fit_is_refused_with_the_smallest_arena() -> None:
    program = mobile()
    with pytest.raises(EdgecError) as caught:
        fit_memory(program, plan_of, 500)
    error = caught.value
    whole = plan_of(program)
    assert f"the arena takes {whole.arena_bytes:,} bytes and may take 500" in error.what
    # The largest map of the network, of the layer that makes it, stands first.
    assert "at the peak: layer" in error.what
    assert f"{max(b.nbytes for b in whole.buffers.values() if b.kind == 'temp'):,}" in error.what
    assert "prune-channels" in (error.hint or "") and "smaller input" in (error.hint or "")
    smallest = int(error.what.split("smallest arena found: ")[1].split(" ")[0].replace(",", ""))
    assert 500 < smallest < whole.arena_bytes // 2
    fitted, _ = fit_memory(program, plan_of, smallest)
    assert plan_of(fitted).arena_bytes <= smallest


@pytest.mark.pure
def test_a_network_that_no_tile_can_help() -> None:
    """Everything depends on everything."""
    b = Builder(0, (1, 8, 8, 4))
    x = b.conv(b.x, 64, *POINT)
    mean = b.call(edgec.qmean.default, x, [1, 2], True, 2**20, 26, 0, 0, -128, 127)
    b.call(edgec.qmul.default, x, mean, 2**20, 28, 0, 0, 0, -128, 127)
    program = Program("global", b.module(), (b.example,))
    with pytest.raises(EdgecError, match="tiling does not help"):
        fit_memory(program, plan_of, 3000)


@pytest.mark.pure
@pytest.mark.parametrize("methods", [("strips",), ("patches",)])
def test_values_that_pass_by_a_stage_count(methods: tuple[str, ...]) -> None:
    """A map that is used again at the end (as in detectors) is alive beside the tiles in between."""
    b = Builder(1, (1, 32, 32, 3))
    early = b.conv(b.x, 8, *HALF)
    x = early
    for c in (12, 8):
        wide = b.conv(x, 64, *POINT)
        deep = b.conv(wide, 64, *HALF, groups=64)
        x = b.conv(deep, c, *POINT)
    mean = b.call(edgec.qmean.default, x, [1, 2], True, 2**24, 28, 0, 0, -128, 127)
    b.call(edgec.qmul.default, early, mean, 2**24, 28, 0, 0, 0, -128, 127)
    program = Program("early", b.module(), (b.example,))
    whole = plan_of(program).arena_bytes
    fitted, lines = fit_memory(program, plan_of, whole // 2, methods)
    assert plan_of(fitted).arena_bytes <= whole // 2
    assert torch.equal(run(fitted), run(program))
    assert any(f"in {methods[0]} of" in line for line in lines)


@pytest.mark.pure
def test_what_the_search_expects_is_what_is_planned() -> None:
    program = mobile()
    expected, planned = [], []
    original = fit._fitting

    def fitting(*args):
        found = original(*args)
        assert found is not None
        expected.append(found[2])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_fitting", fitting)
        for share in (0.8, 0.6, 0.5, 0.4):
            fitted, _ = fit_memory(program, plan_of, int(plan_of(program).arena_bytes * share))
            planned.append(plan_of(fitted).arena_bytes)
    assert planned == expected


@pytest.mark.pure
def test_flash() -> None:
    builder = PlanBuilder("net")
    x = builder.add_input("x", (4,), "int8")
    for layer, size in (("small", 100), ("large", 5000), ("middle", 700)):
        y = builder.add_temp((4,), "int8")
        builder.add_step("k", [x, builder.add_constant(np.full(size, size % 100, np.int8)), y], layer=layer)
        x = y
    builder.add_output("y", x, (4,), "int8")
    plan = builder.finish()
    check_flash(plan, 1000, 6800)
    with pytest.raises(
        EdgecError, match=r"5,800 bytes of weights and 1,000 of code.*large 5,000, middle 700, small 100"
    ):
        check_flash(plan, 1000, 6799)


@pytest.mark.qemu("cortex-m4")
def test_compiled_for_a_microcontroller(tmp_path: Path) -> None:
    """The tiled network's C code gives the codes of the untiled graph."""
    device, program = load_device("cortex-m4"), mobile()

    def planned(staged: Program) -> Plan:
        return lower_staged(staged, {}, device).plan

    budget = planned(program).arena_bytes // 2
    fitted, _ = fit_memory(program, planned, budget, ("patches",))
    assert any(is_call(n, edgec.place_nhwc.default) for n in fitted.graph.nodes)
    lowered = lower_staged(fitted, {}, device)
    assert lowered.plan.arena_bytes <= budget
    bundle = build_bundle(lowered, device, tmp_path / "bundle")
    codes = np.random.default_rng(0).integers(-128, 128, program.inputs[0].shape).astype(np.int8)
    want = program(torch.from_numpy(codes))[0].numpy()
    np.testing.assert_array_equal(bundle.run(codes), want)
    bundle.emulate = True
    np.testing.assert_array_equal(bundle.run(codes), want)


@pytest.mark.slow
@pytest.mark.qemu("cortex-m4")
def test_float_networks_keep_their_bits(tmp_path: Path) -> None:
    """Generated code adds the products of an element in one order, whatever the size of the map."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1), nn.Hardswish(), nn.MaxPool2d(3, 2, 1)]
    device, program = load_device("cortex-m4"), load(nn.Sequential(*layers), (1, 3, 32, 32))
    staged, forms = device_io(lower_torch(program))

    def planned(staged: Program) -> Plan:
        return lower_staged(staged, forms, device).plan

    fitted, lines = fit_memory(staged, planned, planned(staged).arena_bytes * 2 // 3, ("patches",))
    assert "in patches of" in lines[0]
    x = samples(program)[0].numpy()
    results = []
    for name, graph in (("whole", staged), ("tiled", fitted)):
        results.append(build_bundle(lower_staged(graph, forms, device), device, tmp_path / name).run(x))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_allclose(results[0], program(torch.from_numpy(x))[0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.pure
def test_mobilenet_v2_has_its_published_size() -> None:
    """3,504,872 parameters, 300.8 million multiplications at 224 pixels (Sandler et al. give 3.4 M and 300 M)."""
    network = mobilenet.MobileNetV2()
    assert sum(p.numel() for p in network.parameters()) == 3_504_872
    staged = lower_torch(load_model(network.eval(), input_shape=(1, 3, 224, 224)))
    assert sum(fit.macs_of(n) for n in staged.graph.nodes) == 300_774_272 - 1280 * 1000


@pytest.mark.slow
@pytest.mark.qemu("cortex-m4")
def test_table() -> None:
    """The program behind the figures, on the first blocks of a small MobileNetV2."""
    program = mobilenet.create(0.35, 48, blocks=4)
    lines = list(benchmark.rows(program, "cortex-m4", [20.0], ("strips", "patches"), count=True))
    whole, tiled = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert whole[7] == tiled[7] == "yes"
    assert int(tiled[2].replace(",", "")) <= 20 * 1024 < int(whole[2].replace(",", ""))
    assert tiled[3] == "1.000"
    instructions = [int(row[6].replace(",", "")) for row in (whole, tiled)]
    assert instructions[0] < instructions[1] < 1.1 * instructions[0]
