"""Channel pruning on architectures it has no code for, and what it gives in time.

    python -m benchmarks.prune_channels                   the architectures below, with random weights, from timm
    python -m benchmarks.prune_channels resnet50 ...      some of them, or any other network of timm
    python -m benchmarks.prune_channels --time            dense against pruned on this machine, interleaved
    python -m benchmarks.prune_channels --accuracy        ResNet-20 and -44 on CIFAR-10, with recovery

Columns: share of multiply-accumulates left, groups pruned and left whole, and the largest difference, relative to the
largest output, between the pruned network and the original with the removed channels masked where they are read (groups
that a LayerNorm or a GroupNorm over all channels reads are left whole for this comparison: there the two are different
functions), and between the network and itself with all groups reordered.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgec.cost import program_cost
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.pruning.groups import Channels, permute
from edgec.passes.pruning.prune_channels import ChannelReport, PruneChannels
from edgec.program import Program, get_weight, layer_of

PEERS = Path(__file__).resolve().parent.parent / ".venv-bench"
# One network per family, at the least input that keeps its shape; a family is what shares a block structure.
NETWORKS: dict[str, int] = {
    "resnet18": 96,
    "resnext26ts": 96,
    "seresnet33ts": 96,
    "mobilenetv2_100": 96,
    "mobilenetv3_small_100": 96,
    "efficientnet_lite0": 96,
    "mnasnet_small": 96,
    "densenet121": 96,
    "regnetx_002": 96,
    "regnety_002": 96,
    "ghostnet_100": 96,
    "dla34": 96,
    "vgg11_bn": 96,
    "inception_v3": 139,
    "convnext_atto": 96,
    "deit_tiny_patch16_224": 224,
    "mixer_s32_224": 224,
    "repvgg_a0": 96,
    "hrnet_w18_small": 96,
    "levit_128s": 224,
    "edgenext_xx_small": 128,
    "swin_tiny_patch4_window7_224": 224,
    "poolformer_s12": 96,
    "cspresnet50": 96,
    "res2net50_14w_8s": 96,
    "resmlp_12_224": 224,
    "fastvit_t8": 96,
    "pit_ti_224": 224,
    "darknet53": 96,
    "vovnet39a": 96,
    "efficientformer_l1": 224,
    "mobilevit_xxs": 128,
}
NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.group_norm.default, torch.ops.aten.rms_norm.default)


def network(name: str, size: int) -> Program:
    """A network of timm with random weights and batch norm statistics of trained-like spread."""
    sys.path.insert(0, str(PEERS))
    from benchmarks.timm_models import _import_timm, _randomise

    timm = _import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            _randomise(module, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            # Classifiers, scales and the last norms of branches that start at zero would hide every difference.
            if not bool(parameter.any()):
                parameter.normal_(0.0, 0.02, generator=generator)
    return load_model(model, input_shape=(1, 3, size, size), name=name)


def relative(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))


def masked_equals_removed(program: Program, x: torch.Tensor) -> float:
    """Half of the units of all groups removed, against zeros in the weights that read them."""
    channels = Channels(program)
    norms = {
        str(a.target) for n in program.graph.nodes if n.target in NORMS for a in n.all_input_nodes if a.op == "get_attr"
    }
    free = [g for g in channels.groups if not g.locked and not any(m.weight in norms for m in g.members)]
    keep = {g: np.arange(0, g.channels, 2) for g in free}
    masked, removed = program.edit(), program.edit()
    weights = {str(n.target): get_weight(masked, n) for n in masked.graph.nodes if n.op == "get_attr"}
    with torch.no_grad():
        for group in free:
            for member in group.members:
                if member.role == "in":
                    gone = torch.from_numpy(member.index[1::2].ravel())
                    weights[member.weight].index_fill_(member.axis, gone, 0.0)
    channels.remove(removed, keep)
    return relative(program.replace(removed)(x), program.replace(masked)(x))


def permuted_equals(program: Program, x: torch.Tensor) -> float:
    module, generator = program.edit(), np.random.default_rng(0)
    for group in Channels(module).groups:
        if not group.locked:
            permute(module, group, generator.permutation(group.channels))
    return relative(program.replace(module)(x), program(x))


def architectures(names: list[str]) -> None:
    print(f"{'network':30} {'MMACs':>7} {'left':>6} {'groups':>12} {'s':>5} {'masked':>8} {'permuted':>8}  not pruned")
    for name in names:
        try:
            program = network(name, NETWORKS.get(name, 224))
            context, start = Context(), time.perf_counter()
            pruned = PruneChannels(macs=0.5).run(program, context)
            seconds = time.perf_counter() - start
            report = pruned.annotations.get(PruneChannels.name)
            count = report.kept if isinstance(report, ChannelReport) else ()
            x = torch.rand(program.batch_inputs(1)[0].shape, generator=torch.Generator().manual_seed(0))
            assert all(bool(torch.isfinite(y).all()) for y in pruned(x))
            left = program_cost(pruned).macs / program_cost(program).macs
            skips = [s for s in context.skipped if s.what == "channel pruning"]
            reasons = "; ".join(dict.fromkeys(f"{s.layer}: {s.reason}" for s in skips))
            print(
                f"{name:30} {program_cost(program).macs / 1e6:7.0f} {left:6.3f} "
                f"{sum(k < n for _, k, n in count):4}/{len(count):3}+{len(skips):3} {seconds:5.1f} "
                f"{masked_equals_removed(program, x):8.1e} {permuted_equals(program, x):8.1e}  {reasons[:160]}",
                flush=True,
            )
        except (EdgecError, RuntimeError, AssertionError) as error:
            print(f"{name:30} {type(error).__name__}: {str(error)[:200]}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names of timm")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    architectures(options.networks or list(NETWORKS))


if __name__ == "__main__":
    main()
