"""The memory planner: random graphs are executed on one arena and compared with the same graph without sharing."""

from __future__ import annotations

import dataclasses
import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.plan import ALIGN, COPY, Plan, PlanBuilder, check, lower_bound, place

pytestmark = pytest.mark.pure


# -- placement ---------------------------------------------------------------------------------------------------------

LIVES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 6)), max_size=24)


@given(LIVES)
@settings(max_examples=300, deadline=None)
def test_placed_buffers_never_overlap(lives: list[tuple[int, int, int]]) -> None:
    sizes = {f"b{i}": (n, first, first + span) for i, (n, first, span) in enumerate(lives)}
    offsets, peak = place(sizes)
    assert offsets.keys() == sizes.keys()
    used = np.full((20, peak), "", dtype="U8")
    for name, (n, first, last) in sizes.items():
        assert offsets[name] % ALIGN == 0
        assert offsets[name] + n <= peak
        region = used[first : last + 1, offsets[name] : offsets[name] + n]
        assert (region == "").all(), name
        region[:] = name
    assert peak >= lower_bound(sizes)


def test_lower_bound_is_the_fullest_step() -> None:
    sizes = {"a": (100, 0, 1), "b": (64, 1, 2), "c": (1, 2, 2), "d": (640, 4, 4)}
    assert lower_bound(sizes) == 640
    del sizes["d"]
    assert lower_bound(sizes) == 128 + 64


def test_the_tightest_gap_is_taken() -> None:
    """At step 1 gaps of 640 and 320 bytes are free: 256 bytes go into the smaller one."""
    sizes = {
        "left": (1024, 0, 5),
        "wide": (640, 0, 0),
        "middle": (512, 0, 5),
        "narrow": (320, 0, 0),
        "right": (256, 0, 5),
        "new": (256, 1, 1),
    }
    offsets, peak = place(sizes)
    assert (offsets["wide"], offsets["narrow"], offsets["new"]) == (1024, 2176, 2176)
    assert peak == 2752


def test_another_order_where_the_largest_first_wastes_memory() -> None:
    """Both tensors of 320 bytes at offset 0 leave the two of 128 bytes, which meet at step 3, no common place below."""
    sizes = {"a": (128, 0, 3), "b": (128, 3, 5), "c": (320, 5, 8), "d": (320, 1, 1)}
    offsets, peak = place(sizes)
    assert peak == lower_bound(sizes) == 448
    assert place(sizes) == (offsets, peak)


def test_a_chain_needs_two_tensors() -> None:
    sizes = {f"t{i}": (1000, i, i + 1) for i in range(10)}
    _, peak = place(sizes)
    assert peak == 2 * 1024 == lower_bound(sizes)


# -- whole plans -------------------------------------------------------------------------------------------------------


def random_plan(seed: int) -> tuple[Plan, dict[str, bytes], dict[str, bytes]]:
    """A random graph, and what each output and each tensor must hold when `execute` runs it.

    Both are computed without shared memory.
    """
    rng = random.Random(seed)
    builder = PlanBuilder("net")
    values: dict[str, bytes] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def known(name: str, value: bytes, shape: tuple[int, ...]) -> str:
        values[name], shapes[name] = value, shape
        return name

    def size() -> tuple[int, ...]:
        return (rng.choice((16, 16, 64, 100, 160, 1000)),)

    for i in range(rng.randint(1, 3)):
        shape = size()
        known(builder.add_input(f"x{i}", shape, "uint8"), random.Random(i).randbytes(shape[0]), shape)
    array = np.arange(rng.choice((16, 100)), dtype=np.uint8)
    known(builder.add_constant(array), array.tobytes(), array.shape)
    for number in range(rng.randint(1, 14)):
        recent = list(values)[-5:]
        if rng.random() < 0.25:
            source = rng.choice(list(values))
            alias = builder.alias(source, (1, *shapes[source]))
            known(alias, values[source], shapes[source])
            continue
        arguments = [rng.choice(recent) for _ in range(rng.randint(1, 3))]
        outputs = 2 if rng.random() < 0.1 else 1
        made = [size() if rng.random() < 0.5 else shapes[arguments[0]] for _ in range(outputs)]
        names = [builder.add_temp(shape, "uint8") for shape in made]
        builder.add_step(
            f"k{number}",
            [*arguments, *names],
            inplace=[i for i in range(len(arguments)) if rng.random() < 0.7],
            scratch=[rng.choice((1, 64, 300)) for _ in range(rng.choice((0, 0, 1, 2)))],
            outputs=outputs,
        )
        for i, (name, shape) in enumerate(zip(names, made)):
            known(name, kernel(f"k{number}", i, [values[a] for a in arguments], shape[0]), shape)
    expected = {}
    tensors = list(values)
    for i in range(rng.randint(1, 3)):
        name = rng.choice(tensors)
        builder.add_output(f"y{i}", name, shapes[name], "uint8")
        expected[f"y{i}"] = values[f"out_y{i}"] = values[name]
    return builder.finish(), expected, values


