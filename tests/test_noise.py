"""The forward process: schedules, their weights, and times that are spread evenly over the order of the run."""

import math

import numpy as np
import pytest
import torch

from adapt.noise.absorbing import SCHEDULES, alpha, alpha_prime, complement_weight, elbo_weight, q_sample, sample_t
from adapt.noise.keyed import generator_for

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@schedules
def test_nothing_is_noised_at_0_and_everything_at_1(schedule: str) -> None:
    ends = alpha(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule)
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))


@schedules
def test_alpha_prime_is_the_derivative_of_alpha(schedule: str) -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha(t, schedule).sum(), t)
    torch.testing.assert_close(alpha_prime(t, schedule), slope)


@pytest.mark.parametrize("function", [alpha, alpha_prime, elbo_weight, complement_weight])
def test_a_schedule_that_is_not_there_is_refused(function) -> None:
    with pytest.raises(ValueError, match="schedule=polynomial: choose one of cosine, linear"):
        function(torch.tensor([0.5]), "polynomial")


def test_elbo_weights_have_their_closed_forms() -> None:
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(elbo_weight(t, "linear"), 1 / t)
    torch.testing.assert_close(elbo_weight(t, "cosine"), math.pi / 2 / torch.tan(math.pi / 4 * t))


@schedules
def test_complement_weight_is_the_elbo_weight_of_what_was_kept(schedule: str) -> None:
    # Both are dm / m for their own mask ratio m; the complement's grows as the first one's falls.
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.log(alpha(t, schedule)).sum(), t)
    torch.testing.assert_close(complement_weight(t, schedule), -slope)


@schedules
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_share_of_noised_tokens_is_one_minus_alpha(schedule: str, t: float) -> None:
    x0, n = torch.arange(100_000), 100_000
    time = torch.tensor(t)
    xt, is_noised = q_sample(
        x0, time, torch.ones(n, dtype=torch.bool), mask_token_id=-7, schedule=schedule, generator=generator_for(1)
    )
    expected = float(1 - alpha(time, schedule))
    assert abs(float(is_noised.float().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert torch.equal(xt, torch.where(is_noised, -7, x0))


def test_only_the_loss_mask_is_noised() -> None:
    loss_mask = torch.arange(1000) % 3 == 0
    xt, is_noised = q_sample(torch.arange(1000), torch.tensor(1.0), loss_mask, mask_token_id=-7)
    assert torch.equal(is_noised, loss_mask)
    assert torch.equal(xt[~loss_mask], torch.arange(1000)[~loss_mask])


@pytest.mark.parametrize("n", [8, 32, 256])
def test_any_window_of_the_run_has_stratified_times(n: int) -> None:
    starts = [0, 1, 7, 1000, 123_457, 10**9]
    for start in starts:
        t = sample_t(torch.arange(start, start + n), offset=0.3, t_min=1e-9).double().sort().values.numpy()
        gaps = np.diff(np.concatenate([t[-1:] - 1, t]))
        assert gaps.max() < 2.7 / n, f"a hole at {start}"  # n independent draws leave one of about log(n) / n
        steps = np.arange(n + 1) / n
        star_discrepancy = max(np.abs(steps[1:] - t).max(), np.abs(steps[:-1] - t).max())
        assert star_discrepancy < 2.7 / n  # independent draws: about 0.9 / sqrt(n)


def test_times_lie_between_t_min_and_1() -> None:
    t = sample_t(torch.arange(100_000), offset=0.7, t_min=0.05)
    assert float(t.min()) >= 0.05
    assert float(t.max()) <= 1
    assert float(t.min()) < 0.0501


def test_keys_that_differ_give_unrelated_noise_and_equal_keys_the_same() -> None:
    draws = {
        key: float(torch.rand((), generator=generator_for(*key)))
        for key in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, -1), (0, -2)]
    }
    assert len(set(draws.values())) == len(draws)
    assert all(float(torch.rand((), generator=generator_for(*key))) == draw for key, draw in draws.items())
    along = torch.stack([torch.rand((), generator=generator_for(0, i, 0, 0)) for i in range(2000)])
    assert abs(float(along.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 2000)
    assert abs(float(torch.corrcoef(torch.stack([along[:-1], along[1:]]))[0, 1])) < 4 / math.sqrt(2000)


def test_a_band_of_mask_ratios_holds_every_block_of_every_example() -> None:
    t = sample_t(torch.arange(500)[:, None], blocks=torch.arange(7), offset=0.3, t_min=0.3, t_max=0.8)
    assert t.shape == (500, 7)
    assert 0.3 <= float(t.min()) < 0.301
    assert 0.799 < float(t.max()) <= 0.8
    for block in range(7):
        shares = torch.histc(t[:, block], bins=10, min=0.3, max=0.8)
        assert (shares - 50).abs().max() <= 2
