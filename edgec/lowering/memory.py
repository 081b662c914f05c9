"""How much memory a graph needs at each step, and the order of its steps that needs least.

A model of what `edgec.plan` does with the calls that a graph becomes: it knows sizes, lifetimes and which results may
take over the memory of an operand, and thereby its lower bound, but not where buffers are put.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from edgec import regions as regions  # registers the operators looked up below
from edgec.lowering.graph import RESHAPES, is_identity
from edgec.plan import ALIGN, place
from edgec.program import is_call, origin_of, output_nodes, shape_of

aten = torch.ops.aten
edgec = torch.ops.edgec

# Between the origin of a node and the number of the part of it that a tile computes.
PART = ", part "
# States of the exact search, and of the beam where there would be more.
MOST_STATES = 20_000
BEAM = 64
# Above this many nodes between two cuts, downsets are too long to be worth counting.
MOST_NODES = 400


@dataclass(frozen=True)
class Item:
    """A value.

    nbytes: aligned size in the arena, 0 for what is not in it. reads: positions of the items it is computed from.
    inplace: those among `reads` whose memory it may take over, in order of preference. scratch: bytes while computed.
    given: exists before the first step.
    """

    nbytes: int
    reads: tuple[int, ...] = ()
    inplace: tuple[int, ...] = ()
    scratch: int = 0
    given: bool = False


@dataclass(frozen=True)
class Costs:
    """What a graph's nodes take in the arena.

    align: of every buffer. scratch: bytes that the kernel of a node takes while it runs, by the node's origin. callers:
    nodes whose values are in the caller's memory.
    """

    align: int = ALIGN
    scratch: Mapping[str, int] = field(default_factory=dict)
    callers: frozenset[fx.Node] = frozenset()

    def aligned(self, size: int) -> int:
        return -(-size // self.align) * self.align

    def value(self, node: fx.Node) -> int:
        """Bytes of a node's value in the arena."""
        outside = node.op == "placeholder" or node in self.callers or is_view(node)
        return 0 if outside else self.aligned(nbytes(node))

    def scratch_of(self, node: fx.Node) -> int:
        if is_call(node, edgec.crop_nhwc.default, edgec.place_nhwc.default):
            return 0
        return self.scratch.get(origin_of(node).partition(PART)[0], 0)


def profile(items: Sequence[Item], kept: Sequence[int] = ()) -> list[int]:
    """Bytes alive while each item is computed, in the order of `items`. kept: items that stay alive to the end.

    A value that nothing reads lives while it is computed.
    """
    last = {i: i for i in range(len(items))}
    for i, item in enumerate(items):
        for read in item.reads:
            last[read] = i
    for i in kept:
        last[i] = len(items)
    ends: dict[int, list[int]] = {}
    for i, step in last.items():
        ends.setdefault(step, []).append(i)
    alive = sum(item.nbytes for item in items if item.given)
    levels = []
    for i, item in enumerate(items):
        if not item.given:
            shared = victim(items, i, lambda read, i=i: last[read] == i)
            alive += item.nbytes
            levels.append(alive + item.scratch - (0 if shared is None else items[shared].nbytes))
        else:
            levels.append(0)
        alive -= sum(items[dead].nbytes for dead in ends.get(i, ()))
    return levels


def arena(items: Sequence[Item], align: int = ALIGN) -> int:
    """The size of the arena that the planner finds for these values in this order."""
    last = {i: i for i in range(len(items))}
    for i, item in enumerate(items):
        for read in item.reads:
            last[read] = i
    roots = list(range(len(items)))
    sizes: dict[int, tuple[int, int, int]] = {}
    for i, item in enumerate(items):
        shared = victim(items, i, lambda read, i=i: last[read] == i)
        if shared is not None and item.nbytes:
            roots[i] = roots[shared]
            sizes[roots[i]] = (item.nbytes, sizes[roots[i]][1], last[i])
        elif item.nbytes:
            sizes[i] = (item.nbytes, i, last[i])
    named = {f"t{i}": size for i, size in sizes.items()}
    named |= {f"s{i}": (item.scratch, i, i) for i, item in enumerate(items) if item.scratch}
    return place(named, align)[1]


