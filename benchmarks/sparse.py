"""What block sparsity buys: sparse kernels against the tuned dense ones, and whole networks at 50 % and 75 %.

    python -m benchmarks.sparse kernels [--device host --device cortex-a72 ...] [--save FILE.json] [--plot FILE.svg]
    python -m benchmarks.sparse kernels --table targets/sparsity.toml     # and keep what was found, for the compiler
    python -m benchmarks.sparse networks [--model cifar10_resnet44] [--kind fp32] [--device host] [--save FILE.json]

Masks are random with the same number of blocks in each group of output channels; time depends on nothing else of them.
On this machine dense and sparse code take turns and the median of the ratios of each turn counts; on Arm cores exact
instructions under QEMU do. Weights are in the cache for single kernels, and come from wherever they are in networks.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import typer  # noqa: E402

from benchmarks import aarch64, timing  # noqa: E402
from edgec.errors import EdgecError  # noqa: E402
from edgec.targets import sparsity  # noqa: E402
from edgec.targets.cpu.timer import KernelTimer  # noqa: E402
from edgec.targets.device import Device, load_device  # noqa: E402
from edgec.targets.kernels.common import Epilogue  # noqa: E402
from edgec.targets.kernels.conv2d import Conv2D  # noqa: E402
from edgec.targets.kernels.sparse import SparseConv2D, sparse  # noqa: E402
from edgec.targets.qemu.kernel import profile_kernel  # noqa: E402

if TYPE_CHECKING:
    from edgec.program import Program

Block = tuple[int, int]
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.125)
NETWORK_DENSITIES = (0.5, 0.25)
ROUNDS = 15
# Layers of the middle of MobileNetV1-0.75 and of a CIFAR ResNet.
SHAPES = {"1x1": Conv2D(1, 196, 384, 384), "3x3": Conv2D(16, 16, 64, 64, (3, 3), padding=(1, 1, 1, 1))}
EPILOGUES = {"float32": Epilogue("clip", 0.0, 6.0), "int8": Epilogue(lo=-128, hi=127, requant="RQF")}
# Devices whose code for these kernels is the same but for its schedule.
ALIKE = {
    "cortex-a72": ("cortex-a53", "cortex-a72"),
    "neoverse-n1": ("cortex-a55", "cortex-a76", "neoverse-n1"),
}
MODELS = ("imagenet_mobilenetv1_075_224", "cifar10_resnet44")
# The default block is the smallest one whose kernel is at most this much slower than the fastest, at half density.
NEAR = 1.15
MOST_INPUTS = 8


@dataclass(frozen=True)
class Point:
    """One kernel at one density. ratio: its cost by that of the dense kernel; unit: "us" or "instructions"."""

    device: str
    dtype: str
    block: Block
    kernel: str
    density: float
    cost: float
    ratio: float
    unit: str


# -- kernels -----------------------------------------------------------------------------------------------------------


def blocks(device: Device, dtype: str) -> list[Block]:
    """The blocks worth measuring on a device: one to four registers of output channels."""
    lanes = device.lanes
    inputs = [1] if dtype == "float32" else [4, 8]
    if dtype == "int8" and device.is_arm64 and not device.has_dot:
        inputs = [1, 8]
    outputs = [n * lanes for n in ((1, 2, 3) if lanes > 4 else (1, 2, 4)) if n * lanes >= 4]
    return [(n, c) for c in inputs for n in outputs]


def masked(dense: Conv2D, block: Block, density: float, seed: int = 0) -> tuple[SparseConv2D, np.ndarray]:
    """A sparse template, and which blocks it keeps: at random, as many in each group."""
    rng = np.random.default_rng(seed)
    groups, inputs = -(-dense.co // block[0]), dense.ci // block[1]
    kept = np.stack([rng.permutation(inputs) < max(1, round(density * inputs)) for _ in range(groups)])
    full = kept.repeat(block[0], 0)[: dense.co].repeat(block[1], 1)
    return sparse(dense, full[:, :, None, None], block)


def curve(dense: Conv2D, block: Block, kernel: str, device: Device, densities: Sequence[float]) -> list[Point]:
    """The cost of the sparse kernel at each density. Raises EdgecError, ToolchainMissing."""
    made = [masked(dense, block, density) for density in densities]
    host = device.runner == "native"
    unit = "us" if host else "instructions"
    name = sparsity.core(device)
    if host:
        costs = _times(dense, made, device)
        ratios = [statistics.median(a / b for a, b in zip(row, costs[0], strict=True)) for row in costs[1:]]
        medians = [1e6 * statistics.median(row) for row in costs[1:]]
    else:
        full, *medians = [_count(spec, device) for spec in (dense, *(s for s, _ in made))]
        ratios = [count / full for count in medians]
    points = zip(densities, medians, ratios, strict=True)
    return [Point(name, dense.dtype, block, kernel, d, round(c, 3), round(r, 4), unit) for d, c, r in points]


def _times(dense: Conv2D, made: Sequence[tuple[SparseConv2D, np.ndarray]], device: Device) -> list[list[float]]:
    """Seconds of one call by round, of the dense kernel and of each sparse one, which take turns."""
    timers = []
    for spec in (dense, *(s for s, _ in made)):
        timers.append(KernelTimer(device))
        timers[-1].add([spec.prim_func(device)])
    for timer, (spec, kept) in zip(timers[1:], made, strict=True):
        zeros = np.zeros((dense.co, dense.ci, *dense.kernel), dense.dtype)
        rest = (
            {"m": np.zeros(dense.co, np.float32), "bias": np.zeros(dense.co, np.int32)} if zeros.itemsize == 1 else {}
        )
        timer.put(2, spec.pack(device, zeros, **{"bias": None, **rest}, mask=kept)[1])
    return [list(row) for row in zip(*([t.run(0) for t in timers] for _ in range(ROUNDS)), strict=True)]


def _count(spec: Any, device: Device) -> float:
    with tempfile.TemporaryDirectory(prefix="edgec-sparse-") as folder:
        return float(profile_kernel(spec, device, Path(folder)).total)


def break_even(points: Iterable[Point]) -> float | None:
    """The density at which one curve reaches the dense kernel's cost, interpolated; None when it never does."""
    line = sorted((p.density, p.ratio) for p in points)
    if line[0][1] >= 1:
        return None
    for (d0, r0), (d1, r1) in itertools.pairwise(line):
        if r1 > 1:
            return round(d0 + (d1 - d0) * (1 - r0) / (r1 - r0), 2)
    return 1.0


