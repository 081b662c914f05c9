"""Computing a part of a graph tile by tile, so that its large maps never exist as a whole.

A stage is a part of a graph in channels-last regions with one result, a map. It is computed in tiles of that map:
either each for itself, with the parts of inner maps that several tiles need computed several times (patches: Lin et
al., "MCUNetV2: Memory-efficient Patch-based Inference for Tiny Deep Learning", 2021), or as strips of rows from top to
bottom, which keep the rows that the next strip needs again and so compute nothing twice (row streaming). Every
element is computed from the same operands as before: int8 results are equal bit for bit.

`Stage` reads geometry off the graph, `patches` and `strips` make a list of small steps (`Part`), whose memory
`edgec.lowering.memory` knows, and `rewrite` puts them into the graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edgec import regions as regions  # registers the operators looked up below
from edgec.lowering.graph import is_tensor
from edgec.lowering.layout import BINARY, UNARY
from edgec.lowering.memory import PART, Costs, Item, best_order, inplace_operands, is_view, nbytes, profile, root_of
from edgec.lowering.regions import TO_NHWC
from edgec.program import constant_of, is_call, layer_of, origin_of, shape_of

aten = torch.ops.aten
edgec = torch.ops.edgec

Span = tuple[int, int]
Pads = tuple[int, int]

# Where the arguments of operators with a window stand: (kernel or weight, stride, padding, dilation or None).
WINDOWS: dict[Any, tuple[int, int, int, int | None]] = {
    edgec.qconv2d.default: (1, 5, 6, 7),
    edgec.qconv2d_add.default: (1, 6, 7, 8),
    edgec.qconv2d_float.default: (1, 4, 5, 6),
    edgec.conv2d_nhwc.default: (1, 4, 5, 6),
    edgec.qmax_pool2d.default: (1, 2, 3, 4),
    edgec.max_pool2d_nhwc.default: (1, 2, 3, 4),
    edgec.qavg_pool2d.default: (1, 2, 3, None),
    edgec.avg_pool2d_nhwc.default: (1, 2, 3, None),
}
LAYOUTS: dict[Any, int] = {
    edgec.qconv2d.default: 13,
    edgec.qconv2d_float.default: 9,
    edgec.qmax_pool2d.default: 6,
    edgec.qavg_pool2d.default: 10,
}
CONVOLUTIONS = tuple(WINDOWS)[:4]
NHWC, NCHW = (1, 2), (2, 3)
# A row that no strip reads.
NEVER = 1 << 62
# Strips after which all are alike, in estimates.
STEADY = 5


class NotTileable(Exception):
    """A part of a graph that cannot be computed tile by tile; the message says why."""


@dataclass(frozen=True)
class Window:
    """Of a layer along one axis."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    def needs(self, span: Span) -> Span:
        """Input positions, also such in the padding, that output positions `span` are computed from."""
        low, high = span
        first = low * self.stride - self.before
        return first, first + (high - 1 - low) * self.stride + self.dilation * (self.kernel - 1) + 1


@dataclass(frozen=True)
class Part:
    """A step of a tiled stage.

    kind: "compute" a part of the map of `node`; "crop" `window` (rows, columns) out of `inputs`[0]; "place" the last
    of `inputs` at `window` into the first, or into a new map. rows, columns: the part of the map of `node` that the
    result holds. inputs: positions of earlier parts, or nodes outside of the stage; for "compute" what stands for the
    maps that `node` reads, in the order of its arguments. padding: of a window operator.
    """

    kind: str
    node: fx.Node
    rows: Span
    columns: Span
    inputs: tuple[int | fx.Node, ...]
    window: tuple[Span, Span] | None = None
    padding: tuple[int, ...] | None = None


