"""Blocks of a graph, the dense model in the order of a pruned one, and graphs run in chunks."""

from __future__ import annotations

import itertools

import pytest
import torch

from edgec.errors import EdgecError
from edgec.passes.recovery.blocks import find_blocks
from edgec.passes.recovery.chunks import Chunks, chunked
from edgec.passes.recovery.dense import dense_program
from edgec.program import output_nodes
from tests import zoo
from tests.passes.recovery.cases import context, network, run, samples

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("model", zoo.names())
def test_blocks_in_order_compute_what_the_graph_computes(model: str) -> None:
    program = zoo.program(model)
    blocks = find_blocks(program.module, least=1)
    calls = [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert [name for b in blocks for name in b.nodes] == calls
    x = zoo.example(model)
    (source,) = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    values = {source: x}
    for block in blocks:
        needed = {name: values[name] for name in block.inputs}
        block.run(program.module, needed)
        values.update({name: needed[name] for name in block.outputs})
    for node, want in zip(output_nodes(program.module), program(x), strict=True):
        assert torch.equal(values[node.name], want)


def test_residual_blocks_are_blocks() -> None:
    blocks = find_blocks(network().module)
    assert [b.layers for b in blocks] == [("stem", "convs.0", "convs.1"), ("convs.2", "convs.3"), ("fc",)]
    for before, after in itertools.pairwise(blocks):
        assert len(after.inputs) == 1 and after.inputs == before.outputs
    assert "norms.1.weight" in blocks[0].weights and "convs.2.weight" not in blocks[0].weights


@pytest.mark.parametrize("passes", ["", "recalibrate-bn, ", "fold-bn, "])
@pytest.mark.parametrize("mask", ["prune{sparsity=0.5}", "prune-1xn{n=4 sparsity=0.5}"])
def test_the_dense_model_in_the_order_of_the_pruned_one(passes: str, mask: str) -> None:
    dense = network()
    given = context(dense)
    pruned = run(f"{mask}, {passes}".strip(", "), dense, given)
    found = dense_program(pruned, dense)
    x = samples(dense).inputs()
    torch.testing.assert_close(found(x)[0], dense(x)[0], rtol=1e-4, atol=1e-5)
    for path, weight in pruned.weights().items():
        kept = weight != 0
        if "weight" in path and "norm" not in path and "bn" not in path:
            assert torch.equal(found.weights()[path][kept], weight[kept])


def test_changed_weights_and_other_models_are_refused() -> None:
    dense = network()
    given = context(dense)
    tuned = run("prune{sparsity=0.5}, finetune{steps=3 batch=16}", dense, given)
    with pytest.raises(EdgecError, match="changed since it was pruned"):
        dense_program(tuned, dense)
    with pytest.raises(EdgecError, match="not those of the original"):
        dense_program(run("prune{sparsity=0.5}", dense, given), zoo.program("mlp"))


def test_chunks_fill_batches() -> None:
    free, fixed = network(), network(fixed=True)
    assert [[len(c[0]) for c in b] for b in chunked(free, samples(free, 100), 100, 32, 0)] == [[32]] * 3
    assert [[len(c[0]) for c in b] for b in chunked(free, samples(free, 20), 100, 32, 0)] == [[20]]
    assert [[len(c[0]) for c in b] for b in chunked(fixed, samples(fixed, 10), 100, 4, 0)] == [[1] * 4] * 2
    x = samples(free, 20).inputs()
    run_in = Chunks(free.module, [(x[:10],), (x[10:],)])
    (last,) = output_nodes(free.module)
    for node in free.graph.nodes:
        run_in.step(node)
        if node is last:
            torch.testing.assert_close(torch.cat(run_in.values[last]), free(x)[0])
        read_later = {a for n in free.graph.nodes for a in n.all_input_nodes if n > node}
        assert set(run_in.values) <= read_later | {last}
