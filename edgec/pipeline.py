"""Pipelines: a string, a TOML recipe and a tuple of Pass objects are three spellings of one thing.

    fold-bn, quantize-int8{observer=mse keep_float=[conv1,fc]}

A pass is its name, then options in braces, separated by blanks; a value is a number, true or false, a word, a text in
double quotes, or a list in brackets. Options that have their default value are left out when a pipeline is spelled.
The same as a recipe:

    [[pass]]
    name = "fold-bn"

    [[pass]]
    name = "quantize-int8"
    observer = "mse"
    keep_float = ["conv1", "fc"]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from edgec.errors import EdgecError
from edgec.passbase import Pass
from edgec.registry import load_pass

TOKEN = re.compile(r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\],=])|(?P<word>[^\s{}\[\],="]+))', re.DOTALL)
PLAIN = re.compile(r'[^\s{}\[\],="]+')
EXAMPLE = "write it like: fold-bn, quantize-int8{observer=mse keep_float=[conv1,fc]}"


@dataclass(frozen=True)
class Pipeline:
    """Passes in order: `Pipeline([FoldBN(), QuantizeInt8(observer="mse")])`."""

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for step in self.passes:
            if not isinstance(step, Pass):
                what = f"the class {step.__name__}" if isinstance(step, type) else f"a {type(step).__name__}"
                raise EdgecError(f"{what} is not a pass", where="pipeline", hint="give Pass objects, or one string")

    @staticmethod
    def of(value: Pipeline | Pass | str | Path | Sequence[Pass]) -> Pipeline:
        """From any of the spellings; a Path, or a string that ends in `.toml`, is a recipe file."""
        if isinstance(value, Pipeline):
            return value
        if isinstance(value, Pass):
            return Pipeline((value,))
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".toml")):
            return Pipeline.from_toml(Path(value))
        if isinstance(value, str):
            return Pipeline.parse(value)
        return Pipeline(tuple(value))

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Parse the string form.

        Raises EdgecError with the column of the first mark that does not belong. When the marks are right, it lists
        every unknown pass, unknown option and wrong value, each with its column.
        """
        return _build(_Parser(text).steps(), "pipeline")

    def spelling(self) -> str:
        """The canonical string; `Pipeline.parse` gives back an equal Pipeline."""
        return ", ".join(spell_pass(p) for p in self.passes)

    @staticmethod
    def from_toml(path: str | Path) -> Pipeline:
        """Read a recipe: `[[pass]]` tables with `name` and the options. Raises EdgecError as `parse` does."""
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise EdgecError(f"cannot be read: {error.strerror}", where=str(path)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise EdgecError(f"is not TOML: {error}", where=str(path)) from error
        unknown = sorted(set(table) - {"pass"})
        tables = table.get("pass", [])
        if unknown or not isinstance(tables, list):
            raise EdgecError(
                f"has the key '{unknown[0] if unknown else 'pass'}' where [[pass]] tables belong",
                where=str(path),
                hint="write one [[pass]] table with `name` for each pass",
            )
        steps = []
        for number, options in enumerate(tables, start=1):
            if not isinstance(options, dict) or not isinstance(options.get("name"), str):
                raise EdgecError("has no name", where=f"{path}: pass {number}", hint='add name = "..."')
            values = {k: (v, f"pass {number}") for k, v in options.items() if k != "name"}
            steps.append(_Step(options["name"], f"pass {number}", values))
        return _build(steps, str(path))

    def to_toml(self) -> str:
        """The text of a recipe; `from_toml` gives back an equal Pipeline."""
        tables = []
        for step in self.passes:
            lines = ["[[pass]]", f"name = {_toml(step.name)}"]
            lines += [f"{key} = {_toml(value)}" for key, value in changed_options(step).items()]
            tables.append("\n".join(lines) + "\n")
        return "\n".join(tables)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)


def spell_pass(step: Pass) -> str:
    """One pass as it is written in a pipeline."""
    options = " ".join(f"{key}={_spell(value)}" for key, value in changed_options(step).items())
    return f"{step.name}{{{options}}}" if options else step.name


def changed_options(step: Pass) -> dict[str, Any]:
    """The options whose value is not the default, in the order of the fields."""
    values = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    return {f.name: values[f.name] for f in dataclasses.fields(step) if values[f.name] != _default(f)}


@dataclass(frozen=True)
class OptionRow:
    """One option of a pass for `edgec passes NAME` and the documentation. `range` is a text: `1..8`, or the choices."""

    name: str
    type: str
    default: Any
    help: str
    unit: str | None
    range: str


def option_rows(cls: type[Pass]) -> list[OptionRow]:
    """The options of a pass, read from its dataclass fields."""
    hints = get_type_hints(cls)
    rows = []
    for f in dataclasses.fields(cls):
        meta = f.metadata
        low, high = meta.get("low"), meta.get("high")
        span = " | ".join(map(str, meta.get("choices") or ()))
        if not span and (low is not None or high is not None):
            span = f"{_bound(low)}..{_bound(high)}"
        kind = hints[f.name]
        text = str(kind) if get_args(kind) else getattr(kind, "__name__", str(kind))
        default = None if _default(f) is dataclasses.MISSING else _default(f)
        rows.append(OptionRow(f.name, text, default, meta.get("help", ""), meta.get("unit"), span))
    return rows


# -- from names and plain values to passes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """A pass as it was written, with the places of its name and of each option for messages."""

    name: str
    place: str
    options: dict[str, tuple[Any, str]]


