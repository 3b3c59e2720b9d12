"""What a setting may be: its type says it, in recipes, samplers and every verb's options alike.

    @dataclass(frozen=True)
    class Options:
        batch_size: Rows = 8
        temperature: Annotated[float, Bounds(0, 100)] = 0.0

        def __post_init__(self) -> None:
            check_settings(self, "")

A number without bounds is refused where the options are declared (`undeclared`), so that none can be forgotten. Nothing heavy is
imported: a value is refused before torch is there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)  # no tuple: typing keeps unions by equality, and an export's modules are run more than once
class Bounds:
    """The least and the largest value of a number, both allowed unless said otherwise."""

    low: float
    high: float
    low_is_open: bool = False
    high_is_open: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        low = self.low < value if self.low_is_open else self.low <= value
        return low and (value < self.high if self.high_is_open else value <= self.high)

    def __str__(self) -> str:
        if not (self.low_is_open or self.high_is_open):
            return f"must be from {_number(self.low)} to {_number(self.high)}"
        low = f"{'above' if self.low_is_open else 'at least'} {_number(self.low)}"
        return f"must be {low} and {'below' if self.high_is_open else 'at most'} {_number(self.high)}"


@dataclass(frozen=True)
class Spelled:
    """A text of a form: all of it matches the pattern. such_as: what to write instead."""

    pattern: str
    such_as: str


MayBeEmpty = Annotated[str, "may be empty"]
"""A text that means something when it is empty; any other is refused then."""
# torch calls meta the device that holds no numbers.
Device = Annotated[str, Spelled(r"(?!meta)[a-z]+(:\d{1,3})?", "cpu, cuda or cuda:N")]

# The largest are far above what any machine can do, and far below what would make one hang or overflow.
Tokens = Annotated[int, Bounds(1, 2**24)]
Rows = Annotated[int, Bounds(1, 2**20)]
Steps = Annotated[int, Bounds(1, 10**9)]
StepsOrNever = Annotated[int, Bounds(0, 10**9)]
Processes = Annotated[int, Bounds(0, 256)]
Ranks = Annotated[int, Bounds(1, 2**16)]
Items = Annotated[int, Bounds(1, 10**9)]
Samples = Annotated[int, Bounds(1, 2**16)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # numpy takes no other
Share = Annotated[float, Bounds(0, 1, low_is_open=True, high_is_open=True)]
Weight = Annotated[float, Bounds(0, 1e6)]
Minutes = Annotated[float, Bounds(0, 1e7, low_is_open=True)]  # 19 years


def check_settings(options: Any, section: str) -> None:
    """ValueError for the first field of a dataclass whose value is not what its type says. section: "training"; "" = none."""
    for name, hint in hints(type(options)).items():
        check_value(f"{section}.{name}" if section else name, getattr(options, name), hint)


def check_value(setting: str, value: Any, hint: Any) -> None:
    """ValueError unless the value is what the type hint and its bounds say: True is no number, a word no truth value."""
    if obstacle := _obstacle(value, hint):
        raise ValueError(f"{setting}={shown(value)}: {obstacle}")


def one_of(setting: str, value: object, allowed: Collection[str]) -> None:
    """ValueError unless the value is one of those."""
    if value not in allowed:
        raise ValueError(f"{setting}={shown(value)}: choose one of {', '.join(sorted(allowed))}")


def undeclared(hint: Any) -> bool:
    """Whether a type hint leaves a number somewhere in it without bounds."""
    base, marks = _unwrapped(hint)
    if base in (int, float):
        return not any(isinstance(mark, Bounds) for mark in marks)
    return get_origin(base) is not Literal and any(undeclared(part) for part in get_args(base) if part is not ...)


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type hint stands for or allows."""
    base, _ = _unwrapped(hint)
    return next((kind for kind in (base, *get_args(base)) if dataclasses.is_dataclass(kind)), None)  # pyright: ignore[reportReturnType]


def without_bounds(hint: Any) -> Any:
    """The type alone, as a parser's help shows it."""
    base, _ = _unwrapped(hint)
    if get_origin(base) in (Union, types.UnionType):
        return functools.reduce(operator.or_, [without_bounds(part) for part in get_args(base)])
    return base


