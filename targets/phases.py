"""Which loops of a lowered kernel threads may share: its phases.

A template marks loops whose iterations are independent (`edgec.targets.kernels.common.parallel`), TVM's operators those
of its schedules. Where such a loop stands at the top of a lowered kernel it becomes a phase of its own, a C function
that does a range of the iterations; what stands between two of them becomes a phase that is not divided.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tvm
import tvm_ffi
from tvm import sym

from edgec.targets.tir import tirx

# Statements that only name things; every phase has all of them.
NAMING = (tirx.AllocBuffer, tirx.DeclBuffer, tirx.Bind)


@dataclass(frozen=True)
class Phase:
    """naming: declarations; work: what is done. tasks: iterations of each loop in `work`; 0 when it is not divided."""

    naming: tuple[Any, ...]
    work: tuple[Any, ...]
    tasks: int

    def body(self, begin: Any, end: Any) -> Any:
        """The statement that does the tasks from `begin` to `end`, or all there is to do."""
        work = self.work
        if self.tasks:
            work = tuple(
                tirx.For(loop.loop_var, begin, end - begin, tirx.ForKind.SERIAL, loop.body) for loop in self.work
            )
        statements = [*self.naming, *work]
        return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]


class Accesses(NamedTuple):
    """Buffers, as they were allocated or passed."""

    stored: list[Any]
    loaded: list[Any]


def divide(body: Any, scratch: Collection[Any], in_place: bool = False) -> list[Phase]:
    """The phases of a lowered kernel, in order; loops inside are serial.

    scratch: the allocated buffers that are memory of all threads. A marked loop is not divided when its iterations
    would get in each other's way there: it is allocated inside, or both written and read, and not each time in another
    part. A kernel whose phases would hand values from
    one to the next in anything else is not divided either. Loops whose iterations need nothing of each other but of the
    one with the same number are one phase, unless the result may be in the place of an operand.
    """
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    naming = tuple(s for s in statements if isinstance(s, NAMING))
    work = [s for s in statements if not isinstance(s, NAMING)]
    origin = _origins(body)
    groups: list[tuple[list[Any], int]] = []
    for statement in work:
        tasks = _tasks(statement)
        if tasks and _needs_scratch(statement, scratch, origin):
            tasks = 0
        before, same = groups[-1] if groups else ([], -1)
        if tasks != same or (tasks and (in_place or not _apart([*before, statement], origin))):
            groups.append(([], tasks))
        groups[-1][0].append(serial(statement, outermost=not tasks))
    if not any(tasks for _, tasks in groups) or _connected(naming, groups, scratch, origin):
        # Declarations stay where they are: what they name may be computed in between.
        return [Phase((), tuple(serial(s) for s in statements), 0)]
    return [Phase(naming, tuple(group), tasks) for group, tasks in groups]


def passed_on(body: Any) -> set[Any]:
    """Buffers that one statement at the top of a kernel with marked loops leaves to another."""
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    if not any(_tasks(s) for s in statements):
        return set()
    origin = _origins(body)
    used = [{origin.get(v, v) for v in _found(s, tirx.Var)} for s in statements if not isinstance(s, NAMING)]
    buffers = [s.buffer for s in statements if isinstance(s, tirx.AllocBuffer)]
    return {buffer for buffer in buffers if sum(buffer in names for names in used) > 1}


def serial(statement: Any, outermost: bool = True) -> Any:
    """The statement with its parallel loops serial; without `outermost` those that are not inside a loop are kept."""

    def on_loop(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body, step=loop.step)

    def on_outer(loop: Any) -> Any:
        body = tvm_ffi.structural_map(loop.body, [(tirx.For, on_loop)], order="post")
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations)

    if not any(loop.kind == tirx.ForKind.PARALLEL for loop in _found(statement, tirx.For)):
        return statement
    return tvm_ffi.structural_map(statement, [(tirx.For, on_loop if outermost else on_outer)], order="post")


def accesses(statement: Any, origin: dict[Any, Any] | None = None) -> Accesses:
    """What a statement writes and reads; buffers are followed through the declarations in it, or in `origin`."""
    names = _origins(statement) if origin is None else origin
    stored = [names.get(s.buffer, s.buffer) for s in _found(statement, tirx.BufferStore)]
    loaded = [names.get(load.source, load.source) for load in _found(statement, tvm.ir.TensorLoad)]
    return Accesses(list(dict.fromkeys(stored)), list(dict.fromkeys(loaded)))


def _origins(statement: Any) -> dict[Any, Any]:
    """The buffer behind each declared view."""
    found: dict[Any, Any] = {}
    for declaration in _found(statement, tirx.DeclBuffer):
        source = declaration.data
        source = source.args[0] if hasattr(source, "args") and len(source.args) else source
        found[declaration.buffer] = found.get(source, source)
    return found


def _tasks(statement: Any) -> int:
    """The number of iterations of a marked loop, else 0."""
    marked = isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL
    if not marked or str(statement.loop_var.ty.dtype) != "int32":
        return 0
    if not isinstance(statement.extent, tirx.IntImm) or not isinstance(statement.min, tirx.IntImm):
        return 0
    return int(statement.extent) if int(statement.min) == 0 and statement.step is None else 0


def _needs_scratch(loop: Any, scratch: Collection[Any], origin: dict[Any, Any]) -> bool:
    """Whether a loop allocates scratch memory, or its iterations write and read the same part of some."""
    if any(allocation.buffer in scratch for allocation in _found(loop, tirx.AllocBuffer)):
        return True
    stored, loaded = accesses(loop, origin)
    both = [buffer for buffer in stored if buffer in loaded and buffer in scratch]
    return any(not _disjoint([loop], buffer, origin) for buffer in both)


def _apart(loops: Sequence[Any], origin: dict[Any, Any]) -> bool:
    """Whether iterations of loops need no more of each other than the one with the same number in loops before."""
    found = [accesses(loop, origin) for loop in loops]
    stored = {buffer for each in found for buffer in each.stored}
    users = {
        b: [loop for loop, each in zip(loops, found, strict=True) if b in (*each.stored, *each.loaded)] for b in stored
    }
    return all(_disjoint(some, buffer, origin) for buffer, some in users.items() if len(some) > 1)


def _disjoint(loops: Sequence[Any], buffer: Any, origin: dict[Any, Any]) -> bool:
    """Whether iterations with different numbers use different elements of a buffer: each stays within one stride."""
    strides, lowest, highest = set(), [], []
    for loop in loops:
        named = {bind.var: bind.value for bind in _found(loop.body, tirx.Bind)}
        bounds = sym.Analyzer()
        for inner in _found(loop.body, tirx.For):
            bounds.bind(inner.loop_var, tvm.ir.Range.from_min_extent(inner.min, inner.extent))
        used = [s.indices for s in _found(loop, tirx.BufferStore) if origin.get(s.buffer, s.buffer).same_as(buffer)]
        used += [x.indices for x in _found(loop, tvm.ir.TensorLoad) if origin.get(x.source, x.source).same_as(buffer)]
        for indices in used:
            index, room = indices[0], 1
            if isinstance(index, tirx.Ramp):
                index, room = index.base, int(index.lanes) * int(index.stride)
            for _ in named:
                index = tvm_ffi.structural_map(
                    index, [(tirx.Var, lambda v, names=named: names.get(v, v))], order="post"
                )
            linear = sym.detect_linear_equation(index, [loop.loop_var])
            if len(indices) != 1 or len(linear) != 2 or not isinstance(linear[0], tirx.IntImm):
                return False
            within = bounds.const_int_bound(linear[1])
            strides.add(int(linear[0]))
            lowest.append(int(within.min_value))
            highest.append(int(within.max_value) + room)
    return len(strides) == 1 and max(highest) - min(lowest) <= strides.pop()


def _connected(
    naming: Sequence[Any], groups: Sequence[tuple[list[Any], int]], scratch: Collection[Any], origin: dict[Any, Any]
) -> bool:
    """Whether values pass between phases otherwise than in scratch memory."""
    if any(_found(s, tvm.ir.TensorLoad) for s in naming if isinstance(s, tirx.Bind)):
        return True
    used = [{origin.get(v, v) for s in group for v in _found(s, tirx.Var)} for group, _ in groups]
    private = [s.buffer for s in naming if isinstance(s, tirx.AllocBuffer) and s.buffer not in scratch]
    return any(sum(buffer in names for names in used) > 1 for buffer in private)


def _found(statement: Any, kind: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(statement, [(kind, found.append)], order="pre")
    return found
