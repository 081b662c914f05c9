"""Passes and targets by name: the built-in ones, plug-ins, clashes and names that do not exist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from edgec import registry
from edgec.errors import EdgecError
from edgec.passbase import Context, Pass
from edgec.program import Program
from edgec.targets.device import device_names, load_device

pytestmark = pytest.mark.pure

HERE = __name__


@dataclass(frozen=True)
class Nothing(Pass):
    """A pass of another package."""

    name: ClassVar[str] = "nothing"

    def run(self, program: Program, context: Context) -> Program:
        return program


class Owner:
    Nested = Nothing


def board() -> object:
    import dataclasses

    return dataclasses.replace(load_device("host"), name="board")


def broken() -> object:
    raise ValueError("no such board")


BOARD = board()


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, str]]]:
    """A list of (group, name, value) of entry points that count as installed."""
    points: list[tuple[str, str, str]] = []
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [EntryPoint(n, v, g) for g, n, v in points if g == group]
    )
    registry.pass_entries.cache_clear()
    yield points
    registry.pass_entries.cache_clear()


def error(call: object, *args: str) -> str:
    with pytest.raises(EdgecError) as caught:
        call(*args)  # type: ignore[operator]
    return str(caught.value)


def test_every_built_in_pass_loads_under_its_name_and_has_a_docstring() -> None:
    for entry in registry.BUILTIN:
        cls = registry.load_pass(entry.name)
        assert cls.name == entry.name
        assert (cls.__doc__ or "").strip()
        assert entry.summary and entry.source == "edgec"


def test_every_built_in_target_is_found() -> None:
    assert set(device_names()) <= set(registry.device_entries())
    assert registry.get_device("cortex-a72") == load_device("cortex-a72")


def test_a_wrong_name_is_answered_with_the_nearest_one() -> None:
    assert "unknown pass 'fold-bm'; did you mean 'fold-bn'?" in error(registry.load_pass, "fold-bm")
    assert "unknown target 'cortexa72'; did you mean 'cortex-a72'?" in error(registry.get_device, "cortexa72")


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    message = error(registry.load_pass, "xyz")
    assert all(entry.name in message for entry in registry.BUILTIN)
    assert all(name in error(registry.get_device, "xyz") for name in device_names())


def test_listing_imports_neither_torch_nor_tvm() -> None:
    code = (
        "import sys; from edgec.registry import pass_entries, device_entries; "
        "assert 'fold-bn' in pass_entries() and 'host' in device_entries(); "
        "print([m for m in ('torch', 'tvm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plug_ins_stand_beside_the_built_in_ones(plug_in: list[tuple[str, str, str]]) -> None:
    plug_in += [
        ("edgec.passes", "nothing", f"{HERE}:Owner.Nested"),
        ("edgec.targets", "board", f"{HERE}:board"),
    ]
    assert registry.load_pass("nothing") is Nothing
    assert registry.pass_entries()["nothing"].source != "edgec"
    assert registry.get_device("board").name == "board"
    assert "fold-bn" in registry.pass_entries() and "host" in registry.device_entries()


def test_a_target_may_be_a_device_itself(plug_in: list[tuple[str, str, str]]) -> None:
    plug_in.append(("edgec.targets", "board", f"{HERE}:BOARD"))
    assert registry.get_device("board") is BOARD


def test_two_owners_of_one_name_are_an_error(plug_in: list[tuple[str, str, str]]) -> None:
    plug_in += [("edgec.passes", "fold-bn", f"{HERE}:Nothing"), ("edgec.targets", "host", f"{HERE}:board")]
    assert "pass 'fold-bn' is defined by edgec and by" in error(registry.pass_entries)
    assert "target 'host' is defined by edgec and by" in error(registry.device_entries)


def test_two_plug_ins_with_one_name_are_an_error(plug_in: list[tuple[str, str, str]]) -> None:
    plug_in += [("edgec.passes", "nothing", f"{HERE}:Nothing"), ("edgec.passes", "nothing", "elsewhere:Nothing")]
    assert "pass 'nothing' is defined by elsewhere:Nothing and by" in error(registry.pass_entries)


BROKEN_PASSES = {
    "no such module": ("gone", "nowhere.at_all:Pass", "does not load: ModuleNotFoundError"),
    "no such attribute": ("gone", f"{HERE}:Gone", "does not load: AttributeError"),
    "not a pass": ("gone", f"{HERE}:BOARD", "is not a Pass named 'gone'"),
    "a pass of another name": ("gone", f"{HERE}:Nothing", "is not a Pass named 'gone'"),
}


@pytest.mark.parametrize("case", BROKEN_PASSES)
def test_a_broken_pass_is_named_and_the_others_work(case: str, plug_in: list[tuple[str, str, str]]) -> None:
    name, value, message = BROKEN_PASSES[case]
    plug_in.append(("edgec.passes", name, value))
    assert registry.load_pass("fold-bn").name == "fold-bn"
    assert message in error(registry.load_pass, name)


BROKEN_TARGETS = {
    "no such module": ("gone", "nowhere.at_all:board", "does not load: ModuleNotFoundError"),
    "failing function": ("gone", f"{HERE}:broken", "does not load: ValueError: no such board"),
    "not a device": ("gone", f"{HERE}:Nothing", "is not a Device named 'gone'"),
    "a device of another name": ("gone", f"{HERE}:board", "is not a Device named 'gone'"),
}


@pytest.mark.parametrize("case", BROKEN_TARGETS)
def test_a_broken_target_is_named_and_the_others_work(case: str, plug_in: list[tuple[str, str, str]]) -> None:
    name, value, message = BROKEN_TARGETS[case]
    plug_in.append(("edgec.targets", name, value))
    assert registry.get_device("host").name == "host"
    assert message in error(registry.get_device, name)