def kernel(symbol: str, index: int, inputs: list[bytes], nbytes: int) -> bytes:
    """Stands for a kernel: every output byte depends on every input byte."""
    digest = hashlib.shake_256(f"{symbol}/{index}".encode())
    for value in inputs:
        digest.update(value)
    return digest.digest(nbytes)


def execute(plan: Plan) -> dict[str, bytes]:
    """Run a plan on one arena with the kernels of `random_plan`.

    Checks what a kernel relies on: nothing that it writes overlaps another argument, except an output that takes over
    the memory of one argument from its first byte to its last.
    """
    arena = bytearray(b"\xa5" * plan.arena_bytes)
    callers: dict[str, bytearray] = {}
    for port in plan.inputs:
        callers[f"in_{port.name}"] = bytearray(random.Random(int(port.name[1:])).randbytes(port.nbytes))
    for root, port_name in plan.pointers.items():
        if root not in callers:
            (port,) = [p for p in plan.outputs if p.name == port_name]
            callers[root] = bytearray(b"\x5a" * port.nbytes)

    def place_of(name: str) -> tuple[str, int, int]:
        """(memory, start, end)."""
        if name in plan.constants:
            return name, 0, plan.constants[name].array.nbytes
        buffer = plan.buffers[name]
        root = plan.buffers[buffer.alias_of or name]
        if root.offset is None:
            return root.name, 0, buffer.nbytes
        return "arena", root.offset, root.offset + buffer.nbytes

    def read(name: str) -> bytes:
        memory, start, end = place_of(name)
        if memory in plan.constants:
            return plan.constants[memory].array.tobytes()
        return bytes((arena if memory == "arena" else callers[memory])[start:end])

    def write(name: str, value: bytes) -> None:
        memory, start, end = place_of(name)
        assert memory not in plan.constants and memory not in [f"in_{p.name}" for p in plan.inputs]
        assert len(value) == end - start
        (arena if memory == "arena" else callers[memory])[start:end] = value

    for step in plan.steps:
        real = [a for a in step.args if a in plan.constants or plan.buffers[a].kind != "scratch"]
        scratch = step.args[len(real) :]
        inputs, outputs = real[: -step.outputs], real[-step.outputs :]
        written = [*outputs, *scratch]
        for i, name in enumerate(written):
            memory, start, end = place_of(name)
            overlapping = []
            for other in [*inputs, *written[:i]]:
                elsewhere, other_start, other_end = place_of(other)
                if memory == elsewhere and start < other_end and other_start < end:
                    overlapping.append(other)
            taken_over = len(overlapping) == 1 and overlapping[0] in inputs and step.outputs == 1
            whole = taken_over and place_of(overlapping[0]) == (memory, start, end)
            assert not overlapping or whole, (step, name, overlapping)
        got = [read(a) for a in inputs]
        for name in scratch:
            write(name, b"\xee" * plan.buffers[name].nbytes)
        for i, name in enumerate(outputs):
            value = got[0] if step.symbol == COPY else kernel(step.symbol, i, got, plan.buffers[name].nbytes)
            write(name, value)
    names = {port: root for root, port in plan.pointers.items()}
    return {p.name: bytes(callers[names[p.name]]) for p in plan.outputs}