def _maps(node: fx.Node) -> list[fx.Node]:
    """Every occurrence of a node among the arguments of a call, in order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), lambda a: found.append(a) or a)
    return found


@dataclass
class Stage:
    """The nodes between `sources` and `out`, in graph order; `out` is the last of them.

    Raises NotTileable when an operator is not local, or a value inside is used outside.
    """

    module: fx.GraphModule
    nodes: list[fx.Node]
    axes: dict[fx.Node, tuple[int, int]] = field(init=False)
    inputs: dict[fx.Node, list[tuple[int, fx.Node]]] = field(init=False)
    extents: dict[fx.Node, tuple[int, int]] = field(init=False)
    windows: dict[fx.Node, tuple[Window, Window]] = field(init=False)

    def __post_init__(self) -> None:
        inside = set(self.nodes)
        for node in self.nodes[:-1]:
            if any(user not in inside for user in node.users):
                raise NotTileable(f"{layer_of(node)} is used behind the stage")
        self.axes, self.inputs = {self.out: NHWC}, {}
        for node in reversed(self.nodes):
            if node not in self.axes:
                raise NotTileable(f"{layer_of(node)} has no reader")
            self.inputs[node] = self._local(node, self.axes[node])
        self.extents = {n: (shape_of(n)[a], shape_of(n)[b]) for n, (a, b) in self.axes.items()}
        windowed = [n for n in self.nodes if is_call(n, *WINDOWS)]
        self.windows = {n: (self._window(n, 0), self._window(n, 1)) for n in windowed}

    @property
    def out(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def sources(self) -> list[fx.Node]:
        """The maps that the stage reads."""
        inside = set(self.nodes)
        return list(dict.fromkeys(a for n in self.nodes for _, a in self.inputs[n] if a not in inside))

    def _local(self, node: fx.Node, axes: tuple[int, int]) -> list[tuple[int, fx.Node]]:
        """The maps among the operands: (occurrence, node). Records their layout."""
        shape = shape_of(node)
        if not is_tensor(node, None) or len(shape) != 4 or shape[0] != 1:
            raise NotTileable(f"{layer_of(node)} is not a map")
        found = []
        inner = axes
        if is_call(node, aten.permute.default):
            if axes != NHWC or [int(a) % 4 for a in node.args[1]] != TO_NHWC:  # type: ignore[union-attr]
                raise NotTileable(f"{layer_of(node)} permutes")
            inner = NCHW
        elif is_call(node, *WINDOWS):
            place = LAYOUTS.get(node.target)
            if axes != NHWC or (place is not None and node.args[place] != "NHWC"):
                raise NotTileable(f"{layer_of(node)} has its channels first")
        elif is_call(node, edgec.qlut.default):
            table = node.args[1].meta["val"]  # type: ignore[union-attr]
            if table.dim() == 2 and int(node.args[2]) % 4 in axes:  # type: ignore[arg-type]
                raise NotTileable(f"{layer_of(node)} has a table per row")
        elif is_call(node, aten.cat.default, aten.slice.Tensor):
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            if axis % 4 in (0, *axes):
                raise NotTileable(f"{layer_of(node)} is not local")
        elif not is_call(node, *UNARY, *BINARY):
            raise NotTileable(f"{layer_of(node)} ({getattr(node.target, '__name__', node.op)}) is not local")
        inside = set(self.nodes)
        for number, operand in enumerate(_maps(node)):
            if constant_of(self.module, operand) is not None or not is_tensor(operand, None):
                if is_call(node, *BINARY) and any(e > 1 for e in _spatial(shape_of(operand), axes)):
                    raise NotTileable(f"{layer_of(node)} has a constant map")
                continue
            if is_call(operand, edgec.dequantize_weight.default) and number > 0:
                continue
            extents = _spatial(shape_of(operand), inner)
            if is_call(node, *WINDOWS) and number == 0:
                pass
            elif all(e == 1 for e in extents) and operand not in inside and _spatial(shape, axes) != extents:
                continue
            elif len(shape_of(operand)) != 4 or extents != _spatial(shape, axes):
                raise NotTileable(f"{layer_of(node)} broadcasts")
            if self.axes.setdefault(operand, inner) != inner:
                raise NotTileable(f"{layer_of(operand)} is read in two layouts")
            found.append((number, operand))
        return found

    def extent(self, node: fx.Node, axis: int) -> int:
        """Rows (axis 0) or columns (axis 1) of a map."""
        return self.extents[node][axis]

    def _window(self, node: fx.Node, axis: int) -> Window:
        kernel, stride, padding, dilation = WINDOWS[node.target]
        given: Any = node.args
        size = shape_of(given[kernel])[2 + axis] if is_call(node, *CONVOLUTIONS) else given[kernel][axis]
        step = 1 if dilation is None else given[dilation][axis]
        before, after = (int(p) for p in given[padding][2 * axis : 2 * axis + 2])
        return Window(int(size), int(given[stride][axis]), before, after, int(step))

    def demand(self, node: fx.Node, number: int, operand: fx.Node, axis: int, span: Span) -> tuple[Span, Pads]:
        """Positions of an operand that positions `span` of a node need, and how much padding before and behind them."""
        if number > 0 or node not in self.windows:
            return span, (0, 0)
        window, end = self.windows[node][axis], self.extents[operand][axis]
        if span == (0, self.extent(node, axis)):
            # Nothing is cut off behind the last window.
            return (0, end), (window.before, window.after)
        low, high = window.needs(span)
        inside = max(low, 0), min(high, end)
        if inside[0] >= inside[1]:
            raise NotTileable(f"a window of {layer_of(node)} lies in the padding")
        return inside, (inside[0] - low, high - inside[1])

    def demands(
        self, node: fx.Node, number: int, operand: fx.Node, rows: Span, columns: Span
    ) -> tuple[tuple[Span, Pads], tuple[Span, Pads]]:
        """`demand` along both axes."""
        return self.demand(node, number, operand, 0, rows), self.demand(node, number, operand, 1, columns)

    def macs(self, node: fx.Node) -> int:
        """Multiplications per position of a node's map."""
        if not is_call(node, *CONVOLUTIONS):
            return 0
        return math.prod(shape_of(node.args[1]))  # type: ignore[arg-type]

    def whole_macs(self) -> int:
        return sum(self.macs(n) * self.extent(n, 0) * self.extent(n, 1) for n in self.nodes)


