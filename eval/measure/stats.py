"""Two arms over the same items: how far apart are they, and could that be chance?

    from adapt_eval.measure.stats import paired, summarize
    summarize([1, 0, 1, 1]).ci95, paired(base_items, adapted_items).ci95

Items are paired (the same document, scored under two arms), so every interval here is on the mean of the
differences, which is far tighter than the distance between two separate intervals.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

NUM_RESAMPLES = 9999
"""Resamples of the bootstrap and of the sign-flip test; the smallest p-value either can show is 1e-4."""
_BATCH_ELEMENTS = 4_000_000  # bounds the memory of scipy's vectorised resampling to about 32 MB

Interval = tuple[float, float] | tuple[None, None]


class Summary(NamedTuple):
    """One arm: mean, standard error of the mean, 95 % interval (None where one item says nothing)."""

    value: float
    stderr: float | None
    ci95: Interval


class Paired(NamedTuple):
    """Two arms: mean of (other - base), its 95 % interval, two-sided p-value, and the test that gave it."""

    n: int
    delta: float
    ci95: Interval
    p_value: float
    test: str


def is_binary(values: Sequence[float] | np.ndarray) -> bool:
    """True where every item is 0 or 1 (right or wrong)."""
    return bool(np.isin(np.asarray(values, dtype=float), (0.0, 1.0)).all())


def summarize(values: Sequence[float] | np.ndarray) -> Summary:
    """Mean, stderr (sample deviation / sqrt n, as lm-eval has it) and a 95 % interval of one arm's items.

    Wilson's score interval for 0/1 items, which behaves at 0 % and 100 %; Student's t otherwise.
    """
    items = _finite(values, "values")
    n, mean = len(items), float(items.mean())
    stderr = float(items.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    if is_binary(items):
        wilson = stats.binomtest(int(items.sum()), n).proportion_ci(method="wilson")
        return Summary(mean, stderr, (float(wilson.low), float(wilson.high)))
    if stderr is None:
        return Summary(mean, None, (None, None))
    half = float(stats.t.ppf(0.975, n - 1)) * stderr
    return Summary(mean, stderr, (mean - half, mean + half))


def paired(base: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray, *, seed: int = 1234) -> Paired:
    """Mean of (other - base) over the same items, with a 95 % interval and a two-sided p-value.

    0/1 items: interval of Agresti and Min (2005: the Wald interval after half an item is added to each of the four
    cells; it stays honest where no item differs), p from McNemar's exact test.
    Other items: bias-corrected bootstrap of the mean, p from flipping the signs of the differences (exact for a
    dozen items or fewer), so that interval and test are about the same number, the mean.
    """
    x, y = _finite(base, "base"), _finite(other, "other")
    if len(x) != len(y):
        raise ValueError(f"paired: {len(x)} items against {len(y)}; both arms must score the same items")
    n, diff = len(x), y - x
    delta = float(diff.mean())
    if is_binary(x) and is_binary(y):
        won, lost = int((diff > 0).sum()), int((diff < 0).sum())
        p_value = float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0
        return Paired(n, delta, _agresti_min(won, lost, n), p_value, "exact McNemar")
    if n == 1:
        return Paired(n, delta, (None, None), 1.0, "none (one item)")
    if np.ptp(diff) == 0 and delta == 0:
        return Paired(n, 0.0, (0.0, 0.0), 1.0, "none (all items equal)")
    return Paired(n, delta, bootstrap_mean(diff, seed=seed), _sign_flip(diff, seed), "sign-flip permutation")


def bootstrap_mean(items: Sequence[float] | np.ndarray, *, seed: int = 1234) -> tuple[float, float]:
    """95 % bias-corrected and accelerated bootstrap interval of the mean; the point itself where all items agree."""
    values = np.asarray(items, dtype=float)
    if np.ptp(values) == 0:  # BCa divides by the spread
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            batch=max(1, _BATCH_ELEMENTS // len(values)),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if math.isnan(low) or math.isnan(high):  # a resample as lopsided as the data leaves BCa undefined
        half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
        return float(values.mean()) - half, float(values.mean()) + half
    return low, high


def _agresti_min(won: int, lost: int, n: int) -> tuple[float, float]:
    b, c, total = lost + 0.5, won + 0.5, n + 2.0
    centre = (c - b) / total
    half = float(stats.norm.ppf(0.975)) * math.sqrt((b + c) - (c - b) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def _sign_flip(diff: np.ndarray, seed: int) -> float:
    result = stats.permutation_test(
        (diff,),
        np.mean,
        permutation_type="samples",
        n_resamples=NUM_RESAMPLES,
        batch=max(1, _BATCH_ELEMENTS // len(diff)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _finite(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    items = np.asarray(values, dtype=float)
    if items.ndim != 1 or not len(items):
        raise ValueError(f"{name}: needs one number per item and at least one item, got shape {items.shape}")
    if not np.isfinite(items).all():
        raise ValueError(f"{name}: {int((~np.isfinite(items)).sum())} of {len(items)} items are not finite numbers")
    return items
