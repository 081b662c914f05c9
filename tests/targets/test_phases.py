"""Loops that threads may share: which become phases, and that those that would disturb each other do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm

from edgec.targets.codegen import lower_kernels
from edgec.targets.device import load_device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import loop, parallel, param
from edgec.targets.tir import T
from tests.targets.kernel_runner import Call, run

HOST = load_device("host")
N = 12


def kernel(body: Callable[[Any, Any, Any, Any], None]) -> Any:
    """body(x, y, scratch, local) on buffers float32[12, 128]: parameters, shared memory and the thread's stack."""
    with common.prim_func("k") as builder:
        x, y = param("x", (N, 128), "float32"), param("y", (N, 128), "float32")
        shared = T.alloc_buffer((N, 128), "float32")
        body(x, y, shared, T.alloc_buffer((128,), "float32", scope="local"))
    return builder.get()


def copy(source: Any, target: Any, rows: Callable[[int, Callable[[Any], None]], None], factor: float = 1.0) -> None:
    rows(
        N,
        lambda i: loop(128, lambda j: T.buffer_store(target, source[i, j] * common.const(factor, "float32"), [i, j])),
    )


def one_loop(x: Any, y: Any, shared: Any, local: Any) -> None:
    copy(x, y, parallel, 3.0)


def nested(x: Any, y: Any, shared: Any, local: Any) -> None:
    parallel(
        N,
        lambda i: parallel(128, lambda j: T.buffer_store(y, x[i, j] * common.const(3.0, "float32"), [i, j])),
    )


def inner_only(x: Any, y: Any, shared: Any, local: Any) -> None:
    loop(
        N,
        lambda i: parallel(128, lambda j: T.buffer_store(y, x[i, j] * common.const(3.0, "float32"), [i, j])),
    )


def two_loops(x: Any, y: Any, shared: Any, local: Any) -> None:
    copy(x, shared, parallel)
    copy(shared, y, parallel, 3.0)


def reversed_rows(x: Any, y: Any, shared: Any, local: Any) -> None:
    """The second loop needs what another iteration of the first has left."""
    copy(x, shared, parallel, 3.0)
    parallel(N, lambda i: loop(128, lambda j: T.buffer_store(y, shared[N - 1 - i, j], [N - 1 - i, j])))


def own_part(x: Any, y: Any, shared: Any, local: Any) -> None:
    """Each iteration has its own row of the scratch memory."""

    def row(i: Any) -> None:
        loop(128, lambda j: T.buffer_store(shared, x[i, j] * common.const(3.0, "float32"), [i, j]))
        loop(128, lambda j: T.buffer_store(y, shared[i, j], [i, j]))

    parallel(N, row)


def small_between(x: Any, y: Any, shared: Any, local: Any) -> None:
    """A few numbers that go from one phase to the next: not on a stack, however few."""
    factors = T.alloc_buffer((N,), "float32")
    parallel(N, lambda i: T.buffer_store(factors, common.const(3.0, "float32"), [N - 1 - i]))
    parallel(N, lambda i: loop(128, lambda j: T.buffer_store(y, x[i, j] * factors[i], [i, j])))


def serial_around(x: Any, y: Any, shared: Any, local: Any) -> None:
    copy(x, shared, loop)
    copy(shared, y, parallel)
    copy(shared, y, loop, 2.0)
    copy(shared, y, loop, 3.0)


def own_stack(x: Any, y: Any, shared: Any, local: Any) -> None:
    def row(i: Any) -> None:
        loop(128, lambda j: T.buffer_store(local, x[i, j] * common.const(3.0, "float32"), [j]))
        loop(128, lambda j: T.buffer_store(y, local[j], [i, j]))

    parallel(N, row)


def shared_inside(x: Any, y: Any, shared: Any, local: Any) -> None:
    """All iterations write the first row of the scratch memory, and read it again."""

    def row(i: Any) -> None:
        loop(128, lambda j: T.buffer_store(shared, x[i, j] * common.const(3.0, "float32"), [0, j]))
        loop(128, lambda j: T.buffer_store(y, shared[0, j], [i, j]))

    parallel(N, row)


def own_row(x: Any, y: Any, shared: Any, local: Any) -> None:
    """Each iteration writes its own row of the scratch memory, and reads it again; the kernel says so."""

    def row(i: Any) -> None:
        loop(128, lambda j: T.buffer_store(shared, x[i, j] * common.const(3.0, "float32"), [i, j]))
        loop(128, lambda j: T.buffer_store(y, shared[i, j], [i, j]))

    parallel(N, row)


def stack_between(x: Any, y: Any, shared: Any, local: Any) -> None:
    """The second loop reads from the stack what the first has left there."""
    parallel(128, lambda j: T.buffer_store(local, common.const(3.0, "float32"), [j]))
    parallel(N, lambda i: loop(128, lambda j: T.buffer_store(y, x[i, j] * local[j], [i, j])))


CASES = {
    one_loop: (N,),
    nested: (N,),
    inner_only: (0,),
    two_loops: (N,),
    reversed_rows: (N, N),
    own_part: (N,),
    small_between: (N, N),
    serial_around: (0, N, 0),
    own_stack: (N,),
    shared_inside: (0,),
    own_row: (N,),
    stack_between: (0,),
}


@pytest.mark.host
@pytest.mark.parametrize(("body", "tasks"), CASES.items(), ids=[f.__name__ for f in CASES])
def test_phases(body: Callable[..., None], tasks: tuple[int, ...]) -> None:
    """What they are, and that the parts of each, run one after the other, give the result."""
    function = kernel(body)
    lowered = lower_kernels(tvm.IRModule({"k": function}), HOST)
    names = ["k"] if len(tasks) == 1 else [f"k_{number}" for number in range(len(tasks))]
    assert lowered.phases["k"] == tuple(zip(names, tasks, strict=True))
    assert sorted(v.name_hint for v in lowered.module.functions) == names
    for name, number in lowered.phases["k"]:
        parameters = [p.name for p in lowered.module[name].params]
        pointers = len(lowered.signature["k"])
        assert parameters[pointers:] == (["begin", "end"] if number else [])
    assert "parallel" not in str(lowered.module.script())
    x = np.random.default_rng(0).standard_normal((N, 128)).astype(np.float32)
    np.testing.assert_array_equal(run(Call(function, (x,), ((x.shape, "float32"),))), x * np.float32(3))


@pytest.mark.pure
def test_a_single_task_is_no_loop() -> None:
    with common.prim_func("k") as builder:
        x, y = param("x", (1, 128), "float32"), param("y", (1, 128), "float32")
        parallel(1, lambda i: loop(128, lambda j: T.buffer_store(y, x[i, j], [i, j])))
        parallel(0, lambda i: loop(128, lambda j: T.buffer_store(y, x[i, j], [i, j])))
    assert lower_kernels(tvm.IRModule({"k": builder.get()}), HOST).phases == {"k": (("k", 0),)}
