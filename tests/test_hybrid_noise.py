"""Uniform and hybrid noise against what we did not derive: Bayes' rule on every state of a tiny vocabulary, closed forms, MDLM."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from adapt.noise.absorbing import elbo_weight, q_sample
from adapt.noise.hybrid import KINDS, T_MAX, T_MIN, corrupt, hybrid_elbo, hybrid_loss
from adapt.noise.keyed import generator_for
from adapt.objective import token_nll

V, MASK = 4, 1  # ids 0, 2, 3 are tokens; the mask sits between them and column 4 of the logits is padding
TOKENS = [v for v in range(V) if v != MASK]
P_UNIFORM = 0.3
OPTIONS: dict[str, Any] = {"vocab_size": V, "mask_token_id": MASK, "p_uniform": P_UNIFORM}

kinds = pytest.mark.parametrize("kind", KINDS)


def _forward(t: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_t, beta_t pi_t [..., V]) as the paper writes them: log-SNR form of c_t, share B/N for each token."""
    t = np.asarray(t, dtype=np.float64)[..., None]
    u, m = (np.arange(V) != MASK) / len(TOKENS), (np.arange(V) == MASK).astype(float)
    if kind == "uniform":
        return (1 - t)[..., 0], t * u
    if kind == "absorbing":
        return (1 - t)[..., 0], t * m
    c = 2 * P_UNIFORM / (1 - P_UNIFORM) * np.sqrt(t) * np.sqrt(1 - t)
    return ((1 - t) / (1 + c))[..., 0], (c * u + t * m) / (1 + c)


def _marginal(p: np.ndarray, t: np.ndarray, kind: str) -> np.ndarray:
    alpha, noise = _forward(t, kind)
    return alpha[..., None] * p + noise


def _denoiser(length: int, seed: int = 0) -> torch.Tensor:
    """An arbitrary table: logits [V] * length + [length, V + 1] for each noised sequence."""
    return 1.5 * torch.randn(*[V] * length, length, V + 1, generator=torch.Generator().manual_seed(seed)).double()


def _table_probabilities(table: torch.Tensor) -> np.ndarray:
    allowed = table[..., :V].clone()
    allowed[..., MASK] = -math.inf
    return allowed.softmax(-1).numpy()


def _continuous_bound(table: torch.Tensor, x0: tuple[int, ...], kind: str, nodes: int = 400) -> float:
    """Our integrand over every xt, weighed exactly, and over t = sin^2(pi u / 2) by Gauss-Legendre quadrature in u."""
    length = len(x0)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    u = (points + 1) / 2
    t = np.sin(np.pi / 2 * u) ** 2
    weights = weights / 2 * np.pi / 2 * np.sin(np.pi * u)
    q = [_marginal(np.eye(V)[x], t, kind) for x in x0]
    total = 0.0
    for xt in itertools.product(range(V), repeat=length):
        chance = np.prod([q[i][:, z] for i, z in enumerate(xt)], axis=0)
        if not chance.any():
            continue
        for i in range(length):
            rows = table[xt][i].expand(nodes, -1)
            x, z = torch.full((nodes,), x0[i]), torch.full((nodes,), xt[i])
            nats = hybrid_elbo(rows, x, z, torch.from_numpy(t), kind=kind, **OPTIONS).numpy()
            total += float((weights * chance * nats).sum())
    return total


