"""The argument parser of every command: jsonargparse whose usage errors are one line, with the nearest setting named."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the fields' docstrings


class _Formatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # descriptions hold commands to paste: keep their lines


class CommandParser(ArgumentParser):
    """`CommandParser(prog="adapt convert", description=__doc__)`; exits with 2 and one line on a usage error."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

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
