"""The argument parser of every command: jsonargparse whose usage errors are one line, with the nearest setting named.

Each number has bounds, which are declared with it (`settings/bounds.py`) and held before anything heavy is imported.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from . import progress
from .files.user_text import overgrown
from .settings.bounds import check_value, lone_texts, shown, undeclared, without_bounds

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the fields' docstrings
_LONG = 64  # characters: no shorter argument can be nested too deeply


class _Formatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # descriptions hold commands to paste: keep their lines


class CommandParser(ArgumentParser):
    """`CommandParser(prog="adapt convert", description=__doc__)`; exits with 2 and one line on a usage error."""

    def __init__(self, *args, **kwargs) -> None:
        self._hints: dict[str, Any] = {}
        super().__init__(*args, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def option(self, *names: str, type: Any, **settings: Any) -> None:
        """`add_argument` whose value is held to the bounds of its type; a number without bounds is an AssertionError."""
        assert not undeclared(type), f"{names[0]}: a number needs bounds, such as Annotated[int, Bounds(1, 100)]"
        action: Any = self.add_argument(*names, type=without_bounds(type), **settings)
        self._hints[action.dest] = type

    def parse_args(self, args: Sequence[str] | None = None, *rest, **kwargs) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The arguments; ValueError for a value out of its bounds, exit with 2 for what cannot be read at all."""
        given = list(sys.argv[1:] if args is None else args)
        for argument, reason in lone_texts(given):
            self.error(f"{shown(argument)}: {reason}")
        for argument in given:
            if len(argument) > _LONG and overgrown(argument):
                self.error(f"{shown(argument)}: is nested too deeply; write it flat, or into a file")
        try:
            found = super().parse_args(given, *rest, **kwargs)
        except (AttributeError, IndexError, OverflowError, RecursionError, UnicodeError) as error:
            if progress.debug:
                raise
            self.error(f"an argument cannot be read ({type(error).__name__}: {error})")
        for name, hint in self._hints.items():
            check_value(name, found[name], hint)
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(str(message).split())
        if unknown := _unknown_key(line):
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown, known, n=1)
            line += f"; did you mean {near[0]}?" if near and near[0] != unknown else ""
        wait_for_rank_zero()
        print(f"{self.prog}: error: {line} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


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
