"""Rows that waste little, hold every example once an epoch, and are the same in whatever order they are asked for."""

from collections import Counter

import numpy as np
import pytest

from adapt.training.data.packing import BUFFER, Packing


def _sizes(count: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high + 1, count)


@pytest.mark.parametrize("count", [1, 50, BUFFER + 100])
def test_every_example_stands_in_one_row_of_each_epoch(count: int) -> None:
    packing = Packing(lambda epoch: _sizes(count, 5, 40), 64, seed=3)
    places = [place for k in range(packing.num_rows(2)) for place in packing.row(k)]
    assert Counter((place.example, place.epoch) for place in places) == Counter(
        (example, epoch) for example in range(count) for epoch in (0, 1)
    )


def test_no_row_is_over_seq_len_and_rows_of_mixed_lengths_are_over_95_percent_full() -> None:
    sizes = _sizes(4000, 64, 512)
    packing = Packing(lambda epoch: sizes, 1024, seed=0)
    filled = [sum(sizes[place.example] for place in packing.row(k)) for k in range(packing.num_rows(1))]
    assert max(filled) <= 1024
    assert sum(filled) == sizes.sum()
    assert np.mean(filled) / 1024 > 0.95


def test_a_row_does_not_depend_on_the_order_of_access() -> None:
    sizes = _sizes(300, 5, 40)
    forwards, backwards = Packing(lambda epoch: sizes, 64, seed=1), Packing(lambda epoch: sizes, 64, seed=1)
    last = forwards.num_rows(3) - 1
    want = [forwards.row(k) for k in range(last + 1)]
    assert [backwards.row(k) for k in range(last, -1, -1)] == want[::-1]


def test_ordinals_count_the_examples_in_the_order_of_the_rows() -> None:
    packing = Packing(lambda epoch: _sizes(BUFFER + 500, 5, 40), 64, seed=1)
    ordinals = [place.ordinal for k in range(packing.num_rows(2)) for place in packing.row(k)]
    assert ordinals == list(range(2 * (BUFFER + 500)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sizes = _sizes(200, 5, 40)
    packing, other = Packing(lambda epoch: sizes, 64, seed=1), Packing(lambda epoch: sizes, 64, seed=2)
    per_epoch = packing.num_rows(1)
    packing.num_rows(2)

    def members(of: Packing, rows: range) -> list[tuple[int, ...]]:
        return [tuple(place.example for place in of.row(k)) for k in rows]

    first = members(packing, range(per_epoch))
    assert first != members(packing, range(per_epoch, 2 * per_epoch))
    assert first != members(other, range(per_epoch))


def test_rows_come_in_shuffled_order_and_not_by_size() -> None:
    sizes = np.sort(_sizes(1000, 5, 64))
    packing = Packing(lambda epoch: sizes, 64, seed=0)
    largest = [max(sizes[place.example] for place in packing.row(k)) for k in range(packing.num_rows(1))]
    assert abs(np.corrcoef(np.arange(len(largest)), largest)[0, 1]) < 0.25


def test_fractional_epochs_count_a_part_of_the_next_one() -> None:
    packing = Packing(lambda epoch: _sizes(200, 5, 40), 64, seed=1)
    one, two = packing.num_rows(1), packing.num_rows(2)
    packing.row(two + 1)  # a third epoch is there by now, and must not be counted
    assert packing.num_rows(1) == one
    assert packing.num_rows(1.5) == one + (two - one) // 2
    assert packing.num_rows(0.25) == one // 4


def test_each_epoch_is_packed_by_its_own_sizes() -> None:
    packing = Packing(lambda epoch: np.full(10, (30, 60)[epoch]), 64, seed=0)
    assert [packing.num_rows(epochs) for epochs in (1, 2)] == [5, 15]
