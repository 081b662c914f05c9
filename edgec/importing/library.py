"""Operators of other libraries, known by name: their libraries need not be there when a file is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from edgec.errors import EdgecError
from edgec.importing.vision import deform_conv2d, roi_align


def _deform_conv(
    run: Any, x: Any, weight: Any, offset: Any, mask: Any, bias: Any, *numbers: Any, use_mask: bool | None = None
) -> Any:
    stride, pads, dilation = numbers[0:2], numbers[2:4], numbers[4:6]
    groups, offset_groups, *last = numbers[6:]
    masked = bool(last[0]) if last else bool(use_mask)
    kept = mask if masked else None
    return deform_conv2d(x, weight, offset, kept, bias, stride, pads, dilation, groups, offset_groups)


def _roi_align(
    run: Any, x: Any, boxes: Any, scale: float, height: int, width: int, samples: int, aligned: bool = False
) -> Any:
    if samples < 1:
        raise run.error("roi_align takes as many samples as a box is large", "give it a sampling_ratio, 2 for example")
    image = boxes.select(1, 0).to(torch.int64)
    return roi_align(x, boxes.narrow(1, 1, 4), image, scale, (height, width), samples, aligned)


def _nms(run: Any, *args: Any) -> Any:
    raise run.error(
        "the number of boxes that nms leaves depends on their values",
        "end the model before it, and suppress boxes in the application",
    )


def _grouped_mm(run: Any, x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of x [s, i] times the matrix of their group, weight [g, i, o]; offs [g]: the first row behind each group.

    Every group multiplies all rows, since which rows are its own is known on the device only.
    """
    if x.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None:
        raise run.error("grouped_mm of other than rows by one matrix a group", "multiply with torch.bmm")
    place = torch.arange(x.shape[0])
    total, start = None, None
    for group in range(weight.shape[0]):
        end = offs.select(0, group)
        own = place < end if start is None else (place < end) & (place >= start)
        part = torch.where(own.unsqueeze(1), x, torch.zeros(())) @ weight.select(0, group)
        total, start = part if total is None else total + part, end
    return total


RULES: Mapping[str, Callable[..., Any]] = {
    "torchvision::deform_conv2d": _deform_conv,
    "torchvision::roi_align": _roi_align,
    "torchvision::nms": _nms,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "aten::_grouped_mm": _grouped_mm,
}


# What the libraries register, for files that are read where they are not installed.
SCHEMAS = {
    "torchvision::deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
    "torchvision::roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "transformers::grouped_mm_fallback": "(Tensor input, Tensor weight, Tensor offs) -> Tensor",
}
_registered: list[torch.library.Library] = []


class _Outside:
    """Stands for the run of a rule where there is no graph."""

    def error(self, what: str, hint: str) -> EdgecError:
        return EdgecError(what, where="model", hint=hint)


def _some_boxes(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def define(name: str) -> bool:
    """Register an operator of another library, such as torchvision::roi_align, unless the library has; False where it
    is none that is known here."""
    if name not in SCHEMAS:
        return False
    namespace, _, short = name.partition("::")
    if not hasattr(getattr(torch.ops, namespace), short):
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(f"{short}{SCHEMAS[name]}")
        kernel = functools.partial(RULES[name], _Outside())
        library.impl(short, kernel, "CPU")
        shapes = _some_boxes if name.endswith("nms") else lambda *operands: kernel(*operands)
        torch.library.register_fake(name, shapes, lib=library)
        _registered.append(library)
    return True


def rule_of(target: Any) -> Callable[..., Any] | None:
    """The rule for an operator; None where there is none."""
    return RULES.get(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None
