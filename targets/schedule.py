"""A loop order for operators of TVM's library that have no template here.

Chains of element-wise operators become one loop, outermost loops are marked for threads (`edgec.targets.phases`).
TVM writes a reduction with its loop innermost and accumulates in memory. Where the result's last axis is read in
order, that axis goes innermost instead and is cut into vectors, so that sums stay in registers: matrix products of
activations, planar convolutions, pools.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import ScheduleError

from edgec.targets.device import Device
from edgec.targets.tir import s_tir, tirx

# Attribute of the functions that were scheduled here.
LIBRARY = "edgec.library"
# Loops around one of fewer iterations are joined with it, so that threads get parts of about the same size.
TASKS = 16
# Vectors of the last axis that are accumulated together, most first.
VECTORS = (4, 2, 1)


def schedule(function: Any, device: Device) -> Any:
    """Inline, reorder and share the loops of an operator of TVM's library.

    A function without blocks, which our templates are, is returned as it is. The result of any other has the attribute
    `LIBRARY`.
    """
    if not _blocks(function):
        return function
    result = s_tir.Schedule(tvm.IRModule({"main": _narrow(function)}))
    _inline(result)
    for name in _blocks(result.mod["main"]):
        block = result.get_sblock(name)
        statement = result.get(block)
        spatial = _loops(result, block, tirx.IterVar.DataPar)
        if statement.init is None:
            if _is_flat(statement) and len(spatial) > 1:
                spatial = [result.fuse(*spatial)]
            _share(result, spatial[:-1] if len(spatial) > 1 else spatial)
            continue
        reduced = _loops(result, block, tirx.IterVar.CommReduce)
        if spatial and reduced and _reads_last_axis_in_order(statement):
            spatial = _reorder(result, spatial, reduced, device)
        starts = [(block, reduced[0])] if reduced else []
        if spatial and reduced and _reduces_in_order(statement):
            starts = _by_lanes(result, block, spatial, reduced, device)
        _share(result, spatial)
        for accumulation, loop in starts:
            # Before the loops, instead of asking in each iteration whether it is the first.
            with contextlib.suppress(ScheduleError):
                result.decompose_reduction(accumulation, loop)
    return result.mod["main"].with_attr(LIBRARY, True)


def _blocks(function: Any) -> list[str]:
    """The names of the blocks inside the outermost one, in order, that are not used twice."""
    found: list[str] = []
    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, lambda b: found.append(b.name_hint))], order="pre")
    return [name for name in found[1:] if found.count(name) == 1]


def _narrow(function: Any) -> Any:
    """Loop variables and indices in 32 bits, for functions that do not compute with 64-bit integers."""
    kinds: set[str] = {str(p.ty.dtype) for p in function.params}
    tvm_ffi.structural_walk(function.body, [(tirx.BufferStore, lambda s: kinds.add(str(s.buffer.ty.dtype)))])
    if any("64" in kind for kind in kinds):
        return function
    return tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule({"main": function}))["main"]


def _inline(schedule: Any) -> None:
    """Compute each element where it is used, if that is in one element-wise loop and is not done again and again."""
    for name in _blocks(schedule.mod["main"]):
        block = schedule.get_sblock(name)
        consumers = schedule.get_consumers(block)
        if len(consumers) != 1 or schedule.get(block).init is not None or schedule.get(consumers[0]).init is not None:
            continue
        if not _moves(schedule.get(block)) and not _reads_once(schedule.get(consumers[0]), schedule.get(block)):
            continue
        # Blocks that compute what is returned, or whose index cannot be inverted.
        with contextlib.suppress(ScheduleError):
            schedule.compute_inline(block)


def _reads_once(block: Any, producer: Any) -> bool:
    """Whether a block reads each element of what `producer` writes at most once: all its axes are in the index."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(block.body, [(tvm.ir.TensorLoad, loads.append)], order="pre")
    loads = [load for load in loads if any(load.source.same_as(written.source) for written in producer.writes)]
    axes = [i.var for i in block.iter_vars if int(i.dom.extent) != 1]
    return len(loads) == 1 and all(any(_uses(index, axis) for index in loads[0].indices) for axis in axes)


def _moves(block: Any) -> bool:
    """Whether a block stores what it loads, or a constant, and computes nothing."""

    def plain(value: Any) -> bool:
        if isinstance(value, tvm.ir.Call) and getattr(value.op, "name", "") == "tirx.if_then_else":
            return plain(value.args[1]) and plain(value.args[2])
        return isinstance(value, (tvm.ir.TensorLoad, tirx.IntImm, tirx.FloatImm))

    return isinstance(block.body, tirx.BufferStore) and plain(block.body.value)


def _is_flat(block: Any) -> bool:
    """Whether each operand is read in the order in which the result is written, or is a single number."""
    iterators = [i for i in block.iter_vars if int(i.dom.extent) != 1]
    if any(i.iter_type != tirx.IterVar.DataPar for i in block.iter_vars):
        return False

    def in_order(buffer: Any, indices: Any) -> bool:
        shape = [int(d) for d in buffer.ty.shape]
        if math.prod(shape) == 1:
            return True
        used = [(index, d) for index, d in zip(indices, shape, strict=True) if d != 1]
        wanted = [(i.var, int(i.dom.extent)) for i in iterators]
        return len(used) == len(wanted) and all(
            a.same_as(v) and d == n for (a, d), (v, n) in zip(used, wanted, strict=True)
        )

    orders: list[bool] = []
    tvm_ffi.structural_walk(
        block.body,
        [
            (tirx.BufferStore, lambda s: orders.append(in_order(s.buffer, s.indices))),
            (tvm.ir.TensorLoad, lambda load: orders.append(in_order(load.source, load.indices))),
        ],
        order="pre",
    )
    return all(orders)


