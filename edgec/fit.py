"""Making a network fit into the memory of a device without changing a bit of its result.

`fit_memory` tries what costs least first: another order of the steps; parts of the network in strips of rows, which
compute nothing twice; parts of it in patches, which compute the borders of their tiles several times. Where nothing
helps, or `check_flash` finds too many weights, the error says what takes the memory and what would reduce it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from edgec.errors import EdgecError
from edgec.lowering import memory, tiles
from edgec.lowering.memory import aligned, nbytes
from edgec.lowering.tiles import NotTileable, Part, Stage
from edgec.plan import Plan
from edgec.program import Program, layer_of, origin_of, output_nodes, propagate, shape_of

PlanOf = Callable[[Program], Plan]

# Plans made to confirm a choice. The model of the peak knows neither gaps between buffers nor the scratch memory of
# kernels on other sizes, so a plan may need more than it promised.
ATTEMPTS = 5
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
        return f"strips of {self.height} rows" if self.method == "strips" else f"patches of {self.height}x{self.width}"


@dataclass
class _Network:
    """A graph in the order of its steps, with what is alive between them.

    levels: bytes alive during each step. boundaries: steps before which at most one value is alive in the arena. ends:
    those where that value is not larger than both of its neighbours; stages lie between them.
    """

    program: Program
    module: fx.GraphModule
    scratch: Callable[[fx.Node], int]
    steps: list[fx.Node] = field(init=False)
    levels: list[int] = field(init=False)
    boundaries: list[int] = field(init=False)
    ends: set[int] = field(init=False)
    returned: set[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        nodes, items, kept = memory.items_of(self.module, self.scratch)
        levels = memory.profile(items, kept)
        chosen = [(n, level) for n, level in zip(nodes, levels, strict=True) if n.op == "call_function"]
        self.steps, self.levels = [n for n, _ in chosen], [level for _, level in chosen]
        self.returned = set(output_nodes(self.module))
        place = {n: i for i, n in enumerate(self.steps)}
        last = [max((place[u] for u in n.users if u in place), default=i) for i, n in enumerate(self.steps)]
        self.boundaries = [0]
        open_until: list[int] = []
        for i in range(1, len(self.steps) + 1):
            open_until = [end for end in (*open_until, last[i - 1]) if end >= i]
            if len(open_until) <= 1:
                self.boundaries.append(i)
        sizes = [nbytes(self.steps[i - 1]) if i else 0 for i in self.boundaries]
        around = zip(self.boundaries, sizes, [0, *sizes[:-1]], [*sizes[1:], 0], strict=True)
        low = {i for i, size, before, behind in around if size < max(before, behind) or size == before == behind}
        self.ends = low | {0, len(self.steps)}

    @property
    def peak(self) -> int:
        return max(self.levels, default=0)

    def stage(self, first: int, end: int) -> Stage | None:
        """Steps first .. end as a stage; None where they cannot be tiled."""
        try:
            return Stage(self.module, self.steps[first:end])
        except NotTileable:
            return None

    def choose(
        self, budget: int, methods: Sequence[str], known: dict[tuple[int, int], _Options]
    ) -> list[Choice] | None:
        """The cheapest stages with which no step needs more than `budget` bytes; None where there are none.

        A shortest path over the boundaries: a step as it is costs nothing, a stage what it adds.
        """
        best: dict[int, tuple[int, list[Choice]]] = {0: (0, [])}
        for number, first in enumerate(self.boundaries):
            if first not in best:
                continue
            cost, stages = best[first]
            for end in self.boundaries[number + 1 :]:
                if end - first > MOST_LAYERS:
                    break
                choice = None
                if end in best and best[end][0] <= cost:
                    continue
                if max(self.levels[first:end]) > budget:
                    if not {first, end} <= self.ends:
                        continue
                    if (first, end) not in known:
                        stage = self.stage(first, end)
                        known[first, end] = _Options(
                            stage, self.scratch, stage is not None and stage.out in self.returned
                        )
                    choice = known[first, end].cheapest(budget, methods)
                    if choice is None:
                        continue
                total = cost + (0 if choice is None else choice.cost)
                if end not in best or total < best[end][0]:
                    best[end] = total, [*stages, *([] if choice is None else [choice])]
        found = best.get(len(self.steps))
        return None if found is None else found[1]


@dataclass
class _Options:
    """Ways to tile a stage, from coarse to fine; each is made when first asked for, and once."""

    stage: Stage | None
    scratch: Callable[[fx.Node], int]
    returned: bool
    made: dict[tuple[str, int, int], Choice | None] = field(default_factory=dict)

    def cheapest(self, budget: int, methods: Sequence[str]) -> Choice | None:
        """The coarsest way of the first method that stays within `budget` bytes."""
        stage = self.stage
        if stage is None:
            return None
        own = {
            n for n in (*stage.sources, stage.out) if n.op != "placeholder" and not (self.returned and n is stage.out)
        }
        if sum(aligned(nbytes(n)) for n in own) >= budget:
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
                    found = tiles.estimate_strips(stage, height, self.scratch, self.returned)
                else:
                    found = tiles.estimate_patches(stage, height, width, self.scratch, self.returned)
            except NotTileable:
                return None
            if found.calls <= MOST_CALLS:
                extra = found.macs - stage.whole_macs()
                cost = extra + CALL * (found.calls - len(stage.nodes)) + COPIED * found.copied
                self.made[key] = Choice(stage, method, height, width, found.peak, max(cost, 1))
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
    scratch = _scratch(plan)
    needs = {"as it is": plan.arena_bytes}
    module = staged.edit()
    propagate(module, staged.example_inputs)
    lines = []
    before, after = memory.reorder(module, scratch)
    if after < before:
        ordered = _program(staged, module)
        plan = plan_of(ordered)
        needs["in another order"] = plan.arena_bytes
        lines.append(f"order of the steps: {before:,} to {after:,} bytes")
        if plan.arena_bytes <= sram_bytes:
            return ordered, lines
    known: dict[tuple[int, int], _Options] = {}
    network = _Network(staged, module, scratch)
    budget = sram_bytes
    for _ in range(ATTEMPTS):
        choices = network.choose(budget, methods, known)
        if choices is None:
            break
        # Stages are of one module: each attempt rewrites a copy.
        candidate, said = _tiled(staged, network, choices)
        found = plan_of(candidate)
        if found.arena_bytes <= sram_bytes:
            return candidate, [*lines, *said]
        needs[", ".join(said)] = found.arena_bytes
        # Below what these stages and the other steps need, so that something else is chosen.
        peak = max(memory.profile(memory.items_of(candidate.module, scratch)[1]))
        budget = min(budget - (found.arena_bytes - sram_bytes), peak - 1)
    needed, how = _smallest(staged, plan_of, network, known, sram_bytes, needs, methods)
    reached = f"smallest arena found: {needed:,} bytes ({how})" if needed < plan.arena_bytes else "tiling does not help"
    raise too_large(plan, sram_bytes, reached, needed)


def _scratch(plan: Plan) -> Callable[[fx.Node], int]:
    """Scratch memory of the kernel of a node, by the call that computes its value."""
    found: dict[str, int] = {}
    for step in plan.steps:
        size = sum(aligned(plan.buffers[a].nbytes) for a in step.args if _is_scratch(plan, a))
        if step.origin:
            found[step.origin] = max(size, found.get(step.origin, 0))
    return lambda node: found.get(origin_of(node), 0)


def _is_scratch(plan: Plan, name: str) -> bool:
    return name in plan.buffers and plan.buffers[name].kind == "scratch"


def _program(staged: Program, module: fx.GraphModule) -> Program:
    module.graph.lint()
    module.recompile()
    propagate(module, staged.example_inputs)
    return Program(staged.name, module, staged.example_inputs, staged.dynamic_batch, staged.annotations)


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
    known: dict[tuple[int, int], _Options],
    sram_bytes: int,
    needs: dict[str, int],
    methods: Sequence[str],
) -> tuple[int, str]:
    """(bytes, how) of the smallest arena that tiling reaches, by bisection; for the error message."""
    low, high = sram_bytes, min(needs.values())
    choices = None
    while high - low > max(high // 64, 1):
        middle = (low + high) // 2
        found = network.choose(middle, methods, known)
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
    """What to say of a plan whose arena exceeds `sram_bytes`. needed: the smallest arena there is."""
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