def _spatial(shape: Sequence[int], axes: tuple[int, int]) -> tuple[int, ...]:
    """Rows and columns of a tensor that broadcasts against maps."""
    full = (1,) * (4 - len(shape)) + tuple(shape)
    return full[axes[0]], full[axes[1]]


class _Writer:
    """A list of parts, and which part holds what of each map."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.parts: list[Part] = []
        self.crops: dict[Any, int] = {}

    def add(self, *fields: Any, **more: Any) -> int:
        self.parts.append(Part(*fields, **more))
        return len(self.parts) - 1

    def cut(self, node: fx.Node, held: int | fx.Node, rows: Span, columns: Span) -> int | fx.Node:
        """Rows x columns of the map of `node`, from a part (or a node outside of the stage) that holds more of it."""
        own = (0, self.stage.extent(node, 0)), (0, self.stage.extent(node, 1))
        if isinstance(held, int):
            own = self.parts[held].rows, self.parts[held].columns
        if own == (rows, columns):
            return held
        window = tuple((span[0] - o[0], span[1] - o[0]) for span, o in zip((rows, columns), own, strict=True))
        assert all(w[0] >= 0 and w[1] <= o[1] - o[0] for w, o in zip(window, own, strict=True)), (node, own, window)
        key = held, window
        if key not in self.crops:
            self.crops[key] = self.add("crop", node, rows, columns, (held,), window=window)
        return self.crops[key]

    def compute(self, node: fx.Node, rows: Span, columns: Span, held: Mapping[fx.Node, int]) -> int:
        """Compute a part of a map from what is held of the maps that it is computed from."""
        inputs, padding = [], None
        for number, operand in self.stage.inputs[node]:
            (own_rows, vertical), (own_columns, horizontal) = self.stage.demands(node, number, operand, rows, columns)
            inputs.append(self.cut(operand, held.get(operand, operand), own_rows, own_columns))
            if number == 0 and node in self.stage.windows:
                padding = (*vertical, *horizontal)
        return self.add("compute", node, rows, columns, tuple(inputs), padding=padding)

    def join(self, first: int, second: int) -> int:
        """Two parts of the same columns, one above the other, as one part."""
        above, below = self.parts[first], self.parts[second]
        rows, columns = (above.rows[0], below.rows[1]), above.columns
        height, seam, across = rows[1] - rows[0], above.rows[1] - rows[0], (0, columns[1] - columns[0])
        canvas = self.add("place", above.node, rows, columns, (first,), window=((0, seam), across))
        return self.add("place", above.node, rows, columns, (canvas, second), window=((seam, height), across))


def cuts(extent: int, size: int) -> list[Span]:
    """0 .. extent in pieces of `size`, the last one smaller."""
    return [(low, min(low + size, extent)) for low in range(0, extent, size)]


def patches(stage: Stage, height: int, width: int) -> list[Part]:
    """Compute each tile of height x width elements of the result for itself; the last part is the result."""
    whole = (0, stage.extent(stage.out, 0)), (0, stage.extent(stage.out, 1))
    orders: dict[Any, list[int]] = {}
    made: list[Part] = []
    canvas: int | None = None
    for rows in cuts(whole[0][1], height):
        for columns in cuts(whole[1][1], width):
            tile = _sorted(stage, _patch(stage, rows, columns), orders)
            start = len(made)
            made += [_renumbered(part, lambda i, start=start: i + start) for part in tile]
            if (rows, columns) == whole:
                return made
            inputs = (len(made) - 1,) if canvas is None else (canvas, len(made) - 1)
            made.append(Part("place", stage.out, *whole, inputs, window=(rows, columns)))
            canvas = len(made) - 1
    return made


def _renumbered(part: Part, number: Callable[[int], int]) -> Part:
    return dataclasses.replace(part, inputs=tuple(number(i) if isinstance(i, int) else i for i in part.inputs))


def _patch(stage: Stage, rows: Span, columns: Span) -> list[Part]:
    hulls = _hulls(stage, 0, rows), _hulls(stage, 1, columns)
    writer = _Writer(stage)
    held: dict[fx.Node, int] = {}
    for node in stage.nodes:
        held[node] = writer.compute(node, hulls[0][node], hulls[1][node], held)
    return writer.parts


def _hulls(stage: Stage, axis: int, span: Span) -> dict[fx.Node, Span]:
    """The positions of each map of a stage that `span` of its result is computed from, along one axis."""
    hulls = {stage.out: span}
    for node in reversed(stage.nodes):
        for number, operand in stage.inputs[node]:
            (low, high), _ = stage.demand(node, number, operand, axis, hulls[node])
            known = hulls.get(operand, (low, high))
            hulls[operand] = min(low, known[0]), max(high, known[1])
    return hulls


def _sorted(stage: Stage, tile: list[Part], orders: dict[Any, list[int]]) -> list[Part]:
    """The parts of a tile in the order that needs least memory; tiles of the same structure get the same order."""
    shape = tuple((part.kind, part.node, part.inputs) for part in tile)
    if shape not in orders:
        items, offset = items_of(stage, tile)
        order = [i - offset for i in best_order(items) if i >= offset]
        # The result comes last: nothing reads it here.
        orders[shape] = order if order[-1] == len(tile) - 1 else list(range(len(tile)))
    order = orders[shape]
    place = {old: new for new, old in enumerate(order)}
    return [_renumbered(tile[i], place.__getitem__) for i in order]


def strips(stage: Stage, height: int, most: int | None = None) -> list[Part]:
    """Compute the result in strips of `height` rows, and every row of an inner map once; the last part is the result.

    What a strip computed and a later one needs is kept (a copy of those rows alone), and put above the new rows.
    most: only so many strips, for estimates.
    """
    whole = (0, stage.extent(stage.out, 0)), (0, stage.extent(stage.out, 1))
    spans = cuts(whole[0][1], height)
    inside = set(stage.nodes)
    columns = {node: (0, stage.extent(node, 1)) for node in stage.nodes}
    done = dict.fromkeys(stage.nodes, 0)
    # For each strip: the rows to compute of each map, and the first row of it that is read.
    fresh: list[dict[fx.Node, Span]] = []
    first: list[dict[fx.Node, int]] = []
    for _, end in spans:
        ends, lows = {**done, stage.out: end}, {}
        for node in reversed(stage.nodes):
            if ends[node] == done[node]:
                continue
            for number, operand in stage.inputs[node]:
                if operand in inside:
                    (low, high), _ = stage.demand(node, number, operand, 0, (done[node], ends[node]))
                    ends[operand] = max(ends[operand], high)
                    lows[operand] = min(lows.get(operand, low), low)
        fresh.append({node: (done[node], ends[node]) for node in stage.nodes if ends[node] > done[node]})
        first.append(lows)
        done = ends
    # The first row that any later strip reads.
    wanted = [dict.fromkeys(stage.nodes, NEVER)]
    for lows in reversed(first[1:]):
        wanted.append({node: min(low, lows.get(node, NEVER)) for node, low in wanted[-1].items()})
    writer = _Writer(stage)
    held: dict[fx.Node, int] = {}
    canvas: int | None = None
    for number, rows in enumerate(spans[:most]):
        kept = wanted[len(spans) - 1 - number]
        readers = {node: sum(node in (a for _, a in stage.inputs[n]) for n in fresh[number]) for node in stage.nodes}
        writer.crops.clear()

        def keep(node: fx.Node, kept: dict[fx.Node, int] = kept) -> None:
            part = writer.parts[held[node]]
            if kept[node] >= part.rows[1]:
                del held[node]
            elif kept[node] > part.rows[0]:
                held[node] = writer.add(
                    "crop",
                    node,
                    (kept[node], part.rows[1]),
                    part.columns,
                    (held[node],),
                    window=((kept[node] - part.rows[0], part.rows[1] - part.rows[0]), columns[node]),
                )

        for node in stage.nodes:
            if node not in fresh[number]:
                continue
            new = writer.compute(node, fresh[number][node], columns[node], held)
            held[node] = writer.join(held[node], new) if node in held else new
            for operand in dict.fromkeys(a for _, a in stage.inputs[node] if a in inside):
                readers[operand] -= 1
                if readers[operand] == 0:
                    keep(operand)
        tile = held.pop(stage.out)
        if len(spans) == 1:
            return writer.parts
        inputs = (tile,) if canvas is None else (canvas, tile)
        canvas = writer.add("place", stage.out, *whole, inputs, window=(rows, whole[1]))
    return writer.parts


# -- cost --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Of a tiled stage: bytes alive at its peak, multiplications, calls, and bytes that crops and places move."""

    peak: int
    macs: int
    calls: int
    copied: int