def _discrete_process(table: torch.Tensor, x0: tuple[int, ...], kind: str, steps: int) -> tuple[float, float]:
    """(-log p(x0), discrete-time NELBO) of the reverse process of `steps` steps, both exact, by Bayes' rule on all states."""
    length = len(x0)
    states = list(itertools.product(range(V), repeat=length))
    probabilities = _table_probabilities(table)
    p_x = np.stack([probabilities[state] for state in states])  # [S, L, V]
    z = np.array(states)  # [S, L]
    grid = np.sin(np.pi / 2 * np.arange(steps + 1) / steps) ** 2
    pick = np.arange(length)
    prior = _forward(np.array(1.0), kind)[1]
    current = np.prod(prior[z], axis=1)
    nelbo = 0.0
    one_hot = np.eye(V)[list(x0)]
    for s, t in zip(grid[-2::-1], grid[:0:-1], strict=True):
        (alpha_s, noise_s), (alpha_t, noise_t) = _forward(s, kind), _forward(t, kind)
        step = alpha_t / alpha_s * np.eye(V) + (noise_t - alpha_t / alpha_s * noise_s)  # q(z_t | z_s) [from, to]
        towards = np.moveaxis(step[:, z], 0, -1)  # [S, L, V of z_s]
        with np.errstate(divide="ignore", invalid="ignore"):
            model = towards * _marginal(p_x, s, kind)
            model /= model.sum(-1, keepdims=True)
            true = towards * _marginal(one_hot, s, kind)
            true /= true.sum(-1, keepdims=True)
            gap = np.where(true > 0, true * np.log(true / model), 0.0).sum((1, 2))
        chance = np.prod(_marginal(one_hot, t, kind)[pick, z], axis=1)
        nelbo += float((chance * np.where(chance > 0, gap, 0.0)).sum())
        joint = np.nan_to_num(model[:, 0])
        for i in range(1, length):
            joint = (joint[:, :, None] * np.nan_to_num(model[:, i])[:, None, :]).reshape(len(states), -1)
        current = current @ joint
    return -math.log(current[states.index(x0)]), nelbo


@pytest.mark.parametrize(("kind", "x0"), [(k, x) for k in KINDS for x in [(2,), (3, 0)]])
def test_bound_is_the_limit_of_the_discrete_time_bound_and_above_the_nll(kind: str, x0: tuple[int, ...]) -> None:
    table = _denoiser(len(x0))
    ours = _continuous_bound(table, x0, kind)
    gaps = []
    for steps in (50, 200, 800):
        nll, discrete = _discrete_process(table, x0, kind, steps)
        assert nll < discrete + 1e-9  # one token under absorbing noise: the bound is tight
        assert nll < ours + 1e-6
        gaps.append(discrete - ours)
    assert abs(gaps[2]) < 1e-3 * ours
    assert abs(gaps[1]) < 0.3 * abs(gaps[0]) + 1e-6
    assert abs(gaps[2]) < 0.3 * abs(gaps[1]) + 1e-6


@kinds
def test_bound_of_the_exact_prediction_is_the_entropy(kind: str) -> None:
    p = np.array([0.6, 0.0, 0.1, 0.3])  # one token: what the other tokens say of it is its marginal distribution
    table = torch.from_numpy(np.log(p + 1e-300)).expand(V, 1, V).clone()
    bound = sum(p[x] * _continuous_bound(table, (x,), kind) for x in TOKENS)
    assert bound == pytest.approx(-float((p[TOKENS] * np.log(p[TOKENS])).sum()), rel=1e-5)
    assert sum(p[x] * _continuous_bound(table + 0.1 * _denoiser(1)[..., :V], (x,), kind) for x in TOKENS) > bound


@pytest.mark.parametrize(("kind", "p_uniform", "atol"), [("absorbing", 0.0, 0.0), ("hybrid", 1e-8, 1e-4)])
def test_without_uniform_noise_it_is_the_masked_diffusion_loss(kind: str, p_uniform: float, atol: float) -> None:
    torch.manual_seed(0)
    n, vocab_size = 400, 50
    x0, t = torch.randint(vocab_size - 1, (n,)), torch.rand(n) * 0.998 + 1e-3
    everywhere = torch.ones(n, dtype=torch.bool)
    xt, is_noised = q_sample(x0, t, everywhere, mask_token_id=49, generator=generator_for(0))
    logits = torch.randn(n, vocab_size)
    without_mask = logits.clone()
    without_mask[:, 49] = -math.inf
    theirs = torch.zeros(n)
    theirs[is_noised] = elbo_weight(t[is_noised]) * token_nll(without_mask[is_noised], x0[is_noised], lambda rows: rows)
    ours = hybrid_elbo(logits, x0, xt, t, kind=kind, vocab_size=50, mask_token_id=49, p_uniform=p_uniform)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


