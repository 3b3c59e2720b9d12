"""The loss: a bound whose figure is known for simple models, whatever the schedule, and the formulas of the papers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from adapt.checkpoint import DiffusionSpec
from adapt.collate import Canvases
from adapt.config import NoiseConfig, ObjectiveConfig
from adapt.noise import SCHEDULES, elbo_weight, generator_for, q_sample, sample_t
from adapt.objective import diffusion_loss, token_nll
from adapt.packing import Place

MASK = 9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nelbo_of_a_uniform_model_is_log_v(schedule: str) -> None:
    num_rows, length, vocab_size = 20_000, 64, 10
    t = sample_t(torch.arange(num_rows), t_min=1e-5)[:, None]
    x0, everywhere = torch.zeros(num_rows, length, dtype=torch.long), torch.ones(num_rows, length, dtype=torch.bool)
    _, is_noised = q_sample(x0, t, everywhere, mask_token_id=MASK, schedule=schedule, generator=generator_for(0))
    nll = token_nll(torch.randn(int(is_noised.sum()), 8), x0[is_noised], lambda h: torch.zeros(len(h), vocab_size))
    weights = elbo_weight(t, schedule).expand_as(x0)[is_noised]
    loss_sum, num_tokens, _ = diffusion_loss(nll, weights, everywhere.sum())
    assert float(loss_sum / num_tokens) == pytest.approx(math.log(vocab_size), rel=0.01)


def _exact_nelbo(nll_of: dict[tuple[int, ...], torch.Tensor], length: int) -> float:
    """Sum over all masks M of  integral dm/m m^|M| (1-m)^(L-|M|)  *  sum over M of -log p(x0_i | xt)."""
    total = 0.0
    for noised, nll in nll_of.items():
        k = sum(noised)
        if k:
            measure = math.factorial(k - 1) * math.factorial(length - k) / math.factorial(length)
            total += measure * float(nll[torch.tensor(noised).bool()].sum())
    return total


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_is_unbiased_against_all_masks(schedule: str, complementary: bool) -> None:
    length, draws = 4, 6000
    table = torch.Generator().manual_seed(3)
    nll_of = {
        noised: torch.empty(length).exponential_(generator=table) * (1 + 3 * noised[0])
        for noised in itertools.product((0, 1), repeat=length)
    }
    objective = ObjectiveConfig(views=2, complementary=complementary)
    spec = DiffusionSpec(attention="prefix", mask_token_id=MASK)
    canvases = Canvases(spec, NoiseConfig(schedule=schedule, t_min=1e-4), objective, None, "prompt", 1, seed=5)
    estimates = []
    for ordinal in range(draws):
        example = canvases.tokens([3, 4], [5, 6, 7, 8], Place(ordinal, 0, ordinal))
        views = []
        for view in (1, 2):
            is_noised = example["is_noised"][example["view"] == view]
            nll = nll_of[tuple(int(i) for i in is_noised)][is_noised]
            weight = example["elbo_weight"][example["view"] == view][is_noised]
            views.append(diffusion_loss(nll, weight, torch.tensor(length))[0])
        estimates.append(torch.stack(views))
    estimates = torch.stack(estimates)
    exact = _exact_nelbo(nll_of, length)
    for view in (0, 1):
        mean, stderr = float(estimates[:, view].mean()), float(estimates[:, view].std()) / math.sqrt(draws)
        assert abs(mean - exact) < 4 * stderr
        assert stderr < 0.03 * exact


def _hidden_and_head(rows: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(0)
    return torch.randn(rows, 16, requires_grad=True), torch.randint(30, (rows,)), torch.nn.Linear(16, 30)


@pytest.mark.parametrize("chunk", [1, 5, 36])
def test_chunks_of_the_head_change_neither_value_nor_gradient(chunk: int) -> None:
    hidden, targets, head = _hidden_and_head()
    found = []
    for size in (len(hidden), chunk):
        nll = token_nll(hidden, targets, head, num_chunks=-(-len(hidden) // size))
        found.append((nll, *torch.autograd.grad(nll.square().sum(), [hidden, head.weight, head.bias])))
    torch.testing.assert_close(found[0], found[1])


def test_chunks_keep_no_logits_for_the_backward_pass() -> None:
    head, kept = torch.nn.Linear(16, 500), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        token_nll(torch.randn(64, 16, requires_grad=True), torch.zeros(64, dtype=torch.long), head, num_chunks=8)
    assert sum(kept) < 64 * 500 / 2


def test_no_noised_token_gives_a_zero_loss_with_a_gradient() -> None:
    hidden, targets, head = _hidden_and_head()
    loss_sum, num_tokens, metrics = diffusion_loss(
        token_nll(hidden[:0], targets[:0], head), torch.zeros(0), torch.tensor(7)
    )
    loss_sum.backward()  # every rank has to take part in the backward pass
    assert (float(loss_sum.detach()), int(num_tokens), int(metrics["num_noised"])) == (0.0, 7, 0)


def test_loss_is_that_of_the_llada_guideline() -> None:
    # LLaDA, arXiv:2502.09992, appendix: noise each token with p_mask = (1 - eps) t + eps; sum of CE / p_mask over B * L.
    torch.manual_seed(0)
    batch, length, vocab_size, eps = 6, 20, 30, 1e-3
    x0 = torch.randint(vocab_size, (batch, length))
    p_mask = ((1 - eps) * torch.rand(batch) + eps)[:, None].expand(batch, length)
    masked = torch.rand(batch, length) < p_mask
    logits = torch.randn(batch, length, vocab_size)
    theirs = (F.cross_entropy(logits[masked], x0[masked], reduction="none") / p_mask[masked]).sum() / (batch * length)

    ours, num_tokens, metrics = diffusion_loss(
        token_nll(logits[masked], x0[masked], lambda rows: rows),
        elbo_weight(p_mask)[masked],  # linear schedule: t is the mask ratio
        torch.tensor(x0.numel()),
    )
    torch.testing.assert_close(ours / num_tokens, theirs)
    assert int(metrics["num_noised"]) == int(masked.sum())


def test_uniform_weight_is_the_mean_over_noised_tokens() -> None:
    nll, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10.0, 1.0, 1.0])
    loss_sum, num_tokens, metrics = diffusion_loss(nll, weights, torch.tensor(12), weight="uniform")
    assert float(loss_sum / num_tokens) == 3
    assert float(metrics["nelbo_sum"]) == 18