def measure_kernels(
    device: Device, dtypes: Sequence[str], densities: Sequence[float] = DENSITIES, shapes: Mapping[str, Conv2D] = SHAPES
) -> list[Point]:
    found = []
    for dtype in dtypes:
        for kernel, shape in shapes.items():
            dense = dataclasses.replace(shape, dtype=dtype, epilogue=EPILOGUES[dtype])
            for block in blocks(device, dtype):
                found += curve(dense, block, kernel, device, densities)
    return found


def curves(points: Iterable[Point]) -> dict[tuple[str, str, Block, str], list[Point]]:
    found: dict[tuple[str, str, Block, str], list[Point]] = {}
    for p in points:
        found.setdefault((p.device, p.dtype, p.block, p.kernel), []).append(p)
    return found


def kernel_table(points: Sequence[Point]) -> str:
    """Cost by that of the dense kernel: a line for each block, a column for each density."""
    densities = sorted({p.density for p in points}, reverse=True)
    rows = []
    for (device, dtype, block, kernel), line in curves(points).items():
        ratios = {p.density: p.ratio for p in line}
        even = break_even(line)
        cells = [f"{ratios[d]:.2f}" if d in ratios else "" for d in densities]
        rows.append(
            [device, dtype, f"{block[0]}x{block[1]}", kernel, *cells, "never" if even is None else f"{even:.2f}"]
        )
    return timing.markdown(("device", "type", "block", "kernel", *map(str, densities), "break-even"), rows, text=4)


def best(points: Sequence[Point], dtype: str) -> Block | None:
    """The smallest block of one device that is nearly as fast as the fastest at half density, over all kernels."""
    costs: dict[Block, float] = {}
    for (_, kind, block, _), line in curves(points).items():
        half = [p.ratio for p in line if p.density == 0.5]
        if kind == dtype and half and block[1] <= MOST_INPUTS:
            costs[block] = costs.get(block, 0.0) + half[0]
    near = [block for block, cost in costs.items() if cost <= NEAR * min(costs.values())]
    kernels = len({p.kernel for p in points})
    near = [block for block in near if costs[block] < kernels]
    return min(near, key=lambda block: (block[0] * block[1], costs[block])) if near else None


