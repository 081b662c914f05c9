"""Which loops of a lowered kernel threads may share: its phases.

A template marks loops whose iterations are independent (`edgec.targets.kernels.common.parallel`), TVM's operators those
of its schedules. Where such a loop stands at the top of a lowered kernel it becomes a phase of its own, a C function
that does a range of the iterations; what stands between two of them becomes a phase that is not divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tvm
import tvm_ffi

from edgec.targets.tir import tirx

# Statements that only name things; every phase has all of them.
NAMING = (tirx.AllocBuffer, tirx.DeclBuffer, tirx.Bind)


@dataclass(frozen=True)
class Phase:
    """tasks: iterations of the loop that `statements` ends in; 0 when the phase is not divided."""

    statements: tuple[Any, ...]
    tasks: int

    def body(self, begin: Any, end: Any) -> Any:
        """The statement that does the tasks from `begin` to `end`, or all there is to do."""
        if not self.tasks:
            return tirx.SeqStmt(self.statements) if len(self.statements) > 1 else self.statements[0]
        *before, loop = self.statements
        part = tirx.For(loop.loop_var, begin, end - begin, tirx.ForKind.SERIAL, loop.body)
        return tirx.SeqStmt([*before, part]) if before else part


class Accesses(NamedTuple):
    """Buffers, as they were allocated or passed."""

    stored: list[Any]
    loaded: list[Any]


def divide(body: Any, is_scratch: Callable[[Any], bool]) -> list[Phase]:
    """The phases of a lowered kernel, in order; loops inside are serial.

    is_scratch: whether an allocated buffer is memory that all threads share. A marked loop that needs such memory for
    itself (it is allocated inside, or both written and read there) is not divided. A kernel whose phases would hand
    anything else than such memory from one to the next is not divided either.
    """
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    whole = [Phase(tuple(serial(s) for s in statements), 0)]
    if not any(_tasks(s) for s in statements):
        return whole
    naming = [s for s in statements if isinstance(s, NAMING)]
    origin = _origins(body)
    scratch = {a.buffer for a in _found(body, tirx.AllocBuffer) if is_scratch(a.buffer)}
    groups: list[tuple[list[Any], int]] = []
    for statement in statements:
        if isinstance(statement, NAMING):
            continue
        tasks = 0 if _needs_scratch(statement, scratch, origin) else _tasks(statement)
        if tasks or not groups or groups[-1][1]:
            groups.append(([], tasks))
        groups[-1][0].append(serial(statement, outermost=not tasks))
    if not any(tasks for _, tasks in groups) or _connected(naming, groups, scratch, origin):
        return whole
    return [Phase((*naming, *group), tasks) for group, tasks in groups]


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


def _needs_scratch(statement: Any, scratch: set[Any], origin: dict[Any, Any]) -> bool:
    """Whether a loop allocates scratch memory, or writes and reads some of it."""
    if any(allocation.buffer in scratch for allocation in _found(statement, tirx.AllocBuffer)):
        return True
    stored, loaded = accesses(statement, origin)
    return not scratch.isdisjoint(set(stored) & set(loaded))


def _connected(
    naming: Sequence[Any], groups: Sequence[tuple[list[Any], int]], scratch: set[Any], origin: dict[Any, Any]
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
