"""Pipelines: string, recipe and Python are one thing; every mistake is named with its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec import registry
from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.pipeline import Pipeline, option_rows, spell_pass
from edgec.program import Program

pytestmark = pytest.mark.pure


@dataclass(frozen=True)
class Everything(Pass):
    """An option of every type."""

    name: ClassVar[str] = "everything"
    flag: bool = option(False, "a switch")
    count: int = option(3, "how often", unit="steps", low=1, high=8)
    rate: float = option(0.5, "how strong", low=0)
    mode: str = option("a", "which way", choices=("a", "b"))
    word: str = option("", "any text")
    layers: tuple[str, ...] = option((), "names")
    sizes: tuple[int, ...] = option((1, 2), "numbers")
    limit: int | None = option(None, "no limit without it")

    def run(self, program: Program, context: Context) -> Program:
        return program


@dataclass(frozen=True)
class Wanting(Pass):
    """An option that has no default."""

    name: ClassVar[str] = "wanting"
    amount: int = dataclasses.field(metadata={"help": "how much"})

    def run(self, program: Program, context: Context) -> Program:
        return program


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    extra = [registry.PassEntry(c.name, "", f"{__name__}:{c.__name__}", "tests") for c in (Everything, Wanting)]
    monkeypatch.setattr(registry, "BUILTIN", (*registry.BUILTIN, *extra))
    registry.pass_entries.cache_clear()
    yield
    registry.pass_entries.cache_clear()


def error(call: Any, *args: Any) -> str:
    with pytest.raises(EdgecError) as caught:
        call(*args)
    return str(caught.value)


PARSED: dict[str, list[Pass]] = {
    "": [],
    "   ": [],
    "fold-bn": [FoldBN()],
    "fold-bn{}": [FoldBN()],
    " fold-bn ,quantize-int8 ": [FoldBN(), QuantizeInt8()],
    "quantize-int8{observer=mse equalize=true keep_float=[conv1,fc]}": [
        QuantizeInt8(observer="mse", equalize=True, keep_float=("conv1", "fc"))
    ],
    "quantize-int8{observer=mse,equalize=true , keep_float=[ conv1 fc ]}": [
        QuantizeInt8(observer="mse", equalize=True, keep_float=("conv1", "fc"))
    ],
    "quantize-int8{keep_float=blocks.3.*}": [QuantizeInt8(keep_float=("blocks.3.*",))],
    "quantize-int8{keep_float=[]}": [QuantizeInt8()],
    "everything{flag=true count=7 rate=1e-3 mode=b}": [Everything(flag=True, count=7, rate=0.001, mode="b")],
    "everything{count=3.0 sizes=[4,-5] limit=9}": [Everything(sizes=(4, -5), limit=9)],
    "everything{limit=none}": [Everything()],
    'everything{word="two words, [and] {marks} = \\"quotes\\""}': [
        Everything(word='two words, [and] {marks} = "quotes"')
    ],
    'everything{layers=["a b",c]}': [Everything(layers=("a b", "c"))],
    "everything{word=17}": [Everything(word="17")],
    "wanting{amount=2}, wanting{amount=3}": [Wanting(2), Wanting(3)],
}


@pytest.mark.parametrize("text", PARSED)
def test_parse(text: str) -> None:
    assert Pipeline.parse(text) == Pipeline(tuple(PARSED[text]))


def test_the_canonical_spelling_leaves_defaults_out() -> None:
    assert Pipeline([FoldBN(), QuantizeInt8()]).spelling() == "fold-bn, quantize-int8"
    assert spell_pass(Everything(mode="b", layers=("conv1", "fc"))) == "everything{mode=b layers=[conv1,fc]}"
    assert spell_pass(Everything(rate=1e-9, limit=4, word="a b")) == 'everything{rate=1e-09 word="a b" limit=4}'


words = st.text(st.characters(codec="utf-8"), max_size=12)
passes = st.one_of(
    st.just(FoldBN()),
    st.builds(Wanting, st.integers()),
    st.builds(
        Everything,
        flag=st.booleans(),
        count=st.integers(1, 8),
        rate=st.floats(0, allow_infinity=False),
        mode=st.sampled_from("ab"),
        word=words,
        layers=st.lists(words, max_size=3).map(tuple),
        sizes=st.lists(st.integers(), max_size=3).map(tuple),
        limit=st.none() | st.integers(),
    ),
)


@given(st.lists(passes, max_size=4).map(tuple))
def test_string_and_recipe_round_trip(tmp_path_factory: pytest.TempPathFactory, steps: tuple[Pass, ...]) -> None:
    pipeline = Pipeline(steps)
    assert Pipeline.parse(pipeline.spelling()) == pipeline
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_text(pipeline.to_toml(), encoding="utf-8")
    assert Pipeline.from_toml(path) == pipeline


@given(st.text(alphabet='abz-{}[]=,"\\ 1\n', max_size=30))
def test_any_text_is_a_pipeline_or_one_line_of_error(text: str) -> None:
    try:
        assert Pipeline.parse(Pipeline.parse(text).spelling()) == Pipeline.parse(text)
    except EdgecError as failure:
        assert str(failure).startswith("pipeline") and "\n" not in str(failure)


def test_of_takes_every_spelling(tmp_path: Path) -> None:
    want = Pipeline((FoldBN(), QuantizeInt8(observer="kl")))
    path = tmp_path / "recipe.toml"
    path.write_text(want.to_toml())
    spellings = ("fold-bn, quantize-int8{observer=kl}", path, str(path), [FoldBN(), QuantizeInt8(observer="kl")], want)
    assert [Pipeline.of(s) for s in spellings] == [want] * 5
    assert Pipeline.of(FoldBN()) == Pipeline((FoldBN(),))
    assert (len(want), [p.name for p in want]) == (2, ["fold-bn", "quantize-int8"])


def test_what_is_not_a_pass_is_refused() -> None:
    assert "a str is not a pass" in error(Pipeline, ["fold-bn"])
    assert "the class FoldBN is not a pass" in error(Pipeline, [FoldBN])


MISTAKES = {
    "fold-bm": "pipeline, column 1: unknown pass 'fold-bm'; did you mean 'fold-bn'?",
    "fold-bn, fold-bm": "pipeline, column 10: unknown pass 'fold-bm'; did you mean 'fold-bn'?",
    "fold-bn{x=1}": "pipeline, column 9: pass fold-bn: unknown option 'x'; it has no options",
    "quantize-int8{observr=mse}": "column 15: pass quantize-int8: unknown option 'observr'; it has observer, ",
    "everything{mode=c}": "pipeline, column 1: everything{mode}: 'c' is not a choice; use one of a, b",
    "everything{count=x}": "pipeline, column 12: everything{count}: 'x' is not a whole number",
    "everything{count=1.5}": "pipeline, column 12: everything{count}: '1.5' is not a whole number",
    "everything{count=[1,2]}": "pipeline, column 12: everything{count}: '[1,2]' is not a whole number",
    "everything{count=0}": "everything{count}: 0 is below 1; use a value in 1..8",
    "everything{count=9}": "everything{count}: 9 is above 8; use a value in 1..8",
    "everything{rate=-1}": "everything{rate}: -1.0 is below 0",
    "everything{rate=nan}": "everything{rate}: 'nan' is not a number",
    "everything{rate=inf}": "everything{rate}: 'inf' is not a number",
    "everything{flag=yes}": "everything{flag}: 'yes' is not true or false",
    "everything{limit=x}": "everything{limit}: 'x' is not a whole number",
    "everything{sizes=[1,x]}": "everything{sizes}: 'x' is not a whole number",
    "everything{count=1 count=2}": "pipeline, column 20: option 'count' is given twice in ",
    "wanting": "pipeline, column 1: pass wanting: option 'amount' is missing; write wanting{amount=…}",
    "fold-bn fold-bn": "pipeline, column 9: ',' expected in 'fold-bn fold-bn'; write it like: ",
    "fold-bn,": "pipeline, column 9: a pass name is missing in ",
    ", fold-bn": "pipeline, column 1: a pass name expected in ",
    "everything{": "pipeline, column 12: an option name or '}' expected in ",
    "everything{count}": "pipeline, column 17: '=' expected in ",
    "everything{count=}": "pipeline, column 18: a value expected in ",
    "everything{sizes=[1": "pipeline, column 20: a value expected in ",
    'everything{word="a': "pipeline, column 17: a text is not closed in ",
    'everything{word="\\q"}': "pipeline, column 17: \"\\q\" has a '\\' that means nothing in ",
    "everything}": "pipeline, column 11: ',' expected in ",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_with_its_column(text: str) -> None:
    assert MISTAKES[text] in error(Pipeline.parse, text)


def test_all_mistakes_are_reported_at_once() -> None:
    message = error(Pipeline.parse, "fold-bm, everything{count=x flagg=true}, everything{mode=z}")
    assert message == (
        "pipeline: 4 mistakes: column 1: unknown pass 'fold-bm' (did you mean 'fold-bn'?); "
        "column 21: everything{count}: 'x' is not a whole number; "
        "column 29: pass everything: unknown option 'flagg' "
        "(it has flag, count, rate, mode, word, layers, sizes, limit); "
        "column 42: everything{mode}: 'z' is not a choice (use one of a, b)"
    )


RECIPES = {
    "a = ": "is not TOML: ",
    "x = 1": "has the key 'x' where [[pass]] tables belong",
    "pass = 1": "has the key 'pass' where [[pass]] tables belong",
    "[[pass]]\nn = 1": "pass 1: has no name; add name = ",
    "[[pass]]\nname = 1": "pass 1: has no name; add name = ",
    '[[pass]]\nname = "fold-bn"\n[[pass]]\nname = "fold-bm"': "pass 2: unknown pass 'fold-bm'",
    '[[pass]]\nname = "everything"\ncount = true': "pass 1: everything{count}: 'true' is not a whole number",
    '[[pass]]\nname = "everything"\ncount = {a = 1}': "pass 1: everything{count}: ",
    '[[pass]]\nname = "everything"\ncount = 10': "pass 1: everything{count}: 10 is above 8",
    '[[pass]]\nname = "everything"\ncountt = 10': "pass 1: pass everything: unknown option 'countt'",
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_mistake_in_a_recipe_names_the_file_and_the_pass(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    message = error(Pipeline.from_toml, path)
    assert message.startswith(str(path)) and RECIPES[text] in message


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in error(Pipeline.of, str(tmp_path / "gone.toml"))
    assert "cannot be read: Is a directory" in error(Pipeline.from_toml, tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not TOML" in error(Pipeline.from_toml, tmp_path / "binary.toml")


def test_option_rows_come_from_the_fields() -> None:
    rows = {row.name: row for row in option_rows(Everything)}
    assert list(rows) == ["flag", "count", "rate", "mode", "word", "layers", "sizes", "limit"]
    count = rows["count"]
    assert (count.type, count.default, count.help, count.unit, count.range) == ("int", 3, "how often", "steps", "1..8")
    assert (rows["rate"].range, rows["mode"].range, rows["word"].range) == ("0..", "a | b", "")
    assert rows["layers"].type == "tuple[str, ...]" and rows["limit"].type == "int | None"


@pytest.mark.parametrize("entry", registry.BUILTIN, ids=lambda e: e.name)
def test_every_option_of_every_pass_has_help(entry: registry.PassEntry) -> None:
    for row in option_rows(registry.load_pass(entry.name)):
        assert row.help, f"{entry.name}{{{row.name}}}"