@given(st.integers(0, 10**9))
@settings(max_examples=400, deadline=None)
def test_sharing_memory_changes_no_result(seed: int) -> None:
    plan, expected, _ = random_plan(seed)
    assert execute(plan) == expected
    assert plan.arena_bytes >= plan.arena_lower_bound
    assert random_plan(seed)[0].text() == plan.text()


@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_a_traced_plan_shows_the_result_of_every_step(seed: int) -> None:
    plan, expected, values = random_plan(seed)
    got = execute(plan.traced())
    assert {name: got[name] for name in expected} == expected
    for number, step in enumerate(plan.steps):
        real = [a for a in step.args if a in plan.constants or plan.buffers[a].kind != "scratch"]
        assert got[f"step{number}"] == values[real[-1]]
    assert len(got) == len(expected) + len(plan.steps)


def test_random_plans_exercise_every_feature() -> None:
    """The property above would say nothing if the graphs had no sharing to get wrong."""
    plans = [random_plan(seed)[0] for seed in range(200)]
    assert any(s.symbol == COPY for p in plans for s in p.steps)
    assert any(b.kind == "scratch" for p in plans for b in p.buffers.values())
    in_place = [s for p in plans for s in p.steps if len({_memory(p, a) for a in s.args}) < len(set(s.args))]
    assert len(in_place) > 20
    assert sum(p.arena_bytes == p.arena_lower_bound for p in plans) > 195


def _memory(plan: Plan, name: str) -> str:
    return (plan.buffers[name].alias_of or name) if name in plan.buffers else name


# -- the builder, case by case -----------------------------------------------------------------------------------------


def test_text_of_a_small_plan() -> None:
    builder = PlanBuilder("net")
    x = builder.add_input("x", (1, 4), "float32")
    w = builder.add_constant(np.ones((4, 4), np.float32))
    hidden, y = builder.add_temp((1, 100), "float32"), builder.add_temp((1, 4), "float32")
    builder.add_step("dense", [x, w, hidden], layer="fc1", macs=16, scratch=[300])
    builder.add_step("dense2", [builder.alias(hidden, (100,)), w, y], layer="fc2", macs=400)
    builder.add_output("y", y, (1, 4), "float32")
    plan = builder.finish()
    assert plan.text() == (
        "plan net arena=768 lower_bound=768\n"
        "  0: dense(in_x, c0[64], t1@0[400], s3@448[300]) @fc1\n"
        "  1: dense2(t4@0[400], c0[64], t2) @fc2\n"
    )
    assert (plan.macs, plan.weight_bytes) == (416, 64)
    assert plan.pointers == {"in_x": "x", "t2": "y"}
    assert plan.timeline() == [
        {"name": "t1", "kind": "temp", "first": 0, "last": 1, "offset": 0, "nbytes": 400, "layer": "fc1"},
        {"name": "s3", "kind": "scratch", "first": 0, "last": 0, "offset": 448, "nbytes": 300, "layer": "fc1"},
    ]


def test_equal_constants_are_stored_once() -> None:
    builder = PlanBuilder("net")
    first = builder.add_constant(np.arange(4, dtype=np.int32))
    assert builder.add_constant(np.arange(4, dtype=np.int32)) == first
    assert builder.add_constant(np.arange(4, dtype=np.float32)) != first
    assert builder.add_constant(np.arange(4, dtype=np.int32).reshape(2, 2)) != first
    assert builder.alias(first, (2, 2)) == first


def test_a_constant_that_no_step_reads_is_dropped() -> None:
    builder = PlanBuilder("net")
    x = builder.add_input("x", (4,), "float32")
    builder.add_constant(np.zeros(1000, np.float32))
    builder.add_output("y", x, (4,), "float32")
    assert builder.finish().weight_bytes == 0


