"""From a Plan to the C files of a microcontroller bundle."""

from __future__ import annotations

from collections.abc import Sequence

from edgec.targets.mcu.kernels.base import Call, Value


def parameters(symbol: str, call: Call) -> tuple[str, str]:
    """(definition of the parameter struct, the argument that passes it); both empty when there is none."""
    if call.struct is None:
        return "", ""
    fields = ", ".join(f".{name} = {_literal(value)}" for name, value in call.fields.items())
    return f"static const {call.struct} {symbol} = {{{fields}}};\n", f"&{symbol}"


def _literal(value: Value) -> str:
    if isinstance(value, Sequence):
        return "{" + ", ".join(_literal(v) for v in value) + "}"
    if isinstance(value, float):
        return f"{value!r}f"
    return f"({value})" if value < 0 else str(value)
