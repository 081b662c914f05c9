"""Making a network fit into the memory of a device without changing a bit of its result.

`fit_memory` tries what costs least first: another order of the steps; parts of the network in strips of rows, which
compute nothing twice; parts of it in patches, which compute the borders of their tiles several times. Where nothing
helps, or `check_flash` finds too many weights, the error says what takes the memory and what would reduce it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from edgec.errors import EdgecError
from edgec.lowering import memory, tiles
from edgec.lowering.memory import Costs, nbytes
from edgec.lowering.tiles import NotTileable, Part, Stage
from edgec.plan import Plan
from edgec.program import Program, is_call, layer_of, output_nodes, propagate, shape_of

PlanOf = Callable[[Program], Plan]

# Plans made to confirm a choice. The model of the peak knows neither gaps between buffers nor the scratch memory of
# kernels on other sizes, so a plan may need more than it promised.
ATTEMPTS = 4
# Choices whose buffers are placed before one of them is planned.
PLACEMENTS = 8
# Calls of one stage at most: each is about 30 bytes of code.
MOST_CALLS = 1500
MOST_PATCHES = 8
# What a call, and a copied byte, cost in multiplications, to choose between ways to tile.
CALL, COPIED = 200, 1
# Layers of a stage at most.
MOST_LAYERS = 60
# The largest values and layers that error messages name.
NAMED = 4


@dataclass(frozen=True)
class Choice:
    """A way to compute a stage. cost: multiplications, calls and copies beyond those of the untiled stage."""

    stage: Stage
    method: str
    height: int
    width: int
    peak: int
    cost: int

    def parts(self) -> list[Part]:
        if self.method == "strips":
            return tiles.strips(self.stage, self.height)
        return tiles.patches(self.stage, self.height, self.width)

    def text(self) -> str:
        rows = "1 row" if self.height == 1 else f"{self.height} rows"
        return f"strips of {rows}" if self.method == "strips" else f"patches of {self.height}x{self.width}"


@dataclass
class _Network:
    """A graph in the order of its steps, and what is alive between them.

    levels: bytes alive during each step. last: the last step that reads the value of each one, or its memory through
    a view. ends: steps between which stages lie.
    """

    module: fx.GraphModule
    costs: Costs
    steps: list[fx.Node] = field(init=False)
    levels: list[int] = field(init=False)
    last: list[int] = field(init=False)
    ends: set[int] = field(init=False)
    known: dict[tuple[int, int], _Options] = field(default_factory=dict)

    def __post_init__(self) -> None:
        returned = output_nodes(self.module)
        self.costs = replace(self.costs, callers=frozenset(memory.root_of(n) for n in returned))
        nodes, items = memory.items_of(self.module, self.costs)
        levels = dict(zip(nodes, memory.profile(items), strict=True))
        self.steps = [n for n in nodes if n.op == "call_function"]
        self.levels = [levels[n] for n in self.steps]
        position = {n: i for i, n in enumerate(self.steps)}
        self.last = list(range(len(self.steps)))
        for i, item in enumerate(items):
            for read in item.reads:
                if nodes[read] in position:
                    self.last[position[nodes[read]]] = position[nodes[i]]
        for n in returned:
            if n in position:
                self.last[position[n]] = len(self.steps)
        inner = {i + 1 for i, n in enumerate(self.steps) if self._inside(n)}
        self.ends = set(range(len(self.steps) + 1)) - inner | {len(self.steps)}

    def _inside(self, node: fx.Node) -> bool:
        """Whether a stage that ends with a value had better end before it or behind it: the value is larger than what
        it is computed from, or than what its only reader, a layer, makes of it."""
        readers = list(node.users)
        if len(readers) != 1 or not is_call(readers[0], *tiles.WINDOWS):
            return False
        maps = [nbytes(a) for a in node.all_input_nodes if a.op != "get_attr"]
        return nbytes(node) > max(maps, default=0) or nbytes(node) > nbytes(readers[0])

    def choose(self, budget: int, methods: Sequence[str]) -> list[Choice] | None:
        """The cheapest stages with which no step needs more than `budget` bytes; None where there are none.

        A shortest path over the steps: one that is left as it is costs nothing, a stage what it adds.
        """
        best: dict[int, tuple[int, list[Choice]]] = {0: (0, [])}
        for first in range(len(self.steps)):
            if first not in best:
                continue
            cost, stages = best[first]
            level, inner = 0, first
            for end in range(first + 1, min(first + MOST_LAYERS, len(self.steps)) + 1):
                level = max(level, self.levels[end - 1])
                if end - 2 >= first:
                    inner = max(inner, self.last[end - 2])
                found: list[Choice] = []
                if level > budget:
                    if inner >= end or not {first, end} <= self.ends or best.get(end, (cost + 1,))[0] <= cost:
                        continue
                    choice = self._options(first, end).cheapest(budget, methods)
                    if choice is None:
                        continue
                    found = [choice]
                total = cost + sum(choice.cost for choice in found)
                if end not in best or total < best[end][0]:
                    best[end] = total, [*stages, *found]
        reached = best.get(len(self.steps))
        return None if reached is None else reached[1]

    def _options(self, first: int, end: int) -> _Options:
        """Ways to tile steps first .. end, of which nothing but the last value is read behind them."""
        if (first, end) not in self.known:
            before = [i for i in range(first) if self.last[i] >= end]
            kept = {self.steps[i] for i in before}
            try:
                stage = Stage(self.module, self.steps[first:end])
                beside = sum(self.costs.value(n) for n in kept - {memory.root_of(s) for s in stage.sources})
            except NotTileable:
                stage, beside = None, 0
            self.known[first, end] = _Options(stage, self.costs, frozenset(kept), beside)
        return self.known[first, end]


@dataclass
class _Options:
    """Ways to tile a stage, from coarse to fine; each is made when first asked for, and once.

    kept: values from before the stage that are read behind it. beside: bytes of those that the stage does not read.
    """

    stage: Stage | None
    costs: Costs
    kept: frozenset[fx.Node]
    beside: int
    made: dict[tuple[str, int, int], Choice | None] = field(default_factory=dict)

    def cheapest(self, budget: int, methods: Sequence[str]) -> Choice | None:
        """The coarsest way of the first method that stays within `budget` bytes."""
        stage = self.stage
        if stage is None:
            return None
        whole = {memory.root_of(n) for n in (*stage.sources, stage.out)}
        if sum(self.costs.value(n) for n in whole) + self.beside >= budget:
            return None
        rows, columns = (stage.extent(stage.out, axis) for axis in (0, 1))
        for method in methods:
            for height, width in _grids(method, rows, columns):
                choice = self._choice(stage, method, height, width)
                if choice is None:
                    break
                if choice.peak <= budget:
                    return choice
        return None

    def _choice(self, stage: Stage, method: str, height: int, width: int) -> Choice | None:
        """None where the stage cannot be tiled in this way, and then not in finer ones."""
        key = method, height, width
        if key not in self.made:
            self.made[key] = None
            try:
                if method == "strips":
                    found = tiles.estimate_strips(stage, height, self.costs, self.kept)
                else:
                    found = tiles.estimate_patches(stage, height, width, self.costs, self.kept)
            except NotTileable:
                return None
            if found.calls <= MOST_CALLS:
                extra = found.macs - stage.whole_macs()
                cost = extra + CALL * (found.calls - len(stage.nodes)) + COPIED * found.copied
                self.made[key] = Choice(stage, method, height, width, found.peak + self.beside, max(cost, 1))
        return self.made[key]


def _grids(method: str, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Tile sizes from coarse to fine."""
    most = rows if method == "strips" else MOST_PATCHES
    sizes = ((-(-rows // n), columns if method == "strips" else -(-columns // n)) for n in range(2, most + 1))
    return iter(dict.fromkeys(sizes))


def fit_memory(
    staged: Program, plan_of: PlanOf, sram_bytes: int, methods: Sequence[str] = ("strips", "patches")
) -> tuple[Program, list[str]]:
    """A graph with the results of `staged` whose arena has at most `sram_bytes`, and a line for each measure taken.

    staged: region operators, from `edgec.lowering.lower.lower_torch`. plan_of: lowers such a graph to a Plan; called a
    few times. methods: ways to tile, in the order in which they are preferred.

    Raises EdgecError naming what is alive at the peak and the smallest arena found where there is no such graph.
    """
    plan = plan_of(staged)
    if plan.arena_bytes <= sram_bytes:
        return staged, []
    costs = _costs(plan)
    needs = {"as it is": plan.arena_bytes}
    module = staged.edit()
    propagate(module, staged.example_inputs)
    lines = []
    before, after = memory.reorder(module, costs)
    if after < before:
        ordered = _program(staged, module)
        plan = plan_of(ordered)
        needs["in another order"] = plan.arena_bytes
        lines.append(f"order of the steps: {before:,} to {after:,} bytes")
        if plan.arena_bytes <= sram_bytes:
            return ordered, lines
    network = _Network(module, costs)
    # What plans need beyond the model of the peak, as far as it is known.
    excess = 0
    for _ in range(ATTEMPTS):
        found = _fitting(staged, network, sram_bytes - excess, methods)
        if found is None:
            break
        candidate, said, expected = found
        plan_found = plan_of(candidate)
        if plan_found.arena_bytes <= sram_bytes:
            return candidate, [*lines, *said]
        needs[", ".join(said)] = plan_found.arena_bytes
        excess = max(plan_found.arena_bytes - expected, excess + sram_bytes // 100)
    needed, how = _smallest(staged, plan_of, network, sram_bytes, needs, methods)
    reached = f"smallest arena found: {needed:,} bytes ({how})" if needed < plan.arena_bytes else "tiling does not help"
    raise too_large(plan, sram_bytes, reached, needed)


def _fitting(
    staged: Program, network: _Network, sram_bytes: int, methods: Sequence[str]
) -> tuple[Program, list[str], int] | None:
    """(graph, lines, arena) that the model of the memory takes to fit. The search knows no gaps between buffers: where
    there are some, it is repeated with less."""
    budget = sram_bytes
    for _ in range(PLACEMENTS):
        choices = network.choose(budget, methods)
        if choices is None:
            return None
        candidate, said = _tiled(staged, network, choices)
        _, items = memory.items_of(candidate.module, network.costs)
        arena, peak = memory.arena(items, network.costs.align), max(memory.profile(items))
        if arena <= sram_bytes:
            return candidate, said, arena
        # Below the peak of these stages, so that others are chosen.
        budget = min(budget - 1, peak - 1)
    return None


def _costs(plan: Plan) -> Costs:
    """Alignment and scratch memory as in a plan, by the call that computes a node's value."""
    found: dict[str, int] = {}
    for step in plan.steps:
        size = sum(plan.buffers[a].nbytes for a in step.args if _is_scratch(plan, a))
        if step.origin:
            found[step.origin] = max(size, found.get(step.origin, 0))
    return Costs(plan.arena_align, found)


def _is_scratch(plan: Plan, name: str) -> bool:
    return name in plan.buffers and plan.buffers[name].kind == "scratch"


def _program(staged: Program, module: fx.GraphModule) -> Program:
    module.graph.lint()
    module.recompile()
    propagate(module, staged.example_inputs)
    return replace(staged, module=module)


def _tiled(staged: Program, network: _Network, choices: Sequence[Choice]) -> tuple[Program, list[str]]:
    """The network with its stages tiled, in a copy, and a line for each."""
    module = copy.deepcopy(network.module)
    twins = dict(zip(network.module.graph.nodes, module.graph.nodes, strict=True))
    total = sum(macs_of(n) for n in network.steps)
    lines = []
    # From the last one: the parts of a stage name the result of the stage before it.
    for choice in reversed(choices):
        stage = Stage(module, [twins[n] for n in choice.stage.nodes])
        parts = choice.parts()
        tiles.rewrite(stage, [tiles.on(part, twins) for part in parts])
        extra = tiles.macs(choice.stage, parts) - choice.stage.whole_macs()
        share = "no more MACs" if extra <= 0 else f"{extra / max(total, 1):+.1%} MACs"
        names = [layer_of(n) for n in choice.stage.nodes]
        lines.append(f"{names[0]} .. {names[-1]} in {choice.text()}: {share}, {len(parts)} calls")
    return _program(staged, module), lines[::-1]


def macs_of(node: fx.Node) -> int:
    """Multiplications of a convolution; 0 for other nodes, which tiles leave as they are."""
    if node.target not in tiles.CONVOLUTIONS:
        return 0
    weight = shape_of(node.args[1])  # type: ignore[arg-type]
    return math.prod(weight) * math.prod(shape_of(node)[:3])


def _smallest(
    staged: Program,
    plan_of: PlanOf,
    network: _Network,
    sram_bytes: int,
    needs: dict[str, int],
    methods: Sequence[str],
) -> tuple[int, str]:
    """(bytes, how) of the smallest arena that tiling reaches, by bisection; for the error message."""
    low, high = sram_bytes, min(needs.values())
    choices = None
    while high - low > max(high // 64, 1):
        middle = (low + high) // 2
        found = network.choose(middle, methods)
        if found is None:
            low = middle
        else:
            high, choices = middle, found
    if choices:
        candidate, said = _tiled(staged, network, choices)
        needs[", ".join(said)] = plan_of(candidate).arena_bytes
    how = min(needs, key=lambda k: needs[k])
    return needs[how], how


def too_large(plan: Plan, sram_bytes: int, reached: str, needed: int | None = None) -> EdgecError:
    """What to say of a plan whose arena exceeds `sram_bytes`. reached: what else there is. needed: the smallest arena
    that is known."""
    rows = plan.timeline()
    alive = {step: [r for r in rows if r["first"] <= step <= r["last"]] for step in range(len(plan.steps))}
    peak = max(alive, key=lambda step: sum(r["nbytes"] for r in alive[step]))
    largest = sorted(alive[peak], key=lambda r: -r["nbytes"])[:NAMED]
    named = ", ".join(f"{r['layer'] or r['name']} {r['nbytes']:,}" for r in largest)
    step = plan.steps[peak]
    board = "" if needed is None else f", or a board with {needed:,} bytes for the arena"
    return EdgecError(
        f"the arena takes {plan.arena_bytes:,} bytes and may take {sram_bytes:,}; at the peak: {named}; {reached}",
        where=f"layer {step.layer or step.op} of {plan.name}",
        hint=f"remove channels with prune-channels, use a smaller input{board}",
    )


def check_flash(plan: Plan, code_bytes: int, flash_bytes: int) -> None:
    """Raises EdgecError naming the largest layers where weights and code exceed the flash memory.

    code_bytes: size of the compiled code without the weights.
    """
    total = plan.weight_bytes + code_bytes
    if total <= flash_bytes:
        return
    layers: dict[str, int] = {}
    counted: set[str] = set()
    for step in plan.steps:
        for name in step.args:
            if name in plan.constants and name not in counted:
                counted.add(name)
                layer = step.layer or step.op
                layers[layer] = layers.get(layer, 0) + plan.constants[name].array.nbytes
    named = ", ".join(f"{n} {layers[n]:,}" for n in sorted(layers, key=lambda n: -layers[n])[:NAMED])
    raise EdgecError(
        f"{plan.weight_bytes:,} bytes of weights and {code_bytes:,} of code exceed {flash_bytes:,}; largest: {named}",
        where=f"flash of {plan.name}",
        hint="store weights in fewer bits with quantize-weights or quantize-mixed, or remove channels: prune-channels",
    )
