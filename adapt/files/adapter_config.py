"""adapter_config.json as strangers write it: kinds that merge into weights, and patterns of names that end in time.

peft matches its patterns against the name of every module, with Python's `re`, which has no limit of time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_MERGED = {"ADALORA", "BOFT", "HRA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "VERA"}
_LONGEST = 4096  # characters of a pattern; names of all layers in one are some hundred
_MOST_REPEATS, _MOST_GROUPS, _MOST_PATTERNS = 6, 16, 1 << 14
_MOST_RANGES = 1 << 10  # of layers, as a depth-upscaled model repeats them
_ESCAPED = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"
)  # an escaped character, or a set of them: one character of a name
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def check_adapter_config(config: Mapping[str, Any], what: str) -> None:
    """ValueError, of `what`, for a kind that does not merge, for files of elsewhere, and for patterns that may take for ever."""
    kind = str(config.get("peft_type")).upper()
    if kind not in _MERGED:
        raise ValueError(f"{what}: is of a kind that has no weights to merge (peft_type={kind[:40]}); train it as LoRA")
    if isinstance(ranges := config.get("layer_replication"), list) and len(ranges) > _MOST_RANGES:
        raise ValueError(
            f"{what}: layer_replication has {len(ranges):,} ranges, which no model has (at most {_MOST_RANGES})"
        )
    for count, (key, pattern) in enumerate(_patterns(config)):
        if count > _MOST_PATTERNS:
            raise ValueError(f"{what}: {key} has more names than a model has modules (at most {_MOST_PATTERNS:,})")
        if reason := _obstacle(pattern):
            raise ValueError(f"{what}: {key}={pattern[:60]!r}: {reason}; name the modules instead")


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, pattern) of all that peft compiles. A list of target_modules is plain names, which it does not."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield key, config[key]
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        value = config.get(key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []:
            if isinstance(pattern, str):
                yield key, pattern


def _obstacle(pattern: str) -> str | None:
    """Why a pattern is not matched; None for names, and for expressions whose steps are bounded by a power of a name's length."""
    if len(pattern) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    simple = _ESCAPED.sub("x", pattern)
    if re.search(r"\)\s*(?:[*+]|\{)", simple):
        return "repeats a group, which may take for ever"
    if len(_REPEAT.findall(simple)) > _MOST_REPEATS or simple.count("(") > _MOST_GROUPS or "(?P" in simple:
        return "is no simple expression"
    if len(re.findall(r"[^(*+}]\?", simple)) > _MOST_GROUPS:
        return "is no simple expression"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({str(error)[:60]})"
    return None
