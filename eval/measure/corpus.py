"""Held-out text of a user, as it lies in a file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from adapt.files.user_text import check_user_file
from adapt.settings.bounds import MayBeEmpty, check_value


def texts_of(corpus: str | Path) -> Iterator[str]:
    """The texts of a .txt file (one) or of a .jsonl file's `text` fields; .gz of either."""
    path = Path(corpus)
    check_user_file(path, "corpus", "a .txt or .jsonl file (or .gz of one)")
    if not path.is_file():
        raise ValueError(f"corpus={corpus}: is no file but a pipe or device, and it is read twice; give a file")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind not in (".jsonl", ".txt"):
        raise ValueError(f"corpus={corpus}: give a .txt or .jsonl file (or .gz of one)")
    open_text = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_text(path, "rt", encoding="utf-8") as lines:
            if kind == ".txt":
                yield lines.read()
                return
            for line in lines:
                number += 1
                if line.strip():
                    yield _text_of(line)
    except (EOFError, KeyError, OSError, RecursionError, TypeError, ValueError, zlib.error) as error:
        where = (
            f"after line {number}"
            if isinstance(error, (EOFError, OSError, UnicodeError, zlib.error))
            else f"line {number}"
        )
        raise ValueError(f"corpus={corpus}: {where}: {_reason(error)}") from None


def _text_of(line: str) -> str:
    text = json.loads(line)["text"]
    check_value("text", text, MayBeEmpty)
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, (KeyError, TypeError, RecursionError, json.JSONDecodeError)):
        return "is not a JSON object with a `text`"
    return "is not UTF-8 text" if isinstance(error, UnicodeError) else " ".join(str(error).split())
