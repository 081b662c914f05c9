"""The Plan: what the device has to do, as plain data.

An ordered list of kernel calls, the constants they read, and one arena with an offset for every buffer. The emitter
prints it, the report draws it and the cost is computed from it, so the three cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgec.integer import dequantize, quantize

ALIGN = 64
COPY = "edgec_copy"
# Orders tried by each of the two local searches of `place`; a network of 100 buffers takes less than a millisecond for
# each.
SWAPS = 400


@dataclass(frozen=True)
class Form:
    """How a port of the model is laid out on a device that takes codes or another order of axes.

    shape, dtype: the model's own. axes: its axes in the device's order, or None. scale, zero_point: the codes of the
    device stand for scale * (code - zero_point); None: they are the values.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...] | None = None
    scale: float | None = None
    zero_point: int = 0

    def permuted(self, axes: tuple[int, ...]) -> Form:
        return replace(self, axes=axes)

    def coded(self, scale: float, zero_point: int) -> Form:
        return replace(self, scale=scale, zero_point=zero_point)

    def to_device(self, array: np.ndarray) -> np.ndarray:
        """The device's form of an array [..., *shape]; leading axes stay."""
        if self.axes is not None:
            lead = array.ndim - len(self.axes)
            array = array.transpose(*range(lead), *(lead + a for a in self.axes))
        return array if self.scale is None else quantize(array, self.scale, self.zero_point)

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_device`, for what the device gives."""
        if self.scale is not None:
            array = dequantize(array, self.scale, self.zero_point)
        if self.axes is not None:
            lead = array.ndim - len(self.axes)
            back = np.argsort(self.axes)
            array = array.transpose(*range(lead), *(lead + int(a) for a in back))
        return np.ascontiguousarray(array)


@dataclass(frozen=True)
class Port:
    """A graph input or output: a pointer of the caller's. form: None where it is as the model has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: Form | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Buffer:
    """A tensor at run time, live from step `first` to step `last` (inclusive).

    offset: bytes from the start of the arena; None for inputs and outputs, which the caller owns.
    alias_of: the buffer whose memory this one shares; kind: "input", "output", "temp" or "scratch".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    first: int
    last: int
    kind: str
    offset: int | None = None
    alias_of: str | None = None


@dataclass(frozen=True)
class Constant:
    """Weights as the kernel reads them."""

    name: str
    array: np.ndarray


@dataclass(frozen=True)
class Step:
    """One kernel call. `args` names buffers and constants in the order of the C parameters: inputs, then `outputs`
    results, then scratch."""

    symbol: str
    args: tuple[str, ...]
    layer: str
    op: str
    macs: int
    tuned: bool
    outputs: int = 1
    origin: str = ""


@dataclass(frozen=True)
class Plan:
    """arena_bytes: size of the arena. arena_lower_bound: the most bytes alive at any step, which no plan can beat.

    pointers: the input or output (by its name) that a buffer without offset stands for.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    buffers: Mapping[str, Buffer]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]
    pointers: Mapping[str, str]
    arena_bytes: int
    arena_lower_bound: int
    arena_align: int = ALIGN

    @property
    def weight_bytes(self) -> int:
        return sum(c.array.nbytes for c in self.constants.values())

    @property
    def macs(self) -> int:
        return sum(s.macs for s in self.steps)

    def timeline(self) -> list[dict[str, Any]]:
        """Rows for drawing the arena over time: one per buffer that owns memory in it."""
        return [
            {
                "name": b.name,
                "kind": b.kind,
                "first": b.first,
                "last": b.last,
                "offset": b.offset,
                "nbytes": b.nbytes,
                "layer": self.steps[b.first].layer or self.steps[b.first].op,
            }
            for b in self.buffers.values()
            if b.offset is not None and b.alias_of is None
        ]

    def traced(self) -> Plan:
        """The same calls in the same memory, each followed by a copy of its result into a further output.

        The further outputs are named `step<number>`; for looking into generated code layer by layer.
        """
        steps, outputs, buffers, pointers = [], list(self.outputs), dict(self.buffers), dict(self.pointers)
        for number, step in enumerate(self.steps):
            steps.append(step)
            written = step.args[len(step.args) - self._scratch(step) - 1]
            buffer = self.buffers[written]
            port = Port(f"step{number}", buffer.shape, buffer.dtype)
            outputs.append(port)
            buffers[f"trace{number}"] = Buffer(
                f"trace{number}", buffer.dtype, buffer.shape, buffer.nbytes, number, number, "output"
            )
            pointers[f"trace{number}"] = port.name
            steps.append(Step(COPY, (written, f"trace{number}"), step.layer, "copy", 0, True))
        return replace(self, steps=tuple(steps), outputs=tuple(outputs), buffers=buffers, pointers=pointers)

    def _scratch(self, step: Step) -> int:
        return sum(1 for a in step.args if a in self.buffers and self.buffers[a].kind == "scratch")

    def text(self) -> str:
        """Stable text form: one line per step."""
        lines = [f"plan {self.name} arena={self.arena_bytes} lower_bound={self.arena_lower_bound}"]
        for number, step in enumerate(self.steps):
            lines.append(f"  {number}: {step.symbol}({', '.join(map(self._place, step.args))}) @{step.layer}")
        return "\n".join(lines) + "\n"

    def _place(self, name: str) -> str:
        if name in self.constants:
            return f"{name}[{self.constants[name].array.nbytes}]"
        buffer = self.buffers[name]
        return name if buffer.offset is None else f"{name}@{buffer.offset}[{buffer.nbytes}]"


def place(sizes: Mapping[str, tuple[int, int, int]], align: int = ALIGN) -> tuple[dict[str, int], int]:
    """Offsets for buffers given as {name: (bytes, first step, last step)}, and the size of the arena.

    Greedy by size (the largest buffer first) or by breadth (the fullest step first), whichever needs less, each buffer
    into the tightest gap between those alive at the same time (Pisarchyk and Lee, "Efficient Memory Management for
    Deep Neural Net Inference"). Where that misses the lower bound, a seeded local search swaps pairs in the order, and
    then puts buffers that end at the top of the arena further to the front.
    """
    bound = lower_bound(sizes, align)
    rounded = {name: -(-size // align) * align for name, (size, _, _) in sizes.items()}
    meets = _meetings(sizes)

    def placed(order: Sequence[str]) -> tuple[dict[str, int], int]:
        return _place_in_order(rounded, meets, order)

    found = [(placed(order), order) for order in (_by_size(sizes), _by_breadth(sizes))]
    best, order = min(found, key=lambda item: item[0][1])
    random = np.random.default_rng(0)
    for number in range(2 * SWAPS):
        if best[1] <= bound or len(order) < 2:
            break
        swapped = list(order)
        if number < SWAPS:
            i, j = (int(k) for k in random.choice(len(order), 2, replace=False))
            swapped[i], swapped[j] = swapped[j], swapped[i]
        else:
            top = [name for name in order if best[0][name] + rounded[name] == best[1]]
            moved = top[int(random.integers(len(top)))]
            swapped.remove(moved)
            swapped.insert(int(random.integers(order.index(moved) + 1)), moved)
        candidate = placed(swapped)
        if candidate[1] <= best[1]:
            best, order = candidate, swapped
    return best


def _by_size(sizes: Mapping[str, tuple[int, int, int]]) -> list[str]:
    return sorted(sizes, key=lambda n: (-sizes[n][0], sizes[n][1], n))


def _by_breadth(sizes: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """Buffers of the step with the most bytes alive first, those of the next fullest step after them."""
    alive = _alive(sizes)
    breadth = {s: sum(sizes[n][0] for n in names) for s, names in alive.items()}
    order: dict[str, None] = {}
    for step in sorted(alive, key=lambda s: (-breadth[s], s)):
        order.update(dict.fromkeys(_by_size({n: sizes[n] for n in alive[step]})))
    return list(order)


def _alive(sizes: Mapping[str, tuple[int, int, int]]) -> dict[int, list[str]]:
    """The buffers alive at each step at which one begins, in order of the steps."""
    alive: dict[int, list[str]] = {}
    now: list[str] = []
    for name in sorted(sizes, key=lambda n: sizes[n][1]):
        step = sizes[name][1]
        if step not in alive:
            now = [other for other in now if sizes[other][2] >= step]
        now.append(name)
        alive[step] = list(now)
    return alive


def _meetings(sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, set[str]]:
    """For each buffer those that are alive together with it."""
    meets: dict[str, set[str]] = {name: set() for name in sizes}
    for step, names in _alive(sizes).items():
        begun = [name for name in names if sizes[name][1] == step]
        for name in begun:
            meets[name].update(names)
        for name in names:
            meets[name].update(begun)
    for name, others in meets.items():
        others.discard(name)
    return meets


def _place_in_order(
    rounded: Mapping[str, int], meets: Mapping[str, set[str]], order: Sequence[str]
) -> tuple[dict[str, int], int]:
    """Put one buffer after the other into the tightest gap that takes it."""
    offsets: dict[str, int] = {}
    peak = 0
    for name in order:
        size = rounded[name]
        busy = sorted((offsets[other], offsets[other] + rounded[other]) for other in meets[name] if other in offsets)
        best, cursor = None, 0
        for start, end in busy:
            gap = start - cursor
            if gap >= size and (best is None or gap < best[1]):
                best = (cursor, gap)
            cursor = max(cursor, end)
        offsets[name] = best[0] if best is not None else cursor
        peak = max(peak, offsets[name] + size)
    return offsets, peak


def lower_bound(sizes: Mapping[str, tuple[int, int, int]], align: int = ALIGN) -> int:
    """The most aligned bytes that are alive at one step."""
    return max((sum(-(-sizes[n][0] // align) * align for n in names) for names in _alive(sizes).values()), default=0)


@dataclass
class PlanBuilder:
    """Collects calls in execution order; `finish` decides lifetimes, sharing and offsets."""

    name: str
    align: int = ALIGN
    _inputs: list[Port] = field(default_factory=list)
    _outputs: dict[str, Port] = field(default_factory=dict)
    _tensors: dict[str, tuple[str, tuple[int, ...], str]] = field(default_factory=dict)
    _alias: dict[str, str] = field(default_factory=dict)
    _constants: dict[str, Constant] = field(default_factory=dict)
    _by_content: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)
    _inplace: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add_input(self, name: str, shape: Sequence[int], dtype: str, form: Form | None = None) -> str:
        """Declare a graph input; returns its buffer name."""
        self._inputs.append(Port(name, tuple(shape), dtype, form))
        self._tensors[f"in_{name}"] = (dtype, tuple(shape), "input")
        return f"in_{name}"

    def add_temp(self, shape: Sequence[int], dtype: str) -> str:
        """Declare a tensor between two steps; returns its buffer name."""
        name = f"t{len(self._tensors)}"
        self._tensors[name] = (dtype, tuple(shape), "temp")
        return name

    def add_constant(self, array: np.ndarray) -> str:
        """Declare a constant; equal contents are stored once."""
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._by_content:
            name = f"c{len(self._constants)}"
            self._by_content[key] = name
            self._constants[name] = Constant(name, array)
        return self._by_content[key]

    def alias(self, of: str, shape: Sequence[int]) -> str:
        """A view: the same memory under another shape. A view of a constant is the constant."""
        if of in self._constants:
            return of
        name = f"t{len(self._tensors)}"
        self._tensors[name] = (self._tensors[of][0], tuple(shape), "temp")
        self._alias[name] = of
        return name

    def add_step(
        self,
        symbol: str,
        args: Sequence[str],
        *,
        layer: str = "",
        op: str = "",
        macs: int = 0,
        tuned: bool = True,
        inplace: Iterable[int] = (),
        scratch: Sequence[int] = (),
        outputs: int = 1,
        origin: str = "",
    ) -> None:
        """Append a call; the last `outputs` of `args` are written.

        inplace: argument positions the output may overwrite. scratch: bytes of each further pointer parameter.
        """
        self._inplace[len(self._steps)] = tuple(inplace)
        extra = []
        for size in scratch:
            name = f"s{len(self._tensors)}"
            self._tensors[name] = ("uint8", (size,), "scratch")
            extra.append(name)
        self._steps.append(Step(symbol, (*args, *extra), layer, op or symbol, macs, tuned, outputs, origin))

    def add_output(self, name: str, buffer: str, shape: Sequence[int], dtype: str, form: Form | None = None) -> None:
        """Declare that `buffer` is returned. A buffer that is an input, a constant, a view or already returned is
        copied; any other is computed in the caller's memory."""
        port = Port(name, tuple(shape), dtype, form)
        owned = buffer in self._tensors and self._tensors[buffer][2] == "temp"
        root = self._root(buffer)
        taken = {self._root(b) for b in self._outputs}
        movable = owned and self._tensors[root][2] == "temp" and root not in taken
        if not movable:
            target = f"out_{name}"
            self._tensors[target] = (dtype, tuple(shape), "temp")
            self.add_step(COPY, (buffer, target), op="copy")
            buffer = target
        self._outputs[buffer] = port

    def _root(self, name: str) -> str:
        while name in self._alias:
            name = self._alias[name]
        return name

    def finish(self) -> Plan:
        """Compute lifetimes, decide in-place reuse, place buffers and check the result."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for number, step in enumerate(self._steps):
            for name in step.args:
                if name in self._tensors:
                    first.setdefault(self._root(name), number)
                    last[self._root(name)] = number
        returned = {self._root(b): port for b, port in self._outputs.items()}
        for root in returned:
            last[root] = len(self._steps)
        self._share_inplace(first, last, returned)
        sizes = {
            root: (self._nbytes(root), first[root], last[root])
            for root in first
            if self._root(root) == root and root not in returned and self._tensors[root][2] != "input"
        }
        offsets, peak = place(sizes, self.align)
        plan = Plan(
            name=self.name,
            inputs=tuple(self._inputs),
            outputs=tuple(self._outputs.values()),
            buffers=self._buffers(first, last, returned, offsets),
            constants={n: c for n, c in self._constants.items() if any(n in s.args for s in self._steps)},
            steps=tuple(self._steps),
            pointers={f"in_{p.name}": p.name for p in self._inputs} | {r: p.name for r, p in returned.items()},
            arena_bytes=peak,
            arena_lower_bound=lower_bound(sizes, self.align),
            arena_align=self.align,
        )
        check(plan)
        return plan

    def _share_inplace(self, first: dict[str, int], last: dict[str, int], returned: Mapping[str, Port]) -> None:
        """Let an output take over an input that dies in the same step, where the kernel allows it and sizes agree."""
        for number, step in enumerate(self._steps):
            outputs = [a for a in step.args if self._tensors.get(a, ("", (), "scratch"))[2] != "scratch"]
            if step.outputs != 1 or step.symbol == COPY:
                continue
            out = self._root(outputs[-1])
            for position in self._inplace[number]:
                victim = step.args[position]
                if victim not in self._tensors:
                    continue
                root = self._root(victim)
                free = self._tensors[root][2] == "temp" and last[root] == number and root not in returned
                if free and out not in returned and root != out and self._nbytes(root) == self._nbytes(out):
                    if sum(self._root(a) == root for a in step.args if a in self._tensors) > 1:
                        continue
                    self._alias[out] = root
                    last[root] = last[out]
                    break

    def _nbytes(self, name: str) -> int:
        dtype, shape, _ = self._tensors[name]
        return math.prod(shape) * np.dtype(dtype).itemsize

    def _buffers(
        self,
        first: Mapping[str, int],
        last: Mapping[str, int],
        returned: Mapping[str, Port],
        offsets: Mapping[str, int],
    ) -> dict[str, Buffer]:
        used = {a for s in self._steps for a in s.args} & set(self._tensors)
        roots = {self._root(n) for n in used}
        buffers = {}
        for name in self._tensors:
            if name not in used | roots:
                continue
            dtype, shape, kind = self._tensors[name]
            root = self._root(name)
            port = returned.get(root)
            buffers[name] = Buffer(
                name=name,
                dtype=dtype,
                shape=shape,
                nbytes=self._nbytes(name),
                first=first.get(root, 0),
                last=last.get(root, 0),
                kind="output" if port is not None else self._tensors[root][2] if root != name else kind,
                offset=offsets.get(root),
                alias_of=None if root == name else root,
            )
        return {n: replace(b, alias_of=b.alias_of) for n, b in buffers.items()}


def check(plan: Plan) -> None:
    """Every buffer is written before it is read, every output is written, and what is alive together does not overlap.

    Raises AssertionError: a plan that fails is a bug of the planner.
    """
    written = {f"in_{p.name}" for p in plan.inputs}
    for step in plan.steps:
        names = [a for a in step.args if a in plan.buffers]
        roots = [plan.buffers[n].alias_of or n for n in names]
        real = [r for n, r in zip(names, roots, strict=True) if plan.buffers[n].kind != "scratch"]
        for root in real[: -step.outputs]:
            if root not in written:
                raise AssertionError(f"{step.symbol} reads {root} before it is written")
        written |= set(real[-step.outputs :])
    for root, port in plan.pointers.items():
        if root not in written:
            raise AssertionError(f"output {port} is never written")
    owners = [b for b in plan.buffers.values() if b.alias_of is None and b.offset is not None]
    for i, a in enumerate(owners):
        for b in owners[i + 1 :]:
            alive = a.first <= b.last and b.first <= a.last
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset  # type: ignore[operator]
            if alive and not apart:
                raise AssertionError(f"{a.name} and {b.name} overlap")
