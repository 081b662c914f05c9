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
import fcntl
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgec.cost import program_cost
from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.pruning.groups import Channels, permute
from edgec.passes.pruning.prune_channels import ChannelReport, PruneChannels
from edgec.pipeline import Pipeline
from edgec.program import Program, get_weight
from edgec.registry import load_pass

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
    from benchmarks.timm_models import import_timm, randomise

    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            # Classifiers, scales and the last norms of branches that start at or near zero would hide every difference.
            if float(parameter.abs().max()) < 1e-3:
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


TIMED = ("imagenet_mobilenetv1_075_224", "cifar10_resnet20", "cifar10_resnet44", "resnet18")


def time_networks(names: list[str], step: PruneChannels, folder: Path) -> None:
    """Dense and pruned in turns on one core of this machine, fp32, batch norms folded."""
    from benchmarks.cpu import NativeBundle, load_subject, transformed
    from benchmarks.timing import measure
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower
    from edgec.pipeline import spell_pass
    from edgec.targets.device import load_device

    device = load_device("host")
    print(spell_pass(step))
    print(f"{'network':30} {'left':>6} {'dense ms':>9} {'pruned ms':>9} {'faster':>7} {'spread':>7}  kept")
    for name in names:
        subject = load_subject(name)
        pruned = transformed(subject, spell_pass(step))
        calls = {}
        for kind, program in (("dense", subject.program), ("pruned", pruned)):
            folded = load_pass("fold-bn")().run(program, Context(device=device))
            bundle = build_bundle(
                lower(folded, device), device, folder / f"{name}_{kind}_{len(list(folder.iterdir()))}"
            )
            shape = program.inputs[0].shape
            calls[kind] = NativeBundle(bundle.path).bind(np.random.default_rng(0).random(shape, np.float32))
        with open("/tmp/core1.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            timings = measure(calls, rounds=21)
        report = pruned.annotations[PruneChannels.name]
        assert isinstance(report, ChannelReport)
        dense, small = timings["dense"], timings["pruned"]
        print(
            f"{name:30} {report.macs_after / report.macs_before:6.3f} {dense.cpu / 1e3:9.3f} {small.cpu / 1e3:9.3f} "
            f"{dense.cpu / small.cpu:7.2f} {max(dense.spread, small.spread):7.1%}  "
            f"{' '.join(f'{k}/{n}' for _, k, n in report.kept)}",
            flush=True,
        )


def accuracy(names: list[str], steps: int, step: PruneChannels, seed: int) -> None:
    """CIFAR-10 top-1: dense, pruned, with batch norm statistics of the training images, fine-tuned."""
    from benchmarks.cpu import load_subject
    from benchmarks.models import CASES, shared_folder
    from edgec.data import Preprocess, load_data
    from edgec.passes.recovery.finetune import Finetune
    from edgec.passes.recovery.recalibrate_bn import RecalibrateBN

    print(f"{'network':20} {'left':>6} {'dense':>7} {'pruned':>7} {'statistics':>10} {'fine-tuned':>10}")
    for name in names:
        (case,) = [c for c in CASES if c.model == name]
        program, shared = load_subject(name).program, shared_folder()
        preprocess = Preprocess(case.mean, case.std, case.input_scale)
        train = load_data(f"{shared / 'data/datasets/cifar10_train5k.npz'}", program.inputs, preprocess)
        test = load_data(f"{shared / 'data/datasets/cifar10_test.npz'}", program.inputs, preprocess)

        def top1(candidate: Program, test: Dataset = test) -> float:
            hits = []
            for inputs, labels in test.batches(251):
                assert labels is not None
                hits.append(int((candidate(*inputs)[0].argmax(1).numpy() == labels).sum()))
            return 100 * sum(hits) / len(test)

        context = Context(calibration=train.limit(256), training=train, teacher=program, seed=seed)
        pruned = step.run(program, context)
        recalibrated = RecalibrateBN().run(pruned, context)
        tuned = Finetune(steps=steps).run(recalibrated, context) if steps else recalibrated
        left = program_cost(pruned).macs / program_cost(program).macs
        print(
            f"{name:20} {left:6.3f} {top1(program):7.2f} {top1(pruned):7.2f} {top1(recalibrated):10.2f} "
            f"{top1(tuned):10.2f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names of timm")
    parser.add_argument("--time", action="store_true", help="compile dense and pruned and time them in turns")
    parser.add_argument("--accuracy", action="store_true", help="of the CIFAR-10 networks, with recovery")
    parser.add_argument("--pass", dest="spelling", default="prune-channels", help="as in a pipeline")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    (step,) = Pipeline.parse(options.spelling).passes
    assert isinstance(step, PruneChannels)
    if options.time:
        with tempfile.TemporaryDirectory() as folder:
            time_networks(options.networks or list(TIMED), step, Path(folder))
    elif options.accuracy:
        accuracy(options.networks or ["cifar10_resnet20", "cifar10_resnet44"], options.steps, step, options.seed)
    else:
        architectures(options.networks or list(NETWORKS))


if __name__ == "__main__":
    main()