def _build(steps: Sequence[_Step], where: str) -> Pipeline:
    """Instantiate the passes; raises one EdgecError for all mistakes."""
    mistakes: list[tuple[str, EdgecError]] = []
    passes = [_make_pass(step, mistakes) for step in steps]
    if len(mistakes) == 1:
        ((place, error),) = mistakes
        raise EdgecError(_with_owner(error), where=f"{where}, {place}", hint=error.hint) from error
    if mistakes:
        listed = [f"{place}: {_with_owner(e)}" + (f" ({e.hint})" if e.hint else "") for place, e in mistakes]
        raise EdgecError(f"{len(mistakes)} mistakes: " + "; ".join(listed), where=where)
    return Pipeline(tuple(p for p in passes if p is not None))


def _with_owner(error: EdgecError) -> str:
    return f"{error.where}: {error.what}" if error.where else error.what


def _make_pass(step: _Step, mistakes: list[tuple[str, EdgecError]]) -> Pass | None:
    """The pass, or None when there were mistakes."""
    before = len(mistakes)
    try:
        cls = load_pass(step.name)
    except EdgecError as error:
        mistakes.append((step.place, error))
        return None
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, (value, place) in step.options.items():
        try:
            if key not in fields:
                hint = f"it has {', '.join(fields)}" if fields else "it has no options"
                raise EdgecError(f"unknown option '{key}'", where=f"pass {step.name}", hint=hint)
            values[key] = _convert(value, hints[key], f"{step.name}{{{key}}}")
        except EdgecError as error:
            mistakes.append((place, error))
    for key in [n for n, f in fields.items() if _default(f) is dataclasses.MISSING and n not in step.options]:
        hint = f"write {step.name}{{{key}=…}}"
        mistakes.append((step.place, EdgecError(f"option '{key}' is missing", where=f"pass {step.name}", hint=hint)))
    if len(mistakes) > before:
        return None
    try:
        return cls(**values)
    except EdgecError as error:
        mistakes.append((step.place, error))
        return None


def _default(f: dataclasses.Field[Any]) -> Any:
    """The default of an option, MISSING when it has to be given."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A word, number or list as the type of an option: bool, int, float, str, `X | None` or `tuple[X, ...]`."""
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, get_args(kind)[0], where) for item in items)
    choices = [k for k in get_args(kind) if k is not type(None)]
    if choices:
        return None if value == "none" else _convert(value, choices[0], where)
    if kind is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif not isinstance(value, (bool, list, dict)):
        number = _number(value)
        if math.isfinite(number) and (kind is float or number == int(number)):
            return int(str(value)) if kind is int and re.fullmatch(r"[+-]?\d+", str(value)) else kind(number)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    raise EdgecError(f"'{_show(value)}' is not {names.get(kind, kind)}", where=where)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _show(value: Any) -> str:
    return _spell(value) if isinstance(value, (bool, list)) else str(value)


class _Parser:
    """Recursive descent over the tokens of a pipeline string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text.rstrip()):
            match = TOKEN.match(text, position)
            if match is None:
                raise self._error("a text is not closed", text.index('"', position))
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.next = 0

    def steps(self) -> list[_Step]:
        found = []
        while self.next < len(self.tokens):
            place = self._place()
            name = self._take("word", "a pass name")
            found.append(_Step(name, place, self._options()))
            if self.next < len(self.tokens):
                self._expect(",")
                if self.next == len(self.tokens):
                    raise self._error("a pass name is missing", len(self.text))
        return found

    def _options(self) -> dict[str, tuple[Any, str]]:
        options: dict[str, tuple[Any, str]] = {}
        if self._accept("{"):
            while not self._accept("}"):
                place, position = self._place(), self._position()
                key = self._take("word", "an option name or '}'")
                self._expect("=")
                if key in options:
                    raise self._error(f"option '{key}' is given twice", position)
                options[key] = (self._value(), place)
                self._accept(",")
        return options

    def _value(self) -> Any:
        if self._accept("["):
            items = []
            while not self._accept("]"):
                items.append(self._value())
                self._accept(",")
            return items
        if self.next < len(self.tokens) and self.tokens[self.next][0] == "text":
            self.next += 1
            _, text, position = self.tokens[self.next - 1]
            try:
                return json.loads(text, strict=False)
            except ValueError:
                raise self._error(f"{text} has a '\\' that means nothing", position) from None
        return self._take("word", "a value")

    def _accept(self, mark: str) -> bool:
        if self.next < len(self.tokens) and self.tokens[self.next][:2] == ("mark", mark):
            self.next += 1
            return True
        return False

    def _expect(self, mark: str) -> None:
        if not self._accept(mark):
            raise self._error(f"'{mark}' expected", self._position())

    def _take(self, kind: str, wanted: str) -> str:
        if self.next < len(self.tokens) and self.tokens[self.next][0] == kind:
            self.next += 1
            return self.tokens[self.next - 1][1]
        raise self._error(f"{wanted} expected", self._position())

    def _position(self) -> int:
        return self.tokens[self.next][2] if self.next < len(self.tokens) else len(self.text)

    def _place(self) -> str:
        return f"column {self._position() + 1}"

    def _error(self, what: str, position: int) -> EdgecError:
        return EdgecError(f"{what} in '{self.text}'", where=f"pipeline, column {position + 1}", hint=EXAMPLE)


# -- spelling ----------------------------------------------------------------------------------------------------------


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_spell(v) for v in value) + "]"
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value)
    return repr(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if value is None:
        return '"none"'
    if isinstance(value, str):
        # TOML wants DEL escaped, JSON does not; TOML has no surrogate pairs.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