def relu_chain(*, inplace: tuple[int, ...], keep: bool = False) -> Plan:
    """x -> a -> b -> y; with `keep`, `a` is read once more at the end."""
    builder = PlanBuilder("net")
    x = builder.add_input("x", (100,), "float32")
    a, b, y = (builder.add_temp((100,), "float32") for _ in range(3))
    builder.add_step("first", [x, a])
    builder.add_step("relu", [a, b], inplace=inplace)
    builder.add_step("last", [b, *([a] if keep else []), y])
    builder.add_output("y", y, (100,), "float32")
    return builder.finish()


def test_in_place_halves_the_arena() -> None:
    assert relu_chain(inplace=()).arena_bytes == 2 * 448
    assert relu_chain(inplace=(0,)).arena_bytes == 448


def test_in_place_not_while_the_input_is_still_needed() -> None:
    assert relu_chain(inplace=(0,), keep=True).arena_bytes == 2 * 448


def test_inputs_of_the_caller_are_never_overwritten() -> None:
    builder = PlanBuilder("net")
    x = builder.add_input("x", (100,), "float32")
    a, y = builder.add_temp((100,), "float32"), builder.add_temp((100,), "float32")
    builder.add_step("relu", [builder.alias(x, (10, 10)), a], inplace=(0,))
    builder.add_step("last", [a, y])
    builder.add_output("y", y, (100,), "float32")
    assert builder.finish().arena_bytes == 448


@pytest.mark.parametrize("kind", ["input", "view of input", "constant", "returned twice"])
def test_outputs_that_are_not_computed_are_copied(kind: str) -> None:
    builder = PlanBuilder("net")
    x = builder.add_input("x", (4,), "float32")
    steps = [COPY]
    if kind == "input":
        source = x
    elif kind == "view of input":
        source = builder.alias(x, (2, 2))
    elif kind == "constant":
        source = builder.add_constant(np.zeros(4, np.float32))
    else:
        source = builder.add_temp((4,), "float32")
        builder.add_step("relu", [x, source])
        builder.add_output("first", source, (4,), "float32")
        steps = ["relu", COPY]
    builder.add_output("y", source, (4,), "float32")
    plan = builder.finish()
    assert [s.symbol for s in plan.steps] == steps
    assert plan.arena_bytes == 0
    assert set(plan.pointers.values()) == {"x", "y"} | ({"first"} if kind == "returned twice" else set())


def test_a_returned_tensor_can_be_read_on() -> None:
    """It lives in the caller's memory from its first step to the end."""
    builder = PlanBuilder("net")
    x = builder.add_input("x", (4,), "float32")
    a, b = builder.add_temp((4,), "float32"), builder.add_temp((4,), "float32")
    builder.add_step("one", [x, a])
    builder.add_step("two", [a, b], inplace=(0,))
    builder.add_output("a", a, (4,), "float32")
    builder.add_output("b", b, (4,), "float32")
    plan = builder.finish()
    assert plan.pointers == {"in_x": "x", a: "a", b: "b"}
    assert [p.name for p in plan.outputs] == ["a", "b"]
    assert plan.buffers[a].kind == "output" and plan.buffers[a].offset is None and plan.arena_bytes == 0
    assert (plan.buffers[a].first, plan.buffers[a].last) == (0, 2)


# -- the check of the planner's result ---------------------------------------------------------------------------------


def test_check_refuses_an_output_that_is_never_written() -> None:
    builder = PlanBuilder("net")
    builder.add_output("y", builder.add_temp((4,), "float32"), (4,), "float32")
    with pytest.raises(AssertionError, match="output y is never written"):
        builder.finish()


def test_check_refuses_reading_before_writing() -> None:
    plan = relu_chain(inplace=())
    with pytest.raises(AssertionError, match="relu reads t1 before it is written"):
        check(dataclasses.replace(plan, steps=plan.steps[1:]))


def test_check_refuses_overlap() -> None:
    plan = relu_chain(inplace=())
    moved = {n: dataclasses.replace(b, offset=0) if b.offset else b for n, b in plan.buffers.items()}
    with pytest.raises(AssertionError, match="t1 and t2 overlap"):
        check(dataclasses.replace(plan, buffers=moved))