def _share(schedule: Any, loops: Sequence[Any]) -> None:
    """Mark the outermost of the loops that stand around the rest, joined with those inside if it has few iterations."""
    loops = [loop for loop in loops if int(schedule.get(loop).extent) > 1]
    if not loops:
        return
    outer, *rest = loops
    # Blocks that share loops with others; what was done so far is valid and stays.
    with contextlib.suppress(ScheduleError):
        for inner in rest:
            if int(schedule.get(outer).extent) >= TASKS:
                break
            outer = schedule.fuse(outer, inner)
        schedule.parallel(outer)


def _loops(schedule: Any, block: Any, kind: Any) -> list[Any]:
    """The loops of a block over axes of a kind; none where loops and axes are not the same."""
    loops, iterators = schedule.get_loops(block), schedule.get(block).iter_vars
    if len(loops) != len(iterators):
        return []
    return [loop for loop, i in zip(loops, iterators, strict=True) if i.iter_type == kind]


def _reorder(schedule: Any, spatial: Sequence[Any], reduced: Sequence[Any], device: Device) -> list[Any]:
    """Put the last axis innermost, in vectors where they fit; returns the loops that stand around the reduction."""
    *outer, last = spatial
    extent = int(schedule.get(last).extent)
    width = next((v * device.lanes for v in VECTORS if extent % (v * device.lanes) == 0), 0)
    # As for `_share`.
    with contextlib.suppress(ScheduleError):
        if width:
            tile, last = schedule.split(last, [None, width])
            outer.append(tile)
        schedule.reorder(*outer, *reduced, last)
        if width:
            schedule.vectorize(last)
    return outer


def _by_lanes(
    schedule: Any, block: Any, spatial: Sequence[Any], reduced: Sequence[Any], device: Device
) -> list[tuple[Any, Any]]:
    """Accumulate one result for each lane of some vectors, on the stack, and reduce these at the end.

    Only where the axis is a whole number of vectors. Returns the accumulations there are, each with its first loop.
    """
    *outer, last = reduced
    starts = [(block, (outer or [last])[0])]
    extent = int(schedule.get(last).extent)
    width = next((v * device.lanes for v in VECTORS if extent % (v * device.lanes) == 0), 0)
    with contextlib.suppress(ScheduleError):
        if width:
            _, lane = schedule.split(last, [None, width])
            partial = schedule.rfactor(lane, len(spatial))
            schedule.set_scope(partial, 0, "local")
            schedule.compute_at(partial, spatial[-1])
            lanes, *steps = schedule.get_loops(partial)[len(spatial) :]
            schedule.reorder(*steps, lanes)
            schedule.vectorize(lanes)
            starts = [(partial, steps[0])] if steps else []
            starts.append((block, lane))
    return starts


def _reduces_in_order(block: Any) -> bool:
    """Whether the block is a reduction of floating-point numbers along the last axis of all it reads."""
    reduced = [i.var for i in block.iter_vars if i.iter_type == tirx.IterVar.CommReduce]
    if len(block.writes) != 1 or not reduced or not str(block.writes[0].source.ty.dtype).startswith("float"):
        return False
    uses = []
    for read in block.reads:
        *before, last = [r.min for r in read.region] or [None]
        if any(_uses(index, reduced[-1]) for index in before):
            return False
        if last is not None and _uses(last, reduced[-1]):
            uses.append(_steps_by_one(last, reduced[-1]))
    return bool(uses) and all(uses)


def _reads_last_axis_in_order(block: Any) -> bool:
    """Whether the block is a reduction whose innermost result axis is, in each operand, the last axis or absent."""
    spatial = [i.var for i in block.iter_vars if i.iter_type == tirx.IterVar.DataPar]
    reduced = [i.var for i in block.iter_vars if i.iter_type == tirx.IterVar.CommReduce]
    if block.init is None or not reduced or not spatial or len(block.writes) != 1:
        return False
    (written,) = block.writes
    if not written.region or not written.region[-1].min.same_as(spatial[-1]):
        return False
    users = []
    for read in block.reads:
        *before, last = [r.min for r in read.region]
        if any(_uses(index, spatial[-1]) for index in before):
            return False
        if _uses(last, spatial[-1]):
            users.append(last)
    return bool(users) and all(_steps_by_one(index, spatial[-1]) for index in users)


def _uses(expression: Any, variable: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(expression, [(tirx.Var, lambda v: found.append(v) if v.same_as(variable) else None)])
    return bool(found)


def _steps_by_one(index: Any, variable: Any) -> bool:
    """index is `variable`, or a sum in which it stands alone."""
    if index.same_as(variable):
        return True
    if isinstance(index, tirx.Add):
        return _steps_by_one(index.a, variable) or _steps_by_one(index.b, variable)
    return False
