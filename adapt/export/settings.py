"""What an export may be asked for, checked before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..files.outputs import check_new_folder
from ..settings.bounds import Spelled, check_value, one_of
from ..spec import DTYPE_NAMES

FORMATS = ("hf",)
ShardSize = Annotated[str, Spelled(r"(?i)[1-9]\d{0,5}([kmgt]i?)?b", "a size like 500MB, 5GB or 2GiB")]


def check_settings(out: Path, format: str, dtype: str | None, max_shard_size: str | None) -> None:
    """ValueError for an `out` that exists or cannot be made, and for values that are not allowed."""
    check_new_folder(out)
    one_of("format", format, FORMATS)
    if dtype is not None:
        one_of("dtype", dtype, DTYPE_NAMES)
    check_value("max_shard_size", max_shard_size, ShardSize | None)
