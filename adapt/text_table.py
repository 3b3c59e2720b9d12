"""A table for a terminal: what `plan`, `plot` and `compare` print."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), ruled: bool = False) -> list[str]:
    """The lines of a table whose first row is its head; columns named in `left` are flush left, figures right.

    ruled: a line of dashes below the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]] if ruled else lines
