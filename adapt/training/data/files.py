"""The files of data.train and data.eval: those that were named and no others, and the same bytes from the hash to the last row.

`datasets` takes names for patterns (`a[1].jsonl` is `a1.jsonl` to it) and knows a file again by its time of modification; so names
are escaped, and contents hashed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ... import progress
from ...files.provenance import whole_files
from ..sections import DataConfig
from .dates_as_text import dates_as_text
from .file_names import LOADERS, check_names, named_files, suffix_of
from .rows import check_json, first_bad_row

_LOG = logging.getLogger("datasets.packaged_modules.json.json")


def read(config: DataConfig) -> Dataset:
    """The rows of the files, or of the Hub dataset, that config.train names, as they are; ValueError where they cannot be read."""
    files = named_files(config.train)
    suffixes = {suffix_of(file) for file in files}
    local = suffixes & set(LOADERS) or any(Path(file).exists() for file in files)
    if not local:
        if len(files) != 1:
            raise ValueError(f"data.train={config.train}: several Hub datasets; give one, or files")
        try:
            return load_dataset(files[0], split=config.split)
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise ValueError(
                f"data.train={files[0]}: neither a file nor a dataset that the Hub gives us: {error}"
            ) from error
    check_names(files)
    if len(suffixes) > 1 or not suffixes <= set(LOADERS):
        raise ValueError(
            f"data.train={config.train}: files of one kind only, out of {', '.join(sorted(LOADERS))} (also .gz)"
        )
    if all(Path(file).stat().st_size == 0 for file in files):
        raise ValueError(f"data.train={config.train}: is empty, nothing to train on; give files with rows in them")
    loader = LOADERS[suffixes.pop()]
    options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
    if loader == "json" and progress.is_main():
        for file in files:
            check_json(file)
    _LOG.disabled = True  # it says of each file what we say of the row
    try:
        with dates_as_text():
            return load_dataset(loader, split="train", **for_datasets(files), **options)
    except Exception as error:  # datasets wraps whatever its readers raise
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:
            raise ValueError(
                f"data.train={config.train}: is empty, nothing to train on; give files with rows in them"
            ) from error
        for file in files if loader != "parquet" else ():
            if why := first_bad_row(file):
                raise ValueError(f"data.train={file}: {why}") from error
        raise ValueError(
            f"data.train={config.train}: cannot be read as {loader}: {reason[:200]}; mend the file"
        ) from error


def for_datasets(names: list[str]) -> dict[str, Any]:
    """How `load_dataset` reads these very files, and reads them anew when what is in them has changed."""
    identity = json.dumps(whole_files(Path(name) for name in names), sort_keys=True)
    return {
        "data_files": [glob.escape(os.path.abspath(name)) for name in names],
        "name": f"adapt-2-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
    }


def stamps(config: DataConfig) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of modification of the local files of data.train and data.eval."""
    held_out = named_files(config.eval) if isinstance(config.eval, str | list) else []
    files = [Path(name) for name in [*named_files(config.train), *held_out]]
    found = {str(path): path.stat() for path in files if path.is_file()}
    return {name: (of.st_ino, of.st_size, of.st_mtime_ns) for name, of in found.items()}


def check_unchanged(config: DataConfig, before: dict[str, tuple[int, int, int]]) -> None:
    """ValueError where a file was written to since its `stamps`: what is recorded of it would not be what is trained on."""
    now = stamps(config)
    if changed := next((name for name in before if now.get(name) != before[name]), None):
        raise ValueError(f"data.train={changed}: was changed while it was read; start again when nobody writes to it")
