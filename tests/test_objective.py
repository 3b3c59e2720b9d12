"""The loss: a bound whose figure is known for simple models, whatever the schedule, and the formulas of the papers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from adapt import objective
from adapt.noise.absorbing import SCHEDULES, elbo_weight, q_sample, sample_t
from adapt.noise.keyed import generator_for
from adapt.objective import cross_entropy, diffusion_loss, token_nll, weighted_loss
from adapt.spec import DiffusionSpec
from adapt.training.data.packing import Place
from adapt.training.data.views import Canvases
from adapt.training.sections import NoiseConfig, ObjectiveConfig

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
    length, draws = 4, 3000
    table = torch.Generator().manual_seed(3)
    nll_of = {
        noised: torch.empty(length).exponential_(generator=table) * (1 + 3 * noised[0])
        for noised in itertools.product((0, 1), repeat=length)
    }
    recipe = ObjectiveConfig(views=2, complementary=complementary)
    spec = DiffusionSpec(attention="prefix", mask_token_id=MASK)
    canvases = Canvases(spec, NoiseConfig(schedule=schedule, t_min=1e-4), recipe, None, "prompt", 1, seed=5)
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
        assert stderr < 0.04 * exact


def _hidden_and_head(rows: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(0)
    return torch.randn(rows, 16, requires_grad=True), torch.randint(30, (rows,)), torch.nn.Linear(16, 30)


def _capped(logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / 3) * 3


def _gradients(hidden, targets, linear, weights, path) -> tuple[torch.Tensor, ...]:
    loss, nats = path(hidden, linear, targets, weights)
    return loss, nats, *torch.autograd.grad(3 * loss, [hidden, *linear.parameters()])


@pytest.mark.parametrize("per_chunk", [1, 5, 36, 37])
@pytest.mark.parametrize("scattered", [False, True])
def test_chunks_of_the_head_change_neither_value_nor_gradient(monkeypatch, per_chunk: int, scattered: bool) -> None:
    hidden, targets, linear = _hidden_and_head()
    weights = torch.rand(len(hidden))

    def whole(hidden, linear, targets, weights):
        nats = F.cross_entropy(_capped(linear(hidden)), targets, reduction="none")
        return (nats * weights).sum(), nats.detach()

    def ours(hidden, linear, targets, weights):
        chunks = -(-len(hidden) // per_chunk)
        return weighted_loss(hidden, linear, _capped, cross_entropy, (targets,), weights, chunks)

    monkeypatch.setattr("adapt.objective.CHUNK_LOGITS", 30 * per_chunk)
    monkeypatch.setitem(objective.SLICE_LOGITS, "cpu", 30 * 3)
    want = _gradients(hidden, targets, linear, weights, whole)
    if scattered:  # as DeepSpeed marks a parameter under ZeRO-3: the head is recomputed in the backward pass
        linear.weight.ds_id = 0
    torch.testing.assert_close(_gradients(hidden, targets, linear, weights, ours), want)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_get_theirs() -> None:
    hidden, targets, linear = _hidden_and_head()
    linear.requires_grad_(False)
    loss, _ = weighted_loss(hidden, linear, _capped, cross_entropy, (targets,), torch.ones(len(hidden)), 1)
    loss.backward()
    assert linear.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_chunks_keep_no_logits_for_the_backward_pass(monkeypatch) -> None:
    linear, rows = torch.nn.Linear(16, 500), 64
    monkeypatch.setattr("adapt.objective.CHUNK_LOGITS", 8 * 500)
    hidden = torch.randn(rows, 16, requires_grad=True)
    arguments = (hidden, linear, _capped, cross_entropy, (torch.zeros(rows).long(),), torch.ones(rows), 8)
    loss, _ = weighted_loss(*arguments)
    kept = sum(x.numel() for x in loss.grad_fn.gradients)
    assert kept == hidden.numel() + sum(parameter.numel() for parameter in linear.parameters())

    linear.weight.ds_id, sizes = 0, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        weighted_loss(*arguments)
    assert max(sizes) < rows * 500 / 4


def test_no_noised_token_gives_a_zero_loss_with_a_gradient() -> None:
    hidden, targets, linear = _hidden_and_head()
    loss, nats = weighted_loss(hidden[:0], linear, _capped, cross_entropy, (targets[:0],), torch.ones(0), 1)
    loss.backward()  # every rank has to take part in the backward pass
    assert (float(loss.detach()), len(nats), float(linear.weight.grad.abs().sum())) == (0.0, 0, 0.0)


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