def victim(items: Sequence[Item], i: int, dies: Callable[[int], bool]) -> int | None:
    """The operand whose memory item i takes over."""
    for read in items[i].inplace:
        if items[read].nbytes == items[i].nbytes and not items[read].given and dies(read):
            return read
    return None


def best_order(items: Sequence[Item], kept: Sequence[int] = ()) -> list[int]:
    """The order of `items` with the smallest peak; the given order where none is better.

    Between the values that everything before leads to and everything behind comes from (cuts), orders are independent.
    Each part is searched over its downsets: exactly where there are at most MOST_STATES, else with a beam, and then
    the result need not be the best.
    """
    order = list(range(len(items)))
    made = [i for i in order if not items[i].given]
    before = _ancestors(items)
    behind = [0] * len(items)
    for i in reversed(made):
        for read in items[i].reads:
            behind[read] |= behind[i] | 1 << i
    everything = sum(1 << i for i in made)
    mine = {i: before[i] & everything for i in made}
    cuts = [i for i in made if mine[i] | behind[i] | 1 << i == everything]
    result = [i for i in order if items[i].given]
    done = 0
    for cut in [*cuts, None]:
        part = everything & ~done if cut is None else (mine[cut] | 1 << cut) & ~done
        members = [i for i in made if part >> i & 1]
        done |= part
        if len(members) > 1:
            # Values may be read on both sides of a cut.
            later = {read for i in made if not done >> i & 1 for read in items[i].reads}
            members = _search(items, members, later.union(kept))
        result += members
    return result if max(_peaks(items, result, kept), default=0) < max(profile(items, kept), default=0) else order


def _peaks(items: Sequence[Item], order: Sequence[int], kept: Sequence[int]) -> list[int]:
    return profile(*reordered(items, order, kept))


def reordered(items: Sequence[Item], order: Sequence[int], kept: Sequence[int]) -> tuple[list[Item], list[int]]:
    """The same items in another order."""
    position = {old: new for new, old in enumerate(order)}
    moved = [
        Item(
            item.nbytes,
            tuple(position[r] for r in item.reads),
            tuple(position[r] for r in item.inplace),
            item.scratch,
            item.given,
        )
        for item in (items[i] for i in order)
    ]
    return moved, [position[i] for i in kept]


def _ancestors(items: Sequence[Item]) -> list[int]:
    found: list[int] = []
    for item in items:
        mask = 0
        for read in item.reads:
            mask |= found[read] | 1 << read
        found.append(mask)
    return found


def _search(items: Sequence[Item], members: Sequence[int], kept: set[int]) -> list[int]:
    """The order of `members` with the smallest peak, when all that they read from outside has been computed.

    kept: values that are alive behind the last of them.
    """
    if len(members) > MOST_NODES:
        return list(members)
    bit = {i: 1 << k for k, i in enumerate(members)}
    needs = {i: sum(bit[r] for r in set(items[i].reads) if r in bit) for i in members}
    readers: dict[int, int] = {}
    for i in members:
        for read in set(items[i].reads):
            readers[read] = readers.get(read, 0) | bit[i]
    outside = [r for r in readers if r not in bit and r not in kept and not items[r].given]
    own = set(members)
    dying = {i for i in (*members, *outside) if i in readers and i not in kept}
    unread = set(members) - kept - {read for item in items for read in item.reads}

    def dead(value: int, state: int) -> bool:
        return value in dying and readers[value] & ~state == 0

    start = sum(items[r].nbytes for r in outside)
    full = (1 << len(members)) - 1
    # state: (peak so far, bytes alive, order as a linked list)
    level: dict[int, tuple[int, int, Any]] = {0: (0, start, None)}
    seen, exact = 1, True
    for _ in members:
        following: dict[int, tuple[int, int, Any]] = {}
        for state, (peak, alive, path) in level.items():
            for i in members:
                if state & bit[i] or needs[i] & ~state:
                    continue
                after = state | bit[i]
                shared = victim(items, i, lambda read, after=after: dead(read, after))
                now = alive + items[i].nbytes + items[i].scratch - (0 if shared is None else items[shared].nbytes)
                top = max(peak, now)
                found = following.get(after)
                if found is not None and found[0] <= top:
                    continue
                gone = {r for r in items[i].reads if (r in own or r in outside) and dead(r, after)}
                own_bytes = 0 if i in unread else items[i].nbytes
                left = alive + own_bytes - sum(items[r].nbytes for r in gone)
                following[after] = (top, left, (path, i))
        seen += len(following)
        if exact and seen > MOST_STATES:
            exact = False
        if not exact and len(following) > BEAM:
            best = sorted(following.items(), key=lambda entry: entry[1][:2])
            following = dict(best[:BEAM])
        level = following
    order: list[int] = []
    path = level[full][2]
    while path is not None:
        path, i = path
        order.append(i)
    return order[::-1]


