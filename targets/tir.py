"""TVM's TIR modules, untyped: their annotations reject the plain integers and tuples that the functions accept."""

from __future__ import annotations

from typing import Any

from tvm import s_tir as _s_tir
from tvm import tirx as _tirx
from tvm.tirx.script.builder import ir as _builder

tirx: Any = _tirx
s_tir: Any = _s_tir
T: Any = _builder
