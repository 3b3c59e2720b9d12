"""The argument parser of every command: jsonargparse whose usage errors are one line, with the nearest setting named.

Each number has bounds, which are declared with it (`settings/bounds.py`) and held before anything heavy is imported.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NoReturn, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from . import progress
from .files.user_text import overgrown, read_value
from .settings.bounds import check_value, dataclass_in, hints, lone_texts, shown, undeclared, without_bounds

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the fields' docstrings
_LONG = 64  # characters: no shorter argument can be nested too deeply


class _Formatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # descriptions hold commands to paste: keep their lines


class CommandParser(ArgumentParser):
    """`CommandParser(prog="adapt convert", description=__doc__)`; exits with 2 and one line on a usage error."""

    def __init__(self, *args, **kwargs) -> None:
        self._hints: dict[str, Any] = {}
        self._options: list[str] = []
        self._argv: list[str] = []
        ours = {"formatter_class": _Formatter, "allow_abbrev": False, "print_config": None}
        super().__init__(*args, **ours | kwargs)

    def option(self, *names: str, type: Any, **settings: Any) -> None:
        """`add_argument` whose value is held to the bounds of its type; a number without bounds is an AssertionError."""
        assert not undeclared(type), f"{names[0]}: a number needs bounds, such as Annotated[int, Bounds(1, 100)]"
        action: Any = self.add_argument(*names, type=without_bounds(type), **settings)
        self._hints[action.dest] = type
        self._options.append(action.dest)

    def settings_of(self, section: type, name: str = "") -> None:
        """An option for each field of a dataclass, which holds them to their bounds itself: `--name.field`."""
        self.add_class_arguments(section, name or None, as_group=bool(name))
        self._hints |= _fields(section, name)

    def parse_args(self, args: Sequence[str] | None = None, *rest, **kwargs) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The arguments; ValueError for a value out of its bounds, exit with 2 for what cannot be read at all."""
        self._argv = list(sys.argv[1:] if args is None else args)
        for problem in lone_texts(self._argv):
            self.error(problem)
        for argument in self._argv:
            if len(argument) > _LONG and overgrown(argument):
                self.error(f"{shown(argument)}: is nested too deeply; write it flat, or into a file")
        for name, value in self._given():
            if reason := _no_setting(self._hints.get(name), value):
                self.error(f"{name}={shown(value)}: {reason}")
        try:
            found = super().parse_args(self._argv, *rest, **kwargs)
        except (AttributeError, IndexError, OverflowError, RecursionError, UnicodeError) as error:
            if progress.debug:
                raise
            self.error(f"an argument cannot be read ({type(error).__name__}: {error})")
        for name in self._options:
            check_value(name, found[name], self._hints[name])
        return found

    def _given(self) -> Iterator[tuple[str, str]]:
        """(name, value) of the arguments that look like options."""
        for option, following in zip_longest(self._argv, self._argv[1:], fillvalue=""):
            name, equals, value = option.partition("=")
            if name.startswith("--"):
                yield name[2:], value if equals else following

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse's own parser of a part: the whole one speaks
            super().error(message, ex)
        line = self._by_type(" ".join(str(message).split()))
        if unknown := _unknown_key(line):
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown, known, n=1)
            line += f"; did you mean {near[0]}?" if near and near[0] != unknown else ""
        wait_for_rank_zero()
        print(f"{self.prog}: error: {line} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)

    def _by_type(self, line: str) -> str:
        """The line, or, where it is about the type of a value, what that may be instead of how jsonargparse says it."""
        about = re.match(r"Parser key [\"']([\w.]+)[\"']: ", line)
        names = [name for name in self._hints if about and (name == about[1] or name.startswith(f"{about[1]}."))]
        for name, value in self._given():
            if name in names:
                try:
                    check_value(name, read_value(value), self._hints[name])
                except ValueError as error:
                    return str(error)
        return line


def _fields(section: type, name: str) -> dict[str, Any]:
    """{"model.lora.r": its type} of a dataclass and those in it; of the sections themselves too."""
    prefix = f"{name}." if name else ""
    found: dict[str, Any] = {name: section} if name else {}
    for field, hint in hints(section).items():
        found[f"{prefix}{field}"] = hint
        if inner := dataclass_in(hint):
            found |= _fields(inner, f"{prefix}{field}") | {f"{prefix}{field}": hint}
    return found


def _no_setting(hint: Any, value: str) -> str | None:
    """Why a value cannot stand for a whole section, or for what has keys."""
    section = dataclass_in(hint)
    if section is None and get_origin(hint) is not dict:
        return None
    if section is not None and section is hint:
        return f"is a section; set what is in it one by one ({', '.join(sorted(hints(section)))}), or write a recipe"
    try:
        read = read_value(value)
    except ValueError as error:
        return str(error)
    if section is None or read is None:
        return None
    if not isinstance(read, dict):
        return f"is a section; write null, or its settings, such as {{{next(iter(hints(section)))}: ...}}"
    unknown = sorted(map(str, read.keys() - hints(section).keys()))
    return (
        f"{', '.join(unknown)} in it is unknown; allowed are {', '.join(sorted(hints(section)))}" if unknown else None
    )


def _unknown_key(message: str) -> str | None:
    """The setting that jsonargparse does not know, as the user would type it."""
    if inside := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return f"{inside[1]}.{inside[2]}"  # in a YAML file
    typed = re.search(r"(?:[Uu]nrecognized arguments?:? |[Kk]ey [\"']?)(?:--)?([\w.]+)", message)
    return typed[1] if typed else None


def wait_for_rank_zero() -> None:
    """Before an error is told by another rank than 0: if rank 0 found it too, it speaks first, and the launcher ends this one."""
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(10)
