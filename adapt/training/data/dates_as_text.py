"""Text that looks like a date is text: pyarrow's JSON reader makes a date of it where all of a column look so.

`datasets` gives no way to say so before the columns are known, and turns such a column back into text as "2024-01-01 00:00:00"
where other files have text there, so that another text would be learned than stands in the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.json as _json  # pyright: ignore[reportMissingImports]


@contextmanager
def dates_as_text() -> Iterator[None]:
    """Inside, the JSON reader of `datasets` leaves text as it stands."""
    reader: Any = importlib.import_module("datasets.packaged_modules.json.json")
    before = reader.paj
    reader.paj = SimpleNamespace(**{**vars(_json), "read_json": _read_json})
    try:
        yield
    finally:
        reader.paj = before


def _read_json(source: Any, read_options: Any) -> pa.Table:
    table = _json.read_json(source, read_options=read_options)
    dates = [field.with_type(_as_text(field.type)) for field in table.schema if field.type != _as_text(field.type)]
    if not dates:
        return table
    source.seek(0)
    return _json.read_json(source, read_options, _json.ParseOptions(explicit_schema=pa.schema(dates)))


def _as_text(kind: pa.DataType) -> pa.DataType:
    """The type with text in the place of dates and times, at any depth."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_text(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_as_text(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind
