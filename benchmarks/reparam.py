"""Branched networks before and after `collapse`, in generated code.

    taskset -c 1 python -m benchmarks.reparam [NAME ...] [--device cortex-a72]

NAME is a hand-written network of tests/passes/reparam/networks.py (sesr, dilated, difference, spaced) or any network of
timm (repvgg_a0, mobileone_s0, ghostnetv3_100, ...), with random weights and batch norm statistics that are not neutral.
Both forms get `fold-bn`, so what is compared is the structure alone. The error is that of the Program against the
branched one, relative to the largest output, on noise.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks import timing
from benchmarks.sidebyside import compare

TIMM = ("repvgg_a0", "mobileone_s0", "ghostnetv3_100", "fastvit_t8")


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network and its input shape. Raises EdgecError for a name that timm does not know."""
    from tests.passes.reparam import networks as nets

    small = {
        "sesr": (lambda: nets.SESR(5, 256), (1, 1, 128, 128)),
        "dilated": (lambda: nets.DilatedBranches(64), (1, 64, 28, 28)),
        "difference": (lambda: nets.DifferenceConv(32), (1, 32, 56, 56)),
        "spaced": (lambda: nets.SpacedConv(64, 17, 34), (1, 64, 28, 28)),
    }
    if name in small:
        make, shape = small[name]
        return nets.trained_like(make()), shape
    from benchmarks.timm_models import create

    return create(name), (1, 3, 224, 224)


def row(name: str, device: str) -> list[str]:
    """One line of the table."""
    from edgec.frontend import load_model
    from edgec.passbase import Context
    from edgec.passes.graph.fold_bn import FoldBN
    from edgec.passes.reparam.collapse import Collapse

    module, shape = network(name)
    branched = load_model(module, input_shape=shape, name=name.replace(".", "_"))
    merged = Collapse().run(branched, Context())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want, got = branched(x)[0], merged(x)[0]
    error = float((want - got).abs().max() / want.abs().max())
    sides = compare(
        {"branched": FoldBN().run(branched, Context()), "merged": FoldBN().run(merged, Context())}, (device,)
    )
    a, b = sides["branched"], sides["merged"]
    before, after = a.instructions[device], b.instructions[device]
    return [
        name,
        f"{error:.1e}",
        f"{a.kernels} -> {b.kernels}",
        f"{a.weight_bytes / 1e3:,.0f} -> {b.weight_bytes / 1e3:,.0f}",
        f"{a.host_us:,.0f} -> {b.host_us:,.0f}",
        f"{a.host_us / b.host_us:.2f}",
        f"{before / 1e6:,.1f} -> {after / 1e6:,.1f}",
        f"{before / after:.2f}",
    ]


HEADER = ("network", "error", "kernels", "weights, kB", "host, us", "ratio", "{device}, M instructions", "ratio")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="default: all hand-written and four of timm")] = None,
    device: Annotated[str, typer.Option(help="Arm core for the instruction counts")] = "cortex-a72",
) -> None:
    """Print the table."""
    chosen = names or ["sesr", "dilated", "difference", "spaced", *TIMM]
    rows = [row(name, device) for name in chosen]
    print(timing.markdown([h.format(device=device) for h in HEADER], rows))


if __name__ == "__main__":
    import sys
    import warnings

    from benchmarks.peers import PEERS
    from edgec.errors import EdgecError

    warnings.simplefilter("ignore")
    sys.path.append(str(PEERS))
    try:
        typer.run(main)
    except EdgecError as error:
        sys.exit(f"error: {error}")