def estimate_patches(
    stage: Stage, height: int, width: int, costs: Costs | None = None, kept: Collection[fx.Node] = ()
) -> Estimate:
    """Estimate of `patches` from its largest tile. kept: sources that are read behind the stage, too."""
    spans = [cuts(stage.extent(stage.out, axis), size) for axis, size in enumerate((height, width))]
    hulls = [[_hulls(stage, axis, span) for span in spans[axis]] for axis in (0, 1)]
    sums = [{n: sum(h[n][1] - h[n][0] for h in hulls[axis]) for n in stage.nodes} for axis in (0, 1)]
    largest = [
        max(range(len(spans[axis])), key=lambda i, axis=axis: sum(b - a for a, b in hulls[axis][i].values()))
        for axis in (0, 1)
    ]
    window = spans[0][largest[0]], spans[1][largest[1]]
    tile = _sorted(stage, _patch(stage, *window), {})
    whole = (0, stage.extent(stage.out, 0)), (0, stage.extent(stage.out, 1))
    # Three times: the second one is computed while canvas and sources are alive.
    parts: list[Part] = []
    for _ in range(3):
        start, canvas = len(parts), (len(parts) - 1,) if parts else ()
        parts += [_renumbered(part, lambda i, start=start: i + start) for part in tile]
        parts.append(Part("place", stage.out, *whole, (*canvas, len(parts) - 1), window=window))
    items, _ = items_of(stage, parts, costs)
    count = len(spans[0]) * len(spans[1])
    total = sum(stage.macs(n) * sums[0][n] * sums[1][n] for n in stage.nodes)
    moved = sum(copied_bytes(stage, parts, part) for part in parts[: len(tile) + 1])
    alive = [i for i, source in enumerate(stage.sources) if source in kept]
    return Estimate(max(profile(items, alive)), total, (len(tile) + 1) * count, moved * count)