def write_table(path: Path, points: Sequence[Point]) -> None:
    """Put what was measured into the file at `path`, in the place of what it says of the same devices."""
    sections = list(tomllib.loads(path.read_text())["kernel"])
    for device in dict.fromkeys(p.device for p in points):
        ours = [p for p in points if p.device == device]
        names = ALIKE.get(device, (device,))
        dtypes = {p.dtype for p in ours}
        rows: list[dict[str, Any]] = []
        defaults: dict[str, Block] = {}
        for section in sections:
            if device in section["devices"]:
                # What was not measured now is kept.
                rows += [row for row in section["rows"] if row["dtype"] not in dtypes]
                defaults |= {dtype: block for dtype, block in section["best"].items() if dtype not in dtypes}
            section["devices"] = [name for name in section["devices"] if name not in names]
        for (_, dtype, block, kernel), line in curves(ours).items():
            even = break_even(line)
            if even is not None:
                rows.append({"dtype": dtype, "block": block, "kernel": kernel, "break_even": even})
        found = {dtype: best(ours, dtype) for dtype in sorted(dtypes)}
        unit = "time" if ours[0].unit == "us" else ours[0].unit
        defaults |= {dtype: block for dtype, block in found.items() if block is not None}
        sections.append({"devices": list(names), "measured": unit, "rows": rows, "best": defaults})
    text = path.read_text().split("[[kernel]]")[0].rstrip() + "\n"
    for section in sections:
        if not section["devices"]:
            continue
        text += (
            f'\n[[kernel]]\ndevices = {json.dumps(section["devices"])}\nmeasured = "{section["measured"]}"\nrows = [\n'
        )
        for row in section["rows"]:
            cells = ", ".join(f"{k} = {json.dumps(v)}" for k, v in row.items())
            text += f"    {{ {cells} }},\n"
        pairs = ", ".join(f"{k} = {json.dumps(v)}" for k, v in section["best"].items())
        text += f"]\nbest = {{ {pairs} }}\n"
    path.write_text(text)