@functools.cache
def hints(options: type) -> dict[str, Any]:
    """{field: its type with bounds} of a dataclass, in their order; AssertionError for a number that has none."""
    found = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        assert not undeclared(found[field.name]), f"{options.__name__}.{field.name}: a number needs bounds"
    return {field.name: found[field.name] for field in dataclasses.fields(options)}


def shown(value: Any) -> str:
    """The value as an error names it: one line, not endless, and printable whatever is in it."""
    if isinstance(value, str) and value.strip() and not _not_text(value):
        text = " ".join(value.split())
    else:
        try:
            text = repr(value)
        except ValueError:  # Python writes no whole number of more than 4,300 digits
            text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text):,} characters)"


def _obstacle(value: Any, hint: Any) -> str | None:
    """What is wrong with the value, and what is allowed; None where nothing is."""
    base, marks = _unwrapped(hint)
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        return _of_union(value, get_args(base))
    if origin is Literal:
        is_one = any(value == choice and type(value) is type(choice) for choice in get_args(base))
        return None if is_one else f"choose one of {', '.join(sorted(map(str, get_args(base))))}"
    if origin in (list, dict):
        return _of_collection(value, origin, get_args(base))
    if base in (int, float):
        return _of_number(value, base, marks)
    if base is str:
        return _of_text(value, marks)
    if base is Any:
        return None
    if issubclass(base, PurePath):
        return _of_text(str(value), marks) if isinstance(value, base) else "must be a path"
    if isinstance(value, base):
        return None
    return "must be true or false" if base is bool else f"must be a {base.__name__}"


def _of_union(value: Any, hints: tuple[Any, ...]) -> str | None:
    """The obstacle of the alternative that the value's own type stands for, or else all that is allowed."""
    if value is None and types.NoneType in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not types.NoneType)
    obstacles = [_obstacle(value, hint) for hint in hints]
    if None in obstacles:
        return None
    for hint, obstacle in zip(hints, obstacles):
        base, _ = _unwrapped(hint)
        kind = get_origin(base) or base
        if isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):
            return obstacle
    first, *others = [obstacle for obstacle in obstacles if obstacle]
    return " or ".join([first, *(obstacle.removeprefix("must be ") for obstacle in others)])


def _of_collection(value: Any, kind: type, hints: tuple[Any, ...]) -> str | None:
    if not isinstance(value, kind):
        return "must be a list" if kind is list else "must map names to values"
    parts = [(part, hints[0]) for part in value]
    if isinstance(value, dict):
        parts = [pair for key, each in value.items() for pair in ((key, hints[0]), (each, hints[1]))]
    found = next(((part, obstacle) for part, hint in parts if (obstacle := _obstacle(part, hint))), None)
    return None if found is None else f"{shown(found[0])} in it {found[1]}"


def _of_number(value: Any, kind: type, marks: tuple[Any, ...]) -> str | None:
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return f"must be {what}"
    for bounds in marks:
        if isinstance(bounds, Bounds) and not (math.isfinite(_as_float(value)) and value in bounds):
            return str(bounds)
    return None


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of more than 308 digits
        return math.inf


def _of_text(value: Any, marks: tuple[Any, ...]) -> str | None:
    if not isinstance(value, str):
        return "must be text"
    if not value.strip() and get_args(MayBeEmpty)[1] not in marks:
        return "is empty; write something, or leave it out"
    if reason := _not_text(value):
        return reason
    for mark in marks:
        if isinstance(mark, Spelled) and not re.fullmatch(mark.pattern, value):
            return f"give {mark.such_as}"
    return None


def _not_text(value: str) -> str | None:
    if "\0" in value:
        return "holds a null byte; take it out"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text (a lone surrogate); write it in UTF-8"
    return None


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the type, its marks) of Annotated[type, *marks], or of a plain type."""
    marks = getattr(hint, "__metadata__", ())
    return (hint.__origin__, marks) if marks else (hint, ())


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def lone_texts(argv: list[str]) -> Iterator[str]:
    """`out='a\\x00b': what is wrong` of the arguments that are no text at all."""
    for option, argument in zip(["", *argv], argv, strict=False):
        if reason := _not_text(argument):
            setting = f"{option[2:]}=" if option.startswith("--") else ""
            yield f"{setting}{shown(argument)}: {reason}"