def test_absorbing_corruption_is_q_sample() -> None:
    x0, t = torch.arange(1000) % 9, torch.rand(1000)
    loss_mask = torch.arange(1000) % 3 > 0
    theirs, _ = q_sample(x0, t, loss_mask, mask_token_id=9, generator=generator_for(4))
    options: dict[str, Any] = {"kind": "absorbing", "vocab_size": 10, "mask_token_id": 9}
    assert torch.equal(corrupt(x0, t, loss_mask, generator=generator_for(4), **options), theirs)


@kinds
@pytest.mark.parametrize("mask_token_id", [MASK, V + 3])
def test_counts_of_noised_tokens_follow_the_marginal(kind: str, mask_token_id: int) -> None:
    n, times = 60_000, np.array([0.1, 0.5, 0.93])
    x0 = torch.full((3 * n,), 2)
    t = torch.from_numpy(times).float().repeat_interleave(n)
    options = OPTIONS | {"mask_token_id": mask_token_id}
    xt = corrupt(x0, t, torch.ones(3 * n, dtype=torch.bool), kind=kind, generator=generator_for(1), **options).view(
        3, n
    )
    tokens = [v for v in range(V) if v != mask_token_id]
    for row, time in zip(xt, times, strict=True):
        alpha, noise = _forward(time, kind)
        uniform = noise[0] * len(TOKENS)
        expected = {v: n * (alpha * (v == 2) + uniform / len(tokens)) for v in tokens}
        expected |= {mask_token_id: n * noise[MASK]}
        assert set(row.tolist()) == {v for v, share in expected.items() if share > 0}
        found, wanted = zip(
            *[(int((row == v).sum()), share) for v, share in expected.items() if share > 0], strict=True
        )
        assert stats.chisquare(found, wanted).pvalue > 1e-3


@kinds
def test_only_the_loss_mask_is_noised_and_a_block_has_its_own_time(kind: str) -> None:
    x0, loss_mask = torch.full((4000,), 3), torch.arange(4000) % 2 == 0
    t = torch.where(torch.arange(4000) < 2000, T_MIN, T_MAX)
    xt = corrupt(x0, t, loss_mask, kind=kind, generator=generator_for(2), **OPTIONS)
    assert torch.equal(xt[~loss_mask], x0[~loss_mask])
    assert int((xt[:2000] != 3).sum()) < 20
    assert int((xt[2000:] != 3).sum()) > 600


@kinds
@pytest.mark.parametrize("weight", ["elbo", "uniform"])
def test_gradients_are_those_of_finite_differences(kind: str, weight: str) -> None:
    x0, xt = torch.tensor([0, 2, 3, 0]), torch.tensor([MASK, 2, 0, 3])
    t = torch.tensor([0.3, 0.7, 0.05, 0.9]).double()
    logits = torch.randn(4, V + 1, dtype=torch.float64, generator=generator_for(0)).requires_grad_()
    for output in (0, 1):
        assert torch.autograd.gradcheck(
            lambda x, i=output: hybrid_loss(x, x0, xt, t, kind=kind, weight=weight, **OPTIONS)[i], logits
        )