def estimate_strips(stage: Stage, height: int, costs: Costs | None = None, kept: Collection[fx.Node] = ()) -> Estimate:
    """Estimate of `strips` from its first strips. kept: sources that are read behind the stage, too."""
    parts = strips(stage, height, STEADY)
    items, _ = items_of(stage, parts, costs)
    count = len(cuts(stage.extent(stage.out, 0), height))
    factor = max(count, STEADY) / STEADY
    moved = sum(copied_bytes(stage, parts, part) for part in parts)
    alive = [i for i, source in enumerate(stage.sources) if source in kept]
    peak = max(profile(items, alive))
    return Estimate(peak, stage.whole_macs(), round(len(parts) * factor), round(moved * factor))


def items_of(stage: Stage, parts: Sequence[Part], costs: Costs | None = None) -> tuple[list[Item], int]:
    """(the sources and then the parts as items of `edgec.lowering.memory`, number of sources)."""
    costs = costs or Costs()
    sources = stage.sources
    place: dict[Any, int] = {source: i for i, source in enumerate(sources)}
    offset = len(sources)
    items = [Item(costs.value(root_of(s)), given=True) for s in sources]
    views: dict[int, tuple[int, ...]] = {}
    for number, part in enumerate(parts):
        reads = [place[i] if isinstance(i, fx.Node) else i + offset for i in part.inputs]
        behind = dict.fromkeys(r for read in reads for r in (read, *views.get(read, ())))
        shares: tuple[int, ...] = ()
        size = costs.aligned(part_bytes(stage, part))
        if part.kind == "place":
            shares = tuple(reads[:-1])
        elif part.kind == "compute" and is_view(part.node):
            views[number + offset], size = tuple(behind), 0
        elif part.kind == "compute":
            operands = _maps(part.node)
            allowed = inplace_operands(part.node)
            known = zip(stage.inputs[part.node], reads, strict=True)
            shares = tuple(read for (occurrence, _), read in known if operands[occurrence] in allowed)
        if number == len(parts) - 1 and stage.out in costs.callers:
            size, shares = 0, ()
        needed = costs.scratch_of(part.node) if part.kind == "compute" else 0
        items.append(Item(size, tuple(behind), shares, needed))
    return items, offset


