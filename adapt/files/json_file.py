"""JSON files of strangers: bounded, without a key twice, and an object."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

_MAX_JSON = 256 << 20  # bytes; the index of a model with a million tensors has 100 MB


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ValueError that begins with `what` (`base=folder`) and names the file if it holds none."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"larger than {_MAX_JSON >> 20} MiB")
        content = json.loads(path.read_bytes(), object_pairs_hook=no_key_twice)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except FileNotFoundError:
        raise ValueError(f"{what}: has no {path.name}; download the model again") from None
    except (OSError, RecursionError, ValueError) as error:  # bytes that are no UTF-8 are a ValueError too
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{what}: {path.name} is not valid JSON ({reason}); download the model again") from error
    return content


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object for `object_pairs_hook`; ValueError with the key that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r:.60} is there twice; keep one")
    return found
