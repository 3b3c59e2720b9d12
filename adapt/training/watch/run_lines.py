"""The metrics.jsonl of runs, read back: what they report, as curves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.user_text import user_text
from ...settings.bounds import shown

X = {
    "clean_tokens": ("clean_tokens_seen", "clean tokens seen"),
    "step": ("step", "optimizer steps"),
    "time": ("elapsed_s", "training time"),
    "tokens": ("tokens_seen", "positions computed, padding and noisy copies included"),
}
UNITS = {
    **dict.fromkeys(("loss", "nelbo", "noised_nll", "ar_nll", "distill_kl", "eval_nelbo", "eval_ar_nll"), "nats/token"),
    **dict.fromkeys(("tokens_per_s", "useful_tokens_per_s", "clean_tokens_per_s"), "tokens/s"),
    "elapsed_s": "s",
    "grad_norm": "L2",
    "peak_memory_gb": "GB",
}


_NUMBERS = {*UNITS, *(key for key, _ in X.values())}
_LARGEST = 1e300  # a whole number of JSON may be too large for a float


class NoLineYet(ValueError):
    """A run that has begun and has not logged."""


@dataclass(frozen=True)
class Run:
    """A label, and the lines of a metrics.jsonl."""

    label: str
    path: Path
    lines: list[dict[str, Any]]

    @property
    def keys(self) -> set[str]:
        """Keys that hold a number in some line."""
        return {key for line in self.lines for key, value in line.items() if _is_number(value)}

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """(x, y) of the lines that have both; NaN is kept, as a gap."""
        points = [(line[x], line[y]) for line in self.lines if _is_number(line.get(x)) and _is_number(line.get(y))]
        return [float(point[0]) for point in points], [float(point[1]) for point in points]


def read_runs(arguments: list[str]) -> list[Run]:
    """The runs that were asked for; those with one label get more of their path. ValueError for what is no run."""
    named: list[tuple[str | None, Path]] = []
    for argument in arguments:
        label, equals, path = argument.partition("=")
        named.append((label, Path(path)) if equals and not Path(argument).exists() else (None, Path(argument)))
    runs = [(label, *_read(path)) for label, path in named]
    labels = [label or path.parent.resolve().name for label, path, _ in runs]
    if len(set(labels)) < len(labels):  # runs/a/out and runs/b/out
        labels = [label or str(path.parent) for label, path, _ in runs]
    return [Run(label, path, lines) for label, (_, path, lines) in zip(labels, runs, strict=True)]


def _read(path: Path) -> tuple[Path, list[dict]]:
    file = path / "metrics.jsonl" if path.is_dir() else path
    if path.is_dir() and (path / "config.yaml").is_file() and not file.is_file():
        raise NoLineYet(f"RUN={path}: holds no line yet; wait for the run's first log")
    if not file.exists() or (path.is_dir() and not file.is_file()):
        what = "holds no metrics.jsonl" if path.is_dir() else "no such file or folder"
        raise ValueError(f"RUN={path}: {what}; give a run's folder (training.output_dir) or its metrics.jsonl")
    texts = user_text(file, "RUN", "the metrics.jsonl that a run wrote").splitlines()
    lines: list[dict] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (RecursionError, ValueError) as error:
            if number == len(texts):
                break  # a run that is going on, or was killed, as it wrote it
            reason = getattr(error, "msg", None) or "nested too deeply, or a number of thousands of digits"
            raise ValueError(f"RUN={file}: line {number} is no JSON ({reason}); is it a metrics.jsonl?") from error
        if not isinstance(line, dict):
            raise ValueError(f"RUN={file}: line {number} is no JSON object; is it a metrics.jsonl?")
        for key in _NUMBERS & line.keys():
            if not _is_number(line[key]):
                raise ValueError(
                    f"RUN={file}: line {number}: {key}={shown(line[key])} is no number; is it a metrics.jsonl?"
                )
        lines.append(line)
    if not lines:
        raise NoLineYet(f"RUN={file}: holds no line yet; wait for the run's first log")
    if not any("step" in line for line in lines):
        raise ValueError(f"RUN={file}: has no step in any line; give the metrics.jsonl that a run wrote")
    return file, lines


def smoothed(values: list[float], weight: float) -> list[float]:
    """The debiased exponential mean, as TensorBoard's: each value counts `weight` times the one after it. NaN stays, uncounted."""
    means: list[float] = []
    total = norm = 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm if math.isfinite(value) else math.nan)
    return means


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (not isinstance(value, int) or abs(value) < _LARGEST)
    )
