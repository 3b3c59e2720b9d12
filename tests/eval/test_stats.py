"""Statistics of the comparison, held against closed forms, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from adapt_eval.measure.stats import bootstrap_mean, paired, summarize


def test_summary_of_right_and_wrong_is_wilson_in_closed_form():
    n, k, z = 40, 31, stats.norm.ppf(0.975)
    got = summarize([1] * k + [0] * (n - k))
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert got.value == pytest.approx(p)
    assert got.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert got.ci95 == pytest.approx((centre - half, centre + half))


def test_all_right_still_has_an_interval():
    low, high = summarize([1.0] * 20).ci95
    assert low == pytest.approx(1 - stats.norm.ppf(0.975) ** 2 / (20 + stats.norm.ppf(0.975) ** 2))
    assert high == pytest.approx(1.0)


def test_summary_of_numbers_is_students_t():
    values = np.random.default_rng(0).normal(3, 2, 25)
    got = summarize(list(values))
    assert got.ci95 == pytest.approx(stats.t.interval(0.95, 24, loc=values.mean(), scale=stats.sem(values)))


def test_one_number_has_no_interval_and_does_not_pretend_one():
    assert summarize([0.3]) == (0.3, None, (None, None))
    assert paired([0.3], [0.4]).ci95 == (None, None)


def test_p_value_of_right_and_wrong_is_exact_mcnemar():
    base = [1] * 9 + [0] * 3 + [1] * 5 + [0] * 4
    other = [0] * 9 + [1] * 3 + [1] * 5 + [0] * 4
    got = paired(base, other)
    both_tails = 2 * sum(math.comb(12, i) for i in range(4)) / 2**12
    assert got.p_value == pytest.approx(both_tails)
    assert got.delta == pytest.approx(-6 / 21)
    assert got.test == "exact McNemar"


def test_delta_interval_covers_the_truth_19_times_in_20():
    rng, truth, hits, trials, n = np.random.default_rng(1), 0.10, 0, 600, 60
    for _ in range(trials):
        u = rng.random(n)
        base = (u < 0.5).astype(float)
        other = np.where(u < 0.5, rng.random(n) < 0.9, rng.random(n) < 0.3).astype(float)  # 0.45 + 0.15 - 0.50
        low, high = paired(base, other).ci95
        hits += low <= truth <= high
    assert 0.93 <= hits / trials <= 0.98


def test_no_item_differs_gives_zero_with_a_width_that_shrinks_with_n():
    few, many = paired([1, 0] * 5, [1, 0] * 5), paired([1, 0] * 500, [1, 0] * 500)
    assert few.delta == many.delta == 0.0
    assert few.p_value == many.p_value == 1.0
    assert few.ci95[0] == pytest.approx(-stats.norm.ppf(0.975) / 12)
    assert few.ci95[1] > 50 * many.ci95[1] > 0


def test_equal_numbers_give_zero_and_p_one_without_a_warning():
    got = paired([0.1, 0.2, 0.7], [0.1, 0.2, 0.7])
    assert (got.delta, got.ci95, got.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_a_constant_shift_of_numbers_is_found():
    got = paired([0.25, 0.5, 1.5, 2.0], [1.25, 1.5, 2.5, 3.0])
    assert got.delta == 1.0
    assert got.ci95 == (1.0, 1.0)
    assert got.p_value == pytest.approx(2 / 2**4)  # only all-plus and all-minus are as extreme


def test_sign_flip_is_exact_for_few_items():
    diff = [0.5, 1.0, -0.2, 0.9, 1.7, 0.3]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    means = (signs * diff).mean(axis=1)
    expected = np.mean(np.abs(means) >= abs(np.mean(diff)) - 1e-12)
    assert paired([0.0] * 6, diff).p_value == pytest.approx(expected)


def test_bootstrap_is_seeded_and_close_to_the_t_interval_on_normal_data():
    values = np.random.default_rng(3).normal(0.5, 1.0, 400)
    got = bootstrap_mean(values, seed=7)
    assert got == bootstrap_mean(values, seed=7)
    assert got != bootstrap_mean(values, seed=8)
    assert got == pytest.approx(stats.t.interval(0.95, 399, loc=values.mean(), scale=stats.sem(values)), abs=0.01)


def test_pairing_is_tighter_than_two_separate_intervals():
    rng = np.random.default_rng(5)
    base = rng.normal(0, 10, 200)
    other = base + rng.normal(1, 0.5, 200)
    got = paired(list(base), list(other))
    assert got.ci95[0] is not None
    assert got.ci95[0] > 0.8
    assert got.p_value < 0.001
    alone = summarize(list(base)).ci95
    assert (alone[1] - alone[0]) > 10 * (got.ci95[1] - got.ci95[0])


@pytest.mark.parametrize(
    ("base", "other", "says"),
    [([1, 0], [1], "same items"), ([], [], "at least one item"), ([1.0, float("nan")], [1.0, 0.0], "not finite")],
)
def test_bad_items_are_refused_by_name(base, other, says):
    with pytest.raises(ValueError, match=says):
        paired(base, other)