@pytest.mark.parametrize(
    ("kind", "p_uniform"), [("absorbing", 0.1), ("uniform", 0.1), ("hybrid", 1e-6), ("hybrid", 0.1), ("hybrid", 0.99)]
)
@pytest.mark.parametrize("weight", ["elbo", "uniform"])
def test_float32_agrees_with_float64_and_its_gradients_are_finite_at_both_ends(
    kind: str, weight: str, p_uniform: float
) -> None:
    vocab_size, mask_token_id = 30_000, 29_999
    times = [T_MIN, 1e-4, 0.01, 0.5, 0.99, 1 - 2**-13, 1.0]
    cases = list(
        itertools.product(times, (0.1, 5.0, 100.0), ("mask", "clean", "noise", "noise with all the probability"))
    )
    t = torch.tensor([case[0] for case in cases])
    logits = (
        torch.randn(len(cases), vocab_size, generator=generator_for(7)) * torch.tensor([c[1] for c in cases])[:, None]
    )
    x0 = torch.arange(len(cases))
    likely = logits[:, : vocab_size - 1].argmax(-1)
    choice = {"mask": torch.full_like(x0, mask_token_id), "clean": x0, "noise": x0 + 500}
    xt = torch.stack([choice.get(case[2], likely)[i] for i, case in enumerate(cases)])
    options: dict[str, Any] = {"kind": kind, "vocab_size": vocab_size, "mask_token_id": mask_token_id}
    found = []
    for dtype in (torch.float32, torch.float64):
        rows = logits.to(dtype).requires_grad_()
        loss, elbo = hybrid_loss(rows, x0, xt, t, p_uniform=p_uniform, weight=weight, **options)
        (grad,) = torch.autograd.grad(loss.sum(), rows)
        assert bool(torch.isfinite(grad).all())
        assert float(elbo.detach().min()) > -1e-3
        found.append((loss.detach().double(), elbo.detach().double(), grad.double().abs().sum(-1)))
    (loss, elbo, grad), (loss_64, elbo_64, grad_64) = found
    torch.testing.assert_close(loss, loss_64, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(elbo, elbo_64, rtol=1e-3, atol=1e-3)
    # Where p(z) rounds to 1 its gradient is a difference: exact to the rounding of the weight, which is up to 1e7 near t = 1.
    assert bool(((grad - grad_64).abs() <= 1e-3 * grad_64 + 1e-6 * loss_64 + 1e-3).all())


def test_mask_and_padding_columns_change_nothing_and_get_no_gradient() -> None:
    x0, xt, t = torch.tensor([0, 2, 3]), torch.tensor([MASK, 2, 0]), torch.tensor([0.2, 0.5, 0.8])
    logits = torch.randn(3, V + 2, generator=generator_for(0)).requires_grad_()
    elbo = hybrid_elbo(logits, x0, xt, t, kind="hybrid", **OPTIONS)
    (grad,) = torch.autograd.grad(elbo.sum(), logits)
    assert not grad[:, [MASK, V, V + 1]].any()
    assert bool(grad[:, TOKENS].all())
    changed = logits.detach().clone()
    changed[:, [MASK, V, V + 1]] = 50.0
    torch.testing.assert_close(hybrid_elbo(changed, x0, xt, t, kind="hybrid", **OPTIONS), elbo.detach())


@pytest.mark.parametrize("kind", ["hybrid", "uniform"])
def test_training_weights_are_the_elbo_weights_without_their_factor_of_time(kind: str) -> None:
    t = torch.tensor([0.2, 0.2, 0.2, 0.9, 0.9, 0.9])
    x0, xt = torch.tensor([0, 0, 0, 0, 0, 0]), torch.tensor([MASK, 0, 3] * 2)
    logits = torch.randn(6, V, generator=generator_for(0))
    loss, elbo = hybrid_loss(logits, x0, xt, t, kind=kind, weight="uniform", **OPTIONS)
    factor = 1 / (t * (1 - t)) if kind == "uniform" else 1 / (2 * t * (1 - t))
    torch.testing.assert_close(loss * factor, elbo)


def test_the_backward_pass_keeps_the_logits_and_nothing_else_of_their_size() -> None:
    kept: list[int] = []
    n, vocab_size = 64, 500
    logits, ids = torch.randn(n, vocab_size, requires_grad=True), torch.arange(n)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        hybrid_elbo(logits, ids, ids + 1, torch.rand(n), kind="uniform", vocab_size=vocab_size, mask_token_id=499)
    assert sum(kept) < 1.2 * n * vocab_size


def test_bad_input_is_named() -> None:
    x0, t, loss_mask = torch.tensor([0, MASK]), torch.tensor([0.5, 0.5]), torch.tensor([True, True])
    with pytest.raises(ValueError, match=r"token 1 cannot be noised by noise.kind=uniform"):
        corrupt(x0, t, loss_mask, kind="uniform", **OPTIONS)
    corrupt(x0, t, torch.tensor([True, False]), kind="uniform", **OPTIONS)
    with pytest.raises(ValueError, match=r"noise.kind=gauss: choose one of absorbing, hybrid, uniform"):
        corrupt(x0, t, loss_mask & (x0 != MASK), kind="gauss", **OPTIONS)
    with pytest.raises(ValueError, match=r"noise.p_uniform=1.0"):
        corrupt(x0, t, loss_mask & (x0 != MASK), kind="hybrid", **OPTIONS | {"p_uniform": 1.0})