def draw(points: Sequence[Point], target: Path) -> None:
    """Cost by density, a panel for each device and type. Raises EdgecError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise EdgecError("matplotlib is not installed", where="--plot", hint="pip install matplotlib") from error
    matplotlib.rcParams["svg.hashsalt"] = "edgec"
    panels = list(dict.fromkeys((p.device, p.dtype) for p in points))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 2.9 * lines), squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        names = sorted({p.block for p in points if (p.device, p.dtype) == panel})
        for (device, dtype, block, kernel), line in curves(points).items():
            if (device, dtype) == panel:
                style = "-" if kernel == "1x1" else "--"
                label = f"{block[0]}x{block[1]}, {kernel}"
                axes.plot(
                    [p.density for p in line],
                    [p.ratio for p in line],
                    style,
                    color=f"C{names.index(block)}",
                    label=label,
                )
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axes.axhline(1, color="0.7", linewidth=1)
        axes.set(title=" ".join(panel), xlabel="density", ylabel="cost / dense", xlim=(0, 1), ylim=(0, 2))
        axes.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


# -- networks ----------------------------------------------------------------------------------------------------------


def pruned(program: Program, block: Block, density: float, seed: int = 0) -> Program:
    """`program` with random blocks of its convolutions, all but the first, depthwise ones and linear layers.

    A layer that does not have whole blocks of input channels stays dense.
    """
    import torch

    from edgec.program import get_weight, is_call
    from edgec.sparsity import Sparsity

    generator = torch.Generator().manual_seed(seed)
    module, annotations = program.edit(), dict(program.annotations)
    convolutions = [n for n in module.graph.nodes if is_call(n, torch.ops.aten.conv2d.default)]
    for node in convolutions[1:]:
        weight = get_weight(module, node.args[1])
        outputs, inputs = weight.shape[:2]
        grouped = len(node.args) > 6 and node.args[6] != 1
        if grouped or inputs % block[1]:
            continue
        kept = torch.zeros(-(-outputs // block[0]), inputs // block[1], dtype=torch.bool)
        for row in kept:
            row[torch.randperm(len(row), generator=generator)[: max(1, round(density * len(row)))]] = True
        mask = kept.repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)[:, :, None, None]
        mask = mask.expand_as(weight).contiguous()
        weight.data.mul_(mask)
        annotations[str(node.args[1].target)] = Sparsity("block", block, mask, balanced=True)
    return program.replace(module, annotations)


def network(name: str, kind: str, device: Device, densities: Sequence[float] = NETWORK_DENSITIES) -> dict[str, Any]:
    """Cost of one network, dense and pruned in the block that is best on the device. Raises EdgecError."""
    block = sparsity.best_block(device, aarch64.DTYPES[kind])
    if block is None:
        raise EdgecError(f"no block is known to pay for {kind}", where=device.name, hint="run `kernels --table` first")
    program, data = aarch64.load(name)
    # The mask comes before the other passes, as pruning does.
    programs = {1.0: program, **{d: pruned(program, block, d) for d in densities}}
    ready = {d: aarch64.prepare(p, data, kind, device) for d, p in programs.items()}
    if device.runner == "native":
        costs, unit = _network_times(ready, device), "ms"
    else:
        costs = {d: aarch64.measure(p, kind, device, False).instructions / 1e6 for d, p in ready.items()}
        unit = "M instructions"
    speedups = {str(d): round(costs[1.0] / costs[d], 3) for d in densities}
    rounded = {str(d): round(c, 4) for d, c in costs.items()}
    core = sparsity.core(device)
    return {
        "model": name,
        "kind": kind,
        "device": core,
        "block": block,
        "unit": unit,
        "cost": rounded,
        "speedup": speedups,
    }


def _network_times(programs: Mapping[float, Program], device: Device) -> dict[float, float]:
    """Milliseconds of one inference on random inputs, the variants taking turns."""
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower

    with tempfile.TemporaryDirectory(prefix="edgec-sparse-") as folder:
        calls, memory = {}, []
        for density, program in programs.items():
            lowered = lower(program, device)
            bundle = build_bundle(lowered, device, Path(folder) / str(density))
            library = bundle.path / "lib" / f"lib{bundle.name}.so"
            run = ctypes.CDLL(str(library.absolute()))[f"{bundle.name}_run"]
            inputs = aarch64.random_inputs(bundle.manifest["inputs"])
            outputs = [np.empty(p.shape, p.dtype) for p in lowered.plan.outputs]
            align = max(64, lowered.plan.arena_align)
            raw = np.zeros(lowered.plan.arena_bytes + align, np.uint8)
            arena = raw[-raw.ctypes.data % align :]
            memory.append((inputs, outputs, raw))
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*inputs, *outputs, arena)]
            calls[str(density)] = lambda run=run, pointers=pointers: run(*pointers)
        times = timing.measure(calls, ROUNDS)
    return {float(name): t.cpu / 1e3 for name, t in times.items()}


def network_table(rows: Sequence[Mapping[str, Any]]) -> str:
    densities = list(dict.fromkeys(d for row in rows for d in row["speedup"]))
    header = ["model", "type", "device", "block", "unit", "dense"]
    header += [text for d in densities for text in (f"density {d}", "speedup")]
    lines = []
    for row in rows:
        cells = [row["model"], row["kind"], row["device"], "x".join(map(str, row["block"])), row["unit"]]
        cells.append(f"{row['cost']['1.0']:.2f}")
        for d in densities:
            cells += [f"{row['cost'][d]:.2f}", f"{row['speedup'][d]:.2f}x"]
        lines.append(cells)
    return timing.markdown(header, lines, text=5)


# -- command line ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Devices = Annotated[list[str], typer.Option("--device", help="a device of devices.toml; repeatable")]
Save = Annotated[Path | None, typer.Option("--save", help="write the figures to this JSON file")]


@app.command("kernels")
def kernels_command(
    device: Devices = ["host", "cortex-a72", "neoverse-n1"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option("--dtype", help="float32 or int8; repeatable")] = ["float32", "int8"],  # noqa: B006
    save: Save = None,
    table: Annotated[Path | None, typer.Option("--table", help="sparsity.toml to update")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="draw cost against density (.svg, .png)")] = None,
) -> None:
    """Cost of sparse kernels by density, and where it equals that of the dense ones."""
    points: list[Point] = []
    for name in device:
        points += measure_kernels(load_device(name), dtype)
    print(kernel_table(points))
    if save is not None:
        save.write_text(json.dumps([dataclasses.asdict(p) for p in points], indent=1) + "\n")
    if table is not None:
        write_table(table, points)
    if plot is not None:
        draw(points, plot)


@app.command("networks")
def networks_command(
    model: Annotated[list[str] | None, typer.Option("--model", help="a name of benchmarks/models.py")] = None,
    kind: Annotated[list[str], typer.Option("--kind", help="fp32 or int8; repeatable")] = ["fp32", "int8"],  # noqa: B006
    device: Devices = ["host", "cortex-a72", "neoverse-n1"],  # noqa: B006
    save: Save = None,
) -> None:
    """Whole networks, dense and at 50 % and 75 %."""
    rows = []
    for name in device:
        for one in model or MODELS:
            for way in kind:
                rows.append(network(one, way, load_device(name)))
                print(network_table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(network_table(rows))
    if save is not None:
        save.write_text(json.dumps(rows, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns the exit status: 2 with one line for what cannot be measured."""
    try:
        app(arguments, standalone_mode=False)
    except EdgecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
