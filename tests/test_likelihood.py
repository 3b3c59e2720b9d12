"""The Monte-Carlo NELBO is the NELBO, whatever shares its batch."""

import itertools
import math

import pytest
import torch
from tiny_models import VOCABULARY

from adapt.attention.layout import Layout
from adapt.decoding import likelihood
from adapt.decoding.likelihood import nelbo
from adapt.lm import DiffusionLM
from adapt.model.forward import hidden_states
from adapt.model.head import output_head

CONTEXT, TARGET = [5, 17, 33], [80, 41, 9]


@torch.no_grad()
def _exact_nelbo(lm: DiffusionLM, context: list[int], target: list[int]) -> float:
    """The integral over t of E[1/t * sum of -log p], by every set of noised tokens.

    A set of m among n has the weight of integral t^m (1-t)^(n-m) / t dt = (m-1)! (n-m)! / n!.
    """
    n, mask, total = len(target), lm.spec.mask_token_id, 0.0
    for m in range(1, n + 1):
        for noised in itertools.combinations(range(n), m):
            tokens = torch.tensor([context + [mask if i in noised else token for i, token in enumerate(target)]])
            layout = Layout.of(lm.spec.attention, torch.ones_like(tokens), len(context))
            log_p = output_head(lm.model)(hidden_states(lm.model, tokens, layout))[0].log_softmax(-1)
            places = [len(context) + i - int(lm.spec.shift_logits) for i in noised]
            nll = -sum(float(log_p[place, target[i]]) for place, i in zip(places, noised))
            total += math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n) * nll
    return total


@pytest.mark.parametrize(
    "kind, attention, shift",
    [("llama", "prefix", True), ("llama", "bidirectional", False), ("gemma3", "prefix", False)],
)
def test_it_is_the_sum_over_all_sets_of_noised_tokens(diffusion_lm, kind, attention, shift):
    lm = diffusion_lm(kind, attention, shift)
    exact = _exact_nelbo(lm, CONTEXT, TARGET)
    estimate = nelbo(lm, [CONTEXT], [TARGET], num_samples=1500, batch_size=500)[0]
    assert 0 < estimate.stderr < 0.03 * exact
    assert abs(estimate.nats - exact) < 4 * estimate.stderr
    assert estimate.nfe == 1500
    # Over seeds, few samples are right on average too, and the stderr that they report covers their spread.
    few = nelbo(lm, [CONTEXT] * 1, [TARGET], num_samples=6, seed=0)
    seeds = torch.tensor([nelbo(lm, [CONTEXT], [TARGET], num_samples=6, seed=seed)[0].nats for seed in range(40)])
    assert abs(float(seeds.mean()) - exact) < 4 * float(seeds.std()) / 40**0.5
    assert few[0].nats == pytest.approx(float(seeds[0]))


@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_a_block_model_is_scored_block_by_block_after_the_clean_text(diffusion_lm, clean_context, shift):
    lm = diffusion_lm("llama", f"block/{clean_context}", shift)
    context, target = CONTEXT, [80, 41, 9, 7, 55, 60, 12]  # blocks of 4: the first holds one token of it, the last two
    exact, size = 0.0, 4
    for start in (0, 4, 8):
        first = max(start, len(context)) if clean_context == "causal" else start
        before, text = (context + target)[:first], (context + target)[first : start + size]
        num_context = max(len(context) - first, 0)  # of the prompt, inside the block
        n = len(text) - num_context
        for m in range(1, n + 1):
            for noised in itertools.combinations(range(num_context, len(text)), m):
                tokens = torch.tensor(
                    [before + [lm.spec.mask_token_id if i in noised else x for i, x in enumerate(text)]]
                )
                position = torch.arange(tokens.shape[1])
                ends = (position // size + 1) * size if clean_context == "block" else position + 1
                layout = Layout(
                    torch.ones_like(tokens),
                    (position >= first).long()[None],
                    position[None],
                    torch.where(position < first, ends, first)[None],
                )
                log_p = output_head(lm.model)(hidden_states(lm.model, tokens, layout))[0].log_softmax(-1)
                nll = -sum(float(log_p[first + i - int(shift), text[i]]) for i in noised)
                exact += math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n) * nll
    estimate = nelbo(lm, [context], [target], num_samples=1500, batch_size=500)[0]
    assert 0 < estimate.stderr < 0.03 * exact
    assert abs(estimate.nats - exact) < 4 * estimate.stderr


def test_a_uniform_model_gives_n_log_v(diffusion_lm, monkeypatch):
    monkeypatch.setattr(likelihood, "output_head", lambda _: lambda hidden: torch.zeros(len(hidden), VOCABULARY + 1))
    for target in ([1], [1, 2, 3], list(range(20))):
        value = nelbo(diffusion_lm("llama", "prefix"), [CONTEXT], [target], num_samples=7)[0]
        assert value.nats == pytest.approx(len(target) * math.log(VOCABULARY + 1), rel=1e-5)
        assert value.stderr == pytest.approx(0, abs=1e-4)


def test_one_token_is_exact_and_costs_one_row(diffusion_lm):
    lm = diffusion_lm("llama", "prefix", True)
    value = nelbo(lm, [CONTEXT], [[7]], num_samples=32)[0]
    assert value.nats == pytest.approx(_exact_nelbo(lm, CONTEXT, [7]), rel=1e-5)
    assert (value.stderr, value.nfe) == (0, 1)
    assert math.isnan(nelbo(lm, [CONTEXT], [[7, 8]], num_samples=1)[0].stderr)  # unknown, not none


@pytest.mark.parametrize("attention, shift", [("prefix", True), ("bidirectional", False)])
def test_neither_company_nor_batch_size_nor_order_changes_a_value(diffusion_lm, attention, shift):
    lm = diffusion_lm("llama", attention, shift)
    contexts, targets = [CONTEXT, [], [1] * 12, CONTEXT], [TARGET, [4, 5], [6], [9, 8, 7, 6, 5]]
    together = nelbo(lm, contexts, targets, num_samples=5, batch_size=3)
    alone = [nelbo(lm, [c], [t], num_samples=5)[0] for c, t in zip(contexts, targets)]
    turned = nelbo(lm, contexts[::-1], targets[::-1], num_samples=5, batch_size=100)[::-1]
    for others in (alone, turned):
        for value, other in zip(together, others):
            assert value.nats == pytest.approx(other.nats, rel=1e-5)
            assert value.stderr == pytest.approx(other.stderr, rel=1e-4)
    assert nelbo(lm, [CONTEXT], [TARGET], num_samples=5, seed=1)[0] != alone[0]


def test_an_empty_target_or_no_sample_is_refused(diffusion_lm):
    lm = diffusion_lm("llama", "prefix")
    with pytest.raises(ValueError, match="request 1 has an empty target"):
        nelbo(lm, [[1], [1]], [[2], []])
    with pytest.raises(ValueError, match="mc_samples=0: must be at least 1"):
        nelbo(lm, [[1]], [[2]], num_samples=0)
