"""Rows of files, looked at before a reader that may crash on them, and named by file and number where they cannot be learned from.

pyarrow's JSON reader ends the process at a row that is no object, and at one that is nested too deep.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset

from ... import progress
from ...files.json_file import no_key_twice

MOST_BYTES = 8 << 20
"""of a row: a book has 3 MB, and a tokenizer takes minutes for text of 10 MB without a blank in it"""
_MOST_NESTED = 64  # lists and objects in each other; pyarrow's reader overflows its stack at 3,000
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_DAMAGED = (EOFError, OSError, zlib.error)


class RowError(ValueError):
    """A row that cannot be learned from: (what is wrong with it, its index among the rows that were read)."""


def check_json(name: str) -> None:
    """ValueError, with the row, for what pyarrow's JSON reader crashes on or misreads: no objects, deep nesting, other encodings."""
    with progress.doing(f"checking {Path(name).name}"):
        lines = 0
        for number, line in enumerate(_lines(name), 1):
            lines = number
            if number == 1 and _is_one_document(name, line):
                return _check_document(name)
            _check_line(name, number, line)
    if lines == 0:
        raise ValueError(f"data.train={name}: is empty, nothing to train on; give files with rows in them")


def _lines(name: str) -> Iterator[bytes]:
    """The lines that are not blank."""
    try:
        with _opened(name) as file:
            first = True
            while line := file.readline(MOST_BYTES + 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if first else line
                first = False
                if not line.isspace():
                    yield line
    except _DAMAGED as error:
        raise ValueError(
            f"data.train={name}: cannot be read ({' '.join(str(error).split())}); mend the file"
        ) from error


def _opened(name: str) -> Any:
    return gzip.open(name, "rb") if name.lower().endswith(".gz") else Path(name).open("rb")


def _check_line(name: str, number: int, line: bytes) -> None:
    if len(line) > MOST_BYTES:
        _refuse(name, number, f"has more than {MOST_BYTES >> 20} MB; cut it into several")
    if not line.isascii():
        _check_utf8(name, number, line)
    if line.lstrip()[:1] != b"{":
        _refuse(name, number, f'is no JSON object ({line[:30]!a}); write one object a line, such as {{"text": ...}}')
    if line.count(b"[") + line.count(b"{") > _MOST_NESTED and _depth(line) > _MOST_NESTED:
        _refuse(name, number, f"is nested deeper than {_MOST_NESTED}; flatten it")


def _check_utf8(name: str, number: int, line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        _refuse(name, number, f"is not UTF-8 (byte {error.start + 1} of it); save the file as UTF-8")


def _refuse(name: str, number: int, what: str) -> NoReturn:
    raise ValueError(f"data.train={name}: row {number} {what}")


def _depth(text: bytes) -> int:
    """The most lists and objects that lie in each other."""
    depth = deepest = 0
    for sign in re.findall(rb"[\[\]{}]", _STRING.sub(b"", text)):
        depth += 1 if sign in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _is_one_document(name: str, first_line: bytes) -> bool:
    """Whether the file is one JSON value over many lines, a list of rows as a rule, and not an object a line."""
    start = first_line.lstrip()[:1]
    if start == b"[":
        return ".json" in Path(name).suffixes
    try:
        return (
            start == b"{"
            and _depth(first_line) <= _MOST_NESTED
            and len(first_line) <= MOST_BYTES
            and not json.loads(first_line)
        )
    except ValueError:
        return ".json" in Path(name).suffixes


def _check_document(name: str) -> None:
    try:
        with _opened(name) as file:
            text = file.read()
        if _depth(text) > _MOST_NESTED:
            raise ValueError(f"data.train={name}: is nested deeper than {_MOST_NESTED}; flatten it")
        rows = json.loads(text)
    except _DAMAGED as error:
        raise ValueError(
            f"data.train={name}: cannot be read ({' '.join(str(error).split())}); mend the file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.train={name}: is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"data.train={name}: is not valid JSON ({error}); mend the file") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, dict):
            _refuse(name, number, f"is no JSON object ({json.dumps(row)[:30]}); a list of rows holds objects")


def first_bad_row(name: str) -> str | None:
    """What a reader did not take in a JSON lines or text file, with its row; None if that cannot be told. After it has failed: slow."""
    if not name.lower().removesuffix(".gz").endswith((".json", ".jsonl")):
        with _opened(name) as file:
            content = file.read()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            return f"line {content.count(10, 0, error.start) + 1} is not UTF-8; save the file as UTF-8"
        return None
    for number, line in enumerate(_lines(name), 1):
        try:
            row = json.loads(line, object_pairs_hook=no_key_twice)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"row {number} has half of a surrogate pair in it (\\ud800 to \\udfff), which is no character; remove it"
        except ValueError as error:
            return f"row {number} is not valid JSON ({error}); mend it"
    return None


def place_of(names: list[str], index: int) -> str:
    """`file: row N` of the row with that index among all rows of the files, read one after the other."""
    for name in names:
        number = _num_rows(name) if len(names) > 1 else None
        if number is None or index < number:
            return f"{name}: row {index + 1}"
        index -= number
    return f"{names[-1]}: a row"


def _num_rows(name: str) -> int | None:
    """None where it cannot be told."""
    plain = name.lower().removesuffix(".gz")
    if plain.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(name).num_rows
    if plain.endswith(".txt"):
        return 1
    first = next(_lines(name), b"")
    return None if _is_one_document(name, first) else sum(1 for _ in _lines(name))


def located(
    tokenise: Callable[..., dict[str, list]], batch: dict[str, list], indices: list[int], **how
) -> dict[str, list]:
    """What `tokenise` makes of a batch; a RowError with the index of the row that it does not take."""
    try:
        return tokenise(batch, **how)
    except RowError:
        for i, index in enumerate(indices):
            try:
                tokenise({column: values[i : i + 1] for column, values in batch.items()}, **how)
            except RowError as error:
                raise RowError(str(error), index) from None
        raise


def map_rows(rows: Dataset, files: list[str], function: Callable[..., dict[str, list]], **options) -> Dataset:
    """`rows.map`; ValueError that names file and row for a row that cannot be tokenised."""
    try:
        return rows.map(function, **options)
    except RowError as error:
        what, index = error.args
        if rows._indices is not None:  # a share of the rows: their place among all of them
            index = rows._indices.column(0)[index].as_py()
        place = (
            place_of(files, index) if all(Path(file).is_file() for file in files) else f"{files[0]}: row {index + 1}"
        )
        raise ValueError(f"data.train={place}: {what}") from error
