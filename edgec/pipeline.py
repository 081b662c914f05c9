"""Pipelines: a string, a TOML recipe and a tuple of Pass objects are three spellings of one thing.

    fold-bn, quantize-int8{observer=mse keep_float=[conv1,fc]}

A pass is its name, options in braces separated by blanks; a value is a number, true or false, a word, a text in double
quotes, or a list in brackets. Options that have their default value are left out when a pipeline is spelled.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from edgec.errors import EdgecError
from edgec.passbase import Pass
from edgec.registry import load_pass

TOKEN = re.compile(r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\],=])|(?P<word>[^\s{}\[\],="]+))')
PLAIN = re.compile(r'[^\s{}\[\],="]+')


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: tuple[Pass, ...] = ()

    @staticmethod
    def of(value: Pipeline | str | Path | Sequence[Pass]) -> Pipeline:
        """From any of the spellings; a Path, or a string that ends in `.toml`, is a recipe file."""
        if isinstance(value, Pipeline):
            return value
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".toml")):
            return Pipeline.from_toml(Path(value))
        if isinstance(value, str):
            return Pipeline.parse(value)
        return Pipeline(tuple(value))

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Parse the string form. Raises EdgecError that names the pass or option, or the place of a wrong mark."""
        return Pipeline(tuple(_Parser(text).passes()))

    def spelling(self) -> str:
        """The canonical string; `Pipeline.parse` gives back an equal Pipeline."""
        return ", ".join(spell_pass(p) for p in self.passes)

    @staticmethod
    def from_toml(path: str | Path) -> Pipeline:
        """Read a recipe: `[[pass]]` tables with `name` and the options."""
        try:
            table = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise EdgecError(f"cannot be read: {error.strerror}", where=str(path)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise EdgecError(f"is not TOML: {error}", where=str(path)) from error
        unknown = sorted(set(table) - {"pass"})
        if unknown or not isinstance(table.get("pass", []), list):
            raise EdgecError(
                f"has the key '{unknown[0] if unknown else 'pass'}' where [[pass]] tables belong",
                where=str(path),
                hint="write one [[pass]] table with `name` for each pass",
            )
        made = []
        for number, options in enumerate(table.get("pass", []), start=1):
            if not isinstance(options, dict) or "name" not in options:
                raise EdgecError("has no name", where=f"{path}: pass {number}", hint='add name = "..."')
            values = {k: v for k, v in options.items() if k != "name"}
            made.append(make_pass(str(options["name"]), values))
        return Pipeline(tuple(made))

    def to_toml(self) -> str:
        """The recipe form; `from_toml` gives back an equal Pipeline."""
        tables = []
        for step in self.passes:
            lines = ["[[pass]]", f"name = {json.dumps(step.name)}"]
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
    return {
        f.name: getattr(step, f.name)
        for f in dataclasses.fields(step)
        if f.default is dataclasses.MISSING or getattr(step, f.name) != f.default
    }


@dataclass(frozen=True)
class OptionRow:
    """One option of a pass for `edgec passes NAME` and the documentation."""

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
        if meta.get("choices"):
            span = " | ".join(meta["choices"])
        elif meta.get("low") is not None or meta.get("high") is not None:
            span = f"{_bound(meta.get('low'))}..{_bound(meta.get('high'))}"
        else:
            span = ""
        kind = hints[f.name]
        default = None if f.default is dataclasses.MISSING else f.default
        rows.append(
            OptionRow(
                f.name,
                getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind),
                default,
                meta.get("help", ""),
                meta.get("unit"),
                span,
            )
        )
    return rows


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """Instantiate a pass from plain values. Raises EdgecError for unknown options and values of the wrong type."""
    cls = load_pass(name)
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in options.items():
        if key not in known:
            hint = f"it has {', '.join(known)}" if known else "it has no options"
            raise EdgecError(f"unknown option '{key}'", where=f"pass {name}", hint=hint)
        values[key] = _convert(value, hints[key], f"{name}{{{key}}}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise EdgecError(
            f"option '{missing[0]}' is missing", where=f"pass {name}", hint=f"write {name}{{{missing[0]}=…}}"
        )
    return cls(**values)


def _convert(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, get_args(kind)[0], where) for item in items)
    choices = [k for k in get_args(kind) if k is not type(None)]
    if choices:
        return None if value in (None, "none") else _convert(value, choices[0], where)
    if kind is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    else:
        try:
            if not isinstance(value, (bool, list)):
                number = float(value)
                if kind is float or number == int(number):
                    return kind(number)
        except (TypeError, ValueError, OverflowError):
            pass
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    raise EdgecError(f"'{value}' is not {names.get(kind, kind)}", where=where)


class _Parser:
    """Recursive descent over the tokens of a pipeline string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text.rstrip()):
            match = TOKEN.match(text, position)
            if match is None:
                raise self._error("a text is not closed", position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.next = 0

    def passes(self) -> Iterable[Pass]:
        while self.next < len(self.tokens):
            name = self._take("word", "a pass name")
            options: dict[str, Any] = {}
            if self._accept("{"):
                while not self._accept("}"):
                    key = self._take("word", "an option name or '}'")
                    self._expect("=")
                    if key in options:
                        raise self._error(f"option '{key}' is given twice", self.tokens[self.next - 2][2])
                    options[key] = self._value()
                    self._accept(",")
            yield make_pass(name, options)
            if self.next < len(self.tokens):
                self._expect(",")
                if self.next == len(self.tokens):
                    raise self._error("a pass name is missing", len(self.text))

    def _value(self) -> Any:
        if self._accept("["):
            items = []
            while not self._accept("]"):
                items.append(self._value())
                self._accept(",")
            return items
        if self.next < len(self.tokens) and self.tokens[self.next][0] == "text":
            self.next += 1
            return json.loads(self.tokens[self.next - 1][1])
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

    def _error(self, what: str, position: int) -> EdgecError:
        return EdgecError(
            f"{what} at column {position + 1} of '{self.text}'",
            where="pipeline",
            hint="write it like: fold-bn, quantize-int8{observer=mse keep_float=[conv1,fc]}",
        )


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
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