# -- graphs ------------------------------------------------------------------------------------------------------------


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's tensor, without alignment."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def inplace_operands(node: Any) -> tuple[fx.Node, ...]:
    """The operands whose memory the kernel of a region may overwrite with its result."""
    candidates: tuple[Any, ...] = ()
    if is_call(node, edgec.qconv2d_add.default):
        candidates = (node.args[5],)
    elif is_call(node, edgec.place_nhwc.default, edgec.qrescale.default, edgec.qlut.default):
        candidates = (node.args[0],)
    elif is_call(node, edgec.conv2d_nhwc.default, edgec.linear_act.default):
        candidates = (node.args[3],)
    elif is_call(node, edgec.qadd.default, edgec.qmul.default):
        candidates = tuple(a for a in node.args[:2] if shape_of(a) == shape_of(node))
    return tuple(a for a in candidates if isinstance(a, fx.Node) and a.op == "call_function")


def is_view(node: Any) -> bool:
    """Whether a node becomes another name of its operand's memory."""
    if is_call(node, aten.permute.default):
        shape = shape_of(node.args[0])
        kept = [axis % len(shape) for axis in node.args[1] if shape[axis] != 1]
        return kept == sorted(kept)
    return is_call(node, *RESHAPES) or is_identity(node)


def items_of(module: fx.GraphModule, costs: Costs | None = None) -> tuple[list[fx.Node], list[Item]]:
    """(nodes, their items) of a graph in its order, without weights and what only depends on weights.

    Inputs and outputs belong to the caller and views share memory: they have no bytes. What reads a view reads all that
    it shows.
    """
    costs = replace(costs or Costs(), callers=frozenset(root_of(n) for n in output_nodes(module)))
    stored: set[fx.Node] = set()
    for n in module.graph.nodes:
        if n.op == "get_attr" or (n.op == "call_function" and all(a in stored for a in n.all_input_nodes)):
            stored.add(n)
    nodes = [n for n in module.graph.nodes if n.op != "output" and n not in stored]
    position = {n: i for i, n in enumerate(nodes)}
    items = []
    for n in nodes:
        operands = [a for a in n.all_input_nodes if a in position]
        reads = tuple(dict.fromkeys(position[a] for a in (*map(root_of, operands), *operands)))
        size = costs.value(n)
        shares = tuple(position[root_of(a)] for a in inplace_operands(n) if a in position) if size else ()
        items.append(Item(size, reads, shares, costs.scratch_of(n), n.op == "placeholder"))
    return nodes, items


def root_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def reorder(module: fx.GraphModule, costs: Costs | None = None) -> tuple[int, int]:
    """Put the nodes of a graph into the order that needs least memory, in place; (peak before, peak after) in bytes."""
    nodes, items = items_of(module, costs)
    order = best_order(items)
    before, after = max(profile(items), default=0), max(_peaks(items, order, ()), default=0)
    if after < before:
        (output,) = [n for n in module.graph.nodes if n.op == "output"]
        for i in order:
            if nodes[i].op == "call_function":
                output.prepend(nodes[i])
        module.graph.lint()
        module.recompile()
    return before, after
