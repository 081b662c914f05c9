"""Passes and targets by name. Listing imports neither torch nor TVM; a pass is loaded when it is asked for.

Third parties add passes with the entry point group `edgec.passes` (name -> a `Pass` subclass) and targets with
`edgec.targets` (name -> a `Device`, or a function that returns one).
"""

from __future__ import annotations

import difflib
import functools
import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.passbase import Pass
    from edgec.targets.device import Device


@dataclass(frozen=True)
class PassEntry:
    """Where a pass lives: `target` is "module:Class"; `source` is "edgec" or the distribution that adds it."""

    name: str
    summary: str
    target: str
    source: str = "edgec"


BUILTIN = (
    PassEntry(
        "fold-constants",
        "compute what depends on weights only",
        "edgec.passes.reparam.fold_constants:FoldConstants",
    ),
    PassEntry(
        "collapse",
        "merge parallel branches and consecutive linear layers",
        "edgec.passes.reparam.collapse:Collapse",
    ),
    PassEntry(
        "fold-bn",
        "fold batch norms into the layer before them",
        "edgec.passes.graph.fold_bn:FoldBN",
    ),
    PassEntry(
        "class-rows",
        "compute only the rows that the read-out selects",
        "edgec.passes.tokens.class_rows:ClassRows",
    ),
    PassEntry(
        "tome",
        "merge similar tokens of a vision transformer",
        "edgec.passes.tokens.tome:ToMe",
    ),
    PassEntry(
        "diffrate",
        "drop and merge tokens by learned counts",
        "edgec.passes.tokens.diffrate:DiffRate",
    ),
    PassEntry(
        "drop-tokens",
        "drop tokens by a score",
        "edgec.passes.tokens.drop_tokens:DropTokens",
    ),
    PassEntry(
        "prune-channels",
        "remove channels, heads and groups and shrink all shapes",
        "edgec.passes.pruning.prune_channels:PruneChannels",
    ),
    PassEntry(
        "prune-1xn",
        "remove blocks of N output channels at an input channel",
        "edgec.passes.pruning.prune_1xn:Prune1xN",
    ),
    PassEntry(
        "prune",
        "remove weights, rows, kernels or filters (baselines)",
        "edgec.passes.pruning.prune:Prune",
    ),
    PassEntry(
        "search-mask",
        "find a better mask over frozen weights",
        "edgec.passes.recovery.search_mask:SearchMask",
    ),
    PassEntry(
        "recalibrate-bn",
        "batch norm statistics of the changed model",
        "edgec.passes.recovery.recalibrate_bn:RecalibrateBN",
    ),
    PassEntry(
        "ebft",
        "train block by block without labels",
        "edgec.passes.recovery.ebft:Ebft",
    ),
    PassEntry(
        "finetune",
        "train with distillation from the original model",
        "edgec.passes.recovery.finetune:Finetune",
    ),
    PassEntry(
        "equalize",
        "balance weight ranges between consecutive layers",
        "edgec.passes.quantization.equalize:Equalize",
    ),
    PassEntry(
        "quantize-int8",
        "post-training int8 quantisation",
        "edgec.passes.quantization.quantize_int8:QuantizeInt8",
    ),
    PassEntry(
        "adopt-qdq",
        "integers with the scales that a quantised model comes with",
        "edgec.passes.quantization.adopt_qdq:AdoptQdq",
    ),
    PassEntry(
        "reconstruct",
        "few-bit quantisation with learned rounding, block by block",
        "edgec.passes.quantization.reconstruct:Reconstruct",
    ),
    PassEntry(
        "qat",
        "quantisation-aware training with learned steps",
        "edgec.passes.quantization.qat:Qat",
    ),
    PassEntry(
        "quantize-mixed",
        "bits per layer by sensitivity under a budget",
        "edgec.passes.quantization.quantize_mixed:QuantizeMixed",
    ),
    PassEntry(
        "quantize-weights",
        "weights as codes of 2 to 8 bits with a scale per group, activations in float",
        "edgec.passes.quantization.quantize_weights:QuantizeWeights",
    ),
    PassEntry(
        "cast-fp16",
        "float16 weights and activations",
        "edgec.passes.precision.fp16:CastFP16",
    ),
)


@functools.cache
def pass_entries() -> dict[str, PassEntry]:
    """All passes by name. Raises EdgecError when two packages claim one name."""
    found = {entry.name: entry for entry in BUILTIN}
    for point in _points("edgec.passes"):
        source = _source(point)
        if point.name in found:
            raise _clash("pass", point.name, found[point.name].source, source)
        found[point.name] = PassEntry(point.name, f"from {source}", point.value, source)
    return found


def load_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises EdgecError for an unknown name and for a plug-in that does not load."""
    entries = pass_entries()
    if name not in entries:
        raise _unknown("pass", name, list(entries), None)
    module, _, path = entries[name].target.partition(":")
    try:
        loaded: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:
        if entries[name].source == "edgec":
            raise
        where = f"pass '{name}' of {entries[name].source}"
        raise EdgecError(f"does not load: {type(error).__name__}: {error}", where=where) from error
    from edgec.passbase import Pass

    if not (isinstance(loaded, type) and issubclass(loaded, Pass)) or loaded.name != name:
        raise EdgecError(
            f"{entries[name].target} is not a Pass named '{name}'",
            where=entries[name].source,
            hint="an entry point of edgec.passes gives a subclass of edgec.passbase.Pass with that `name`",
        )
    return loaded


def device_entries() -> dict[str, str]:
    """Source of every target by name: "edgec" or the distribution that adds it."""
    from edgec.targets.device import device_names

    found = dict.fromkeys(device_names(), "edgec")
    for point in _points("edgec.targets"):
        source = _source(point)
        if point.name in found:
            raise _clash("target", point.name, found[point.name], source)
        found[point.name] = source
    return found


def get_device(name: str) -> Device:
    """The device of that name. Raises EdgecError for an unknown name and for a plug-in that does not load."""
    from edgec.targets.device import Device, load_device

    entries = device_entries()
    if name not in entries:
        raise _unknown("target", name, list(entries), "--target")
    if entries[name] == "edgec":
        return load_device(name)
    (point,) = [p for p in _points("edgec.targets") if p.name == name]
    where = f"target '{name}' of {entries[name]}"
    try:
        loaded: Any = point.load()
        device = loaded if isinstance(loaded, Device) else loaded()
    except Exception as error:
        raise EdgecError(f"does not load: {type(error).__name__}: {error}", where=where) from error
    if not isinstance(device, Device) or device.name != name:
        raise EdgecError(
            f"{point.value} is not a Device named '{name}'",
            where=where,
            hint="an entry point of edgec.targets gives an edgec.targets.device.Device with that `name`, "
            "or a function that returns one",
        )
    return device


def _points(group: str) -> list[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda p: (p.name, p.value))


def _source(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _clash(kind: str, name: str, first: str, second: str) -> EdgecError:
    return EdgecError(
        f"{kind} '{name}' is defined by {first} and by {second}", where="entry points", hint="uninstall one of them"
    )


def _unknown(kind: str, name: str, known: list[str], where: str | None) -> EdgecError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(known)}"
    return EdgecError(f"unknown {kind} '{name}'", where=where, hint=hint)
