"""What passes and targets there are, as plain data for `edgec passes`, `edgec targets` and the documentation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from edgec.registry import device_entries, get_device, load_pass, pass_entries


def list_passes() -> list[dict[str, Any]]:
    """{"name", "summary", "source"} of every pass; imports none of them."""
    return [{"name": e.name, "summary": e.summary, "source": e.source} for e in pass_entries().values()]


def describe_pass(name: str) -> dict[str, Any]:
    """{"name", "source", "needs", "doc", "options": [{"name", "type", "default", "range", "unit", "help"}]}.

    Raises EdgecError for an unknown name.
    """
    from edgec.pipeline import option_rows

    cls = load_pass(name)
    return {
        "name": name,
        "source": pass_entries()[name].source,
        "needs": [need.name.lower() for need in type(cls.needs) if need.name and need in cls.needs],
        "doc": inspect.cleandoc(cls.__doc__ or ""),
        "options": [
            {
                "name": row.name,
                "type": row.type,
                "default": list(row.default) if isinstance(row.default, tuple) else row.default,
                "range": row.range,
                "unit": row.unit,
                "help": row.help,
            }
            for row in option_rows(cls)
        ],
    }


def list_targets() -> list[dict[str, Any]]:
    """{"name", "summary", "runner", "source", "ready"}; `ready` is "yes" or what has to be installed."""
    from edgec.targets.cpu.toolchain import has_toolchain
    from edgec.targets.gpu.runner import has_device

    rows = []
    # Looking for devices takes a while.
    found = functools.cache(has_device)
    for name, source in device_entries().items():
        device = get_device(name)
        missing = found(device.api) if device.is_gpu else has_toolchain(device)
        ready = "yes" if missing is None else missing.partition("; ")[2] or missing
        rows.append(
            {"name": name, "summary": device.summary, "runner": device.runner, "source": source, "ready": ready}
        )
    return rows


def describe_target(name: str) -> dict[str, Any]:
    """Every field of the device. Raises EdgecError for an unknown name."""
    record = dataclasses.asdict(get_device(name))
    del record["tuning"]
    return {"source": device_entries()[name], **record}