def part_bytes(stage: Stage, part: Part) -> int:
    """Bytes of the result of a part."""
    whole = stage.extent(part.node, 0) * stage.extent(part.node, 1)
    own = (part.rows[1] - part.rows[0]) * (part.columns[1] - part.columns[0])
    return nbytes(part.node) // whole * own


def copied_bytes(stage: Stage, parts: Sequence[Part], part: Part) -> int:
    """Bytes that a crop or a place moves."""
    if part.kind == "compute":
        return 0
    moved = part if part.kind == "crop" else parts[part.inputs[-1]]  # type: ignore[index]
    return part_bytes(stage, moved)


def on(part: Part, nodes: Mapping[fx.Node, fx.Node]) -> Part:
    """The same part of a copy of the graph."""
    inputs = tuple(i if isinstance(i, int) else nodes[i] for i in part.inputs)
    return dataclasses.replace(part, node=nodes[part.node], inputs=inputs)


def macs(stage: Stage, parts: Sequence[Part]) -> int:
    """Multiplications of a tiled stage."""
    computed = (p for p in parts if p.kind == "compute")
    return sum(stage.macs(p.node) * (p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0]) for p in computed)


# -- graphs ------------------------------------------------------------------------------------------------------------


def rewrite(stage: Stage, parts: Sequence[Part]) -> None:
    """Compute a stage by its parts, in place. The caller propagates shapes and recompiles the module."""
    graph = stage.module.graph
    made: list[fx.Node] = []
    anchor = stage.out
    for number, part in enumerate(parts):
        inputs = [made[i] if isinstance(i, int) else i for i in part.inputs]
        with graph.inserting_after(anchor):
            new = _node(stage, part, inputs)
        last = number == len(parts) - 1
        origin = origin_of(part.node)
        new.meta.update(edgec_layer=layer_of(part.node), edgec_origin=origin if last else f"{origin}{PART}{number}")
        made.append(new)
        anchor = new
    result = made[-1]
    stage.out.replace_all_uses_with(result, delete_user_cb=lambda user: user not in made)
    for node in reversed(stage.nodes):
        graph.erase_node(node)


def _node(stage: Stage, part: Part, inputs: list[fx.Node]) -> fx.Node:
    graph = stage.module.graph
    (top, bottom), (left, right) = part.window or (part.rows, part.columns)
    if part.kind == "crop":
        window = (top, left, bottom - top, right - left)
        rest = () if stage.axes[part.node] == NHWC else ("NCHW",)
        return graph.call_function(edgec.crop_nhwc.default, (*inputs, *window, *rest))
    if part.kind == "place":
        canvas, tile = (None, *inputs) if len(inputs) == 1 else inputs
        size = (part.rows[1] - part.rows[0], part.columns[1] - part.columns[0])
        return graph.call_function(edgec.place_nhwc.default, (canvas, tile, top, left, *size))
    swapped = dict(zip((number for number, _ in stage.inputs[part.node]), inputs, strict=True))
    counter = iter(range(len(_maps(part.node))))
    args, kwargs = fx.map_arg((part.node.args, dict(part.node.kwargs)), lambda a: swapped.get(next(counter), a))
    if part.padding is not None:
        args = list(args)
        args[WINDOWS[part.node.target][2]] = list(part.padding)
    return graph.call_function(part.node.target, tuple(args), kwargs)  # type: ignore[arg-type]
