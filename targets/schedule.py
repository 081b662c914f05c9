"""A loop order for operators of TVM's library that have no template here.

TVM writes a reduction with its loop innermost and accumulates in memory. Where the result's last axis is read in
order, that axis goes innermost instead and is cut into vectors, so that sums stay in registers: matrix products of
activations, planar convolutions, pools.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import ScheduleError

from edgec.targets.device import Device
from edgec.targets.tir import s_tir, tirx

# Vectors of the last axis that are accumulated together, most first.
VECTORS = (4, 2, 1)


def schedule(function: Any, device: Device) -> Any:
    """Reorder the reductions of `function`; it is returned as it is when nothing matches."""
    found: list[str] = []

    def on_block(block: Any) -> None:
        if _reads_last_axis_in_order(block):
            found.append(block.name_hint)

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, on_block)], order="pre")
    if not found:
        return function
    result = s_tir.Schedule(tvm.IRModule({"main": function}))
    for name in found:
        if found.count(name) == 1:
            _reorder(result, name, device)
    return result.mod["main"]


def _reorder(schedule: Any, name: str, device: Device) -> None:
    block = schedule.get_sblock(name)
    iterators = schedule.get(block).iter_vars
    loops = schedule.get_loops(block)
    if len(loops) != len(iterators):
        return
    *outer, last = (loop for loop, i in zip(loops, iterators, strict=True) if i.iter_type == tirx.IterVar.DataPar)
    reduced = [loop for loop, i in zip(loops, iterators, strict=True) if i.iter_type == tirx.IterVar.CommReduce]
    extent = int(schedule.get(last).extent)
    width = next((v * device.lanes for v in VECTORS if extent % (v * device.lanes) == 0), 0)
    try:
        if width:
            tile, last = schedule.split(last, [None, width])
            outer.append(tile)
        schedule.reorder(*outer, *reduced, last)
        if width:
            schedule.vectorize(last)
        schedule.decompose_reduction(block, reduced[0])
    except ScheduleError:
        # Blocks that share loops with others; what was done so far is valid and stays.
        return


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
