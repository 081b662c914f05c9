"""Where something stands in the user's model, for messages: module path, source line, the line of an error."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import torch
from torch import fx

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Frames of these folders are never what the user wrote; other installed packages may be the user's model.
OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
STANDARD = sysconfig.get_paths()["stdlib"]
# What torch calls the place of nodes that come from no module.
NOWHERE = "_empty_nn_module_stack_from_metadata_hook"


def module_path(node: fx.Node) -> str:
    """Path of the innermost nn.Module that made the node, `blocks.3.attn`; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path == NOWHERE else path


def layer_name(node: fx.Node) -> str:
    """The layer that import wrote into the node, which may be a part of a module, else `module_path`."""
    return node.meta.get("custom", {}).get("edgec_layer") or module_path(node)


def source_line(node: fx.Node) -> str:
    """`model.py:12`, the innermost line of the user's code that made the node; empty when it is not known."""
    return node.meta.get("custom", {}).get("edgec_source") or user_frame(node.meta.get("stack_trace") or "")


def user_frame(trace: str) -> str:
    """`file:line` of the last frame of a traceback text that is not in torch or edgec."""
    found = [":".join(frame) for frame in FRAME.findall(trace) if _is_user_file(frame[0])]
    return found[-1] if found else ""


def _is_user_file(file: str) -> bool:
    standard = file.startswith(STANDARD) and "site-packages" not in file
    return not (file.startswith(OURS) or standard or "<" in file)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which is where torch says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def place(node: fx.Node) -> str:
    """`layer blocks.3.attn, model.py:12`: both of the above, as far as known, else the node's name."""
    path, line = layer_name(node), source_line(node)
    known = [f"layer {path}"] * bool(path) + [line] * bool(line)
    return ", ".join(known) or node.name
