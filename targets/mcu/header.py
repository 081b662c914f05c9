"""The kernel header of a bundle: the parts of `targets/mcu/c` that a model needs, in one file.

A part is a C99 header of its own. Its first line names the parts it builds on: `/* needs: base dot */`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from importlib import resources

NAME = "edgec_nn.h"
NEEDS = re.compile(r"/\* needs:([\w ]*)\*/\n")


def header(parts: Iterable[str]) -> str:
    """The text of `edgec_nn.h` with `parts` and what they need, each once, in an order that compiles."""
    placed: dict[str, str] = {}

    def place(name: str) -> None:
        if name in placed:
            return
        text = _part(name)
        match = NEEDS.match(text)
        for other in match.group(1).split() if match else ():
            place(other)
        placed[name] = text[match.end() :] if match else text

    for name in ("base", *sorted(set(parts))):
        place(name)
    return "\n".join(placed.values())


@functools.cache
def _part(name: str) -> str:
    return resources.files("edgec.targets.mcu").joinpath("c", f"{name}.h").read_text()
