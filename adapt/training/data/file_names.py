"""What data.train and data.eval may name, checked before `datasets` (and with it torch) is imported."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""suffix: what `datasets` calls the kind"""


def suffix_of(file: str) -> str:
    """Its kind: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    suffixes = Path(file).suffixes
    return (suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])).lower()


def named_files(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def check_names(names: list[str], section: str = "data.train") -> None:
    """ValueError unless each is an ordinary file that can be opened, under a name that `datasets` can read."""
    for name in names:
        setting = f"{section}={name}"
        try:
            mode = Path(name).stat().st_mode
        except (OSError, ValueError):
            raise ValueError(
                f"{setting}: no such file; give json, jsonl, parquet or txt, or a Hub dataset id"
                + (" (a pattern is not looked up: name each file)" if glob.has_magic(name) else "")
            ) from None
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device, which can be read only once"
            raise ValueError(f"{setting}: is {kind}; give files")
        if "::" in name or "://" in name:
            raise ValueError(f"{setting}: a name with :: or :// is another place to `datasets`; rename the file")
        if os.path.expandvars(os.path.abspath(name)) != os.path.abspath(name):
            raise ValueError(f"{setting}: `datasets` puts a variable's value into this name; rename the file")
        if name.lower().endswith(".gz") and set(os.path.abspath(name)) & set("*?[]#"):
            raise ValueError(f"{setting}: `datasets` cannot unpack a file with one of * ? [ ] # in its path; rename it")
        try:
            name.encode()
            with Path(name).open("rb"):
                pass
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", None) or "its name is not UTF-8"
            raise ValueError(f"{section}={name!a}: cannot be opened ({reason})") from error
