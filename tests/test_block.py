"""Block diffusion on [xt | x0]: who sees whom, one time for each block, and every loss equal to one computed block by block."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_fixtures import losses, metrics, recipe_argv, tiny_llama, write_base, write_pairs
from transformers import AutoConfig

import adapt
from adapt.attention.layout import PADDING_DOCUMENT, Layout
from adapt.attention.mask import attention_mask, mask_rule
from adapt.decoding.likelihood import nelbo
from adapt.model.forward import hidden_states
from adapt.noise.absorbing import cart_weight
from adapt.spec import DiffusionSpec
from adapt.training import train
from adapt.training.data.batch import collate, pack
from adapt.training.data.packing import Place
from adapt.training.data.views import Canvases
from adapt.training.recipe import parse_recipe
from adapt.training.sections import NoiseConfig, ObjectiveConfig

MASK, END, SIZE = 9, 1, 4
EXAMPLES = [([2, 5, 6], [7, 8, END]), ([3], [4, 5, 6, 7, 8, 3, END]), ([8, 7, 6, 5], [4, END]), ([], [6, 5, 4, 3, END])]
each_context = pytest.mark.parametrize("clean_context", ["block", "causal"])


def blocks(
    clean_context: str = "causal", *, size: int = SIZE, shift: bool = False, noise=None, **objective
) -> Canvases:
    spec = DiffusionSpec(
        attention="block", mask_token_id=MASK, shift_logits=shift, block_size=size, clean_context=clean_context
    )
    return Canvases(spec, noise or NoiseConfig(), ObjectiveConfig(**objective), None, "prompt", END, seed=11)


def layout_of(row: dict[str, torch.Tensor]) -> Layout:
    parts = (row[key][None] for key in ("view", "position", "context_length"))
    return Layout(torch.ones_like(row["view"])[None], *parts)


def _every_pair(length: int) -> tuple[torch.Tensor, ...]:
    zero, index = torch.zeros((), dtype=torch.long), torch.arange(length)
    return zero, zero, index[:, None], index[None]


@each_context
def test_a_block_sees_itself_and_the_clean_text_before_it_and_nothing_else(clean_context: str) -> None:
    context, target = EXAMPLES[1]
    row = blocks(clean_context, views=2).tokens(context, target, Place(0, 0, 0))
    index, zero = torch.arange(len(row["xt"])), torch.zeros((), dtype=torch.long)
    seen = mask_rule(*(layout_of(row),) * 2)(zero, zero, index[:, None], index[None])
    clean = row["view"] == 0
    assert row["x0"][clean].tolist() == (context + target)[: int(clean.sum())]
    for query in index.tolist():
        block = int(row["position"][query]) // SIZE
        of_text = row["position"][seen[query] & clean].tolist()
        own = row["position"][seen[query] & ~clean].tolist()
        if clean[query]:
            end = (block + 1) * SIZE if clean_context == "block" else int(row["position"][query]) + 1
            assert (of_text, own) == (list(range(min(end, int(clean.sum())))), [])
        else:
            first = max(block * SIZE, len(context)) if clean_context == "causal" else block * SIZE
            assert of_text == list(range(first))
            assert own == list(range(first, (block + 1) * SIZE))
            assert (row["view"][seen[query] & ~clean] == row["view"][query]).all()


@each_context
def test_the_prompt_is_never_noised_and_the_text_ends_with_a_full_block_of_end_of_text(clean_context: str) -> None:
    for i, (context, target) in enumerate(EXAMPLES):
        row = blocks(clean_context).tokens(context, target, Place(i, 0, i))
        text = context + target
        noisy = row["view"] > 0
        positions = row["position"][noisy].tolist()
        assert positions[-1] + 1 == math.ceil(len(text) / SIZE) * SIZE
        assert positions[0] == (len(context) // SIZE * SIZE if clean_context == "block" else len(context))
        assert row["x0"][noisy].tolist() == (text + [END] * SIZE)[positions[0] : positions[-1] + 1]
        assert not row["loss_mask"][row["position"] < len(context)].any()
        assert row["loss_mask"][noisy & (row["position"] >= len(context))].all()


@each_context
@pytest.mark.parametrize("ar_weight", [0.0, 1.0])
@pytest.mark.parametrize("views", [1, 2])
def test_sizes_are_the_room_that_an_example_takes(clean_context: str, ar_weight: float, views: int) -> None:
    of = blocks(clean_context, views=views, ar_weight=ar_weight)
    lengths = [np.array([len(example[part]) for example in EXAMPLES]) for part in (0, 1)]
    taken = [len(of.tokens(*example, Place(i, 0, i))["xt"]) for i, example in enumerate(EXAMPLES)]
    assert of.sizes(*lengths, 0).tolist() == taken
    growing = blocks(clean_context, views=views, ar_weight=ar_weight, block_sizes={0: 1, 5: 2, 9: SIZE})
    for size in (1, 2, SIZE):
        taken = [len(growing.tokens(*example, Place(i, 0, i), size)["xt"]) for i, example in enumerate(EXAMPLES)]
        assert (growing.sizes(*lengths, 0) >= np.array(taken)).all()


def test_plain_text_is_cut_where_blocks_end_so_that_only_ends_of_texts_are_padded() -> None:
    of = blocks(views=2)
    piece = of.piece_length(100)
    assert (piece, piece % SIZE) == (32, 0)
    assert of.sizes(np.array([0]), np.array([piece]), 0) <= 100


@each_context
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "sdpa_pieces"])
@torch.no_grad()
def test_loss_in_a_packed_row_is_that_of_each_block_after_its_clean_prefix_alone(clean_context, shift, kernel) -> None:
    of = blocks(clean_context, views=2, shift=shift)
    batch = collate([pack([of.tokens(*example, Place(i, 0, i)) for i, example in enumerate(EXAMPLES)])] * 2, length=99)
    model = tiny_llama()
    model.set_attn_implementation(kernel)
    layout = Layout(batch["document_ids"], batch["view_ids"], batch["position_ids"], batch["context_lengths"])
    hidden = hidden_states(model, batch["input_ids"], layout, pieces=batch["pieces"])
    nll = F.cross_entropy(model.lm_head(hidden.flatten(0, 1)[batch["rows"]]), batch["targets"], reduction="none")

    alone, plain = [], tiny_llama()
    for i, (context, target) in enumerate(EXAMPLES):
        row = of.tokens(context, target, Place(i, 0, i))
        for view in range(1, int(row["view"].max()) + 1):
            block = row["view"] == view
            first = int(row["position"][block][0])
            input_ids = torch.cat([torch.tensor((context + target)[:first]).long(), row["xt"][block]])[None]
            position = torch.arange(input_ids.shape[1])
            before = position < first
            ends = (position // SIZE + 1) * SIZE if clean_context == "block" else position + 1
            own = Layout(
                torch.ones_like(input_ids),
                (~before).long()[None],
                position[None],
                torch.where(before, ends, first)[None],
            )
            logits = plain.lm_head(hidden_states(plain, input_ids, own))[0]
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            at = row["is_noised"][block]
            alone.append(F.cross_entropy(logits[first:][at], row["x0"][block][at], reduction="none"))
    torch.testing.assert_close(nll, torch.cat(alone * 2), rtol=1e-5, atol=1e-5)


def test_each_block_has_a_time_of_its_own_and_each_is_uniform_over_the_run() -> None:
    of = blocks()
    times = torch.stack([of.tokens([], [5] * 15 + [END], Place(i, 0, i))["t"][-16::SIZE] for i in range(400)])
    assert (times[0].unique().numel(), times.shape) == (4, (400, 4))
    for block in range(4):
        shares = torch.histc(times[:, block], bins=10, min=0, max=1)
        assert (shares - 40).abs().max() <= 2  # stratified: independent draws would be off by 12


def test_a_complementary_pair_noises_every_token_exactly_once_at_the_times_of_its_blocks() -> None:
    of = blocks(views=2, complementary=True)
    for i in range(20):
        row = of.tokens([2], [5] * 14 + [END], Place(i, 0, i))
        noisy = (row["view"] > 0) & row["loss_mask"]
        first, second = row["is_noised"][noisy].view(2, -1).int()
        assert torch.equal(first + second, torch.ones_like(first))
        assert torch.equal(*row["t"][noisy].view(2, -1))


def _exact_nelbo(nll_of: dict[tuple[int, ...], torch.Tensor], length: int) -> float:
    """Sum over all masks M of  integral dm/m m^|M| (1-m)^(L-|M|)  *  sum over M of -log p(x0_i | xt)."""
    return sum(
        math.factorial(sum(m) - 1) * math.factorial(length - sum(m)) / math.factorial(length) * float(nll[torch.tensor(m).bool()].sum())
        for m, nll in nll_of.items()
        if sum(m)
    )  # fmt: skip


def test_loss_is_unbiased_against_all_masks_of_every_block() -> None:
    table = torch.Generator().manual_seed(3)
    nll_of = [
        {
            m: torch.empty(SIZE).exponential_(generator=table) * (1 + 3 * m[0])
            for m in itertools.product((0, 1), repeat=SIZE)
        }
        for _ in range(2)
    ]
    of, draws = blocks(noise=NoiseConfig(t_min=1e-4)), 6000
    estimates = torch.zeros(draws, 2)
    for i in range(draws):
        row = of.tokens([], [5] * (2 * SIZE - 1) + [END], Place(i, 0, i))
        for block in (0, 1):
            here = row["view"] == 1 + block
            at = row["is_noised"][here]
            estimates[i, block] = (nll_of[block][tuple(at.int().tolist())] * row["elbo_weight"][here])[at].sum()
    for block in (0, 1):
        mean, stderr = float(estimates[:, block].mean()), float(estimates[:, block].std()) / math.sqrt(draws)
        assert abs(mean - _exact_nelbo(nll_of[block], SIZE)) < 4 * stderr


def test_cart_weighs_a_token_by_the_clean_ones_near_it() -> None:
    of, p = blocks(weight="cart"), 0.3
    row = of.tokens([2], [5] * 14 + [END], Place(3, 0, 3))
    is_clean_at = {}
    for view in row["view"].unique().tolist()[1:]:
        block = row["view"] == view
        first = int(row["position"][block][0])
        for query in block.nonzero().flatten().tolist():
            at = int(row["position"][query])
            is_clean_at = dict.fromkeys(range(first), True) | dict(
                zip(row["position"][block].tolist(), (~row["is_noised"][block]).tolist(), strict=True)
            )
            want = sum(0.5 * p * (1 - p) ** (abs(k - at) - 1) for k, clean in is_clean_at.items() if clean and k != at)
            assert float(row["loss_weight"][query]) == pytest.approx(want, rel=1e-5)
    everything = torch.zeros(4, dtype=torch.long)
    alone = cart_weight(torch.arange(4), everything, everything, torch.tensor([True] * 4))
    assert alone.tolist() == [0.0] * 4  # nothing clean in sight


def test_a_curriculum_gives_each_step_the_block_size_it_says() -> None:
    of = blocks(block_sizes={0: 1, 5: 2, 9: SIZE})
    assert [of.block_size(step) for step in (0, 4, 5, 8, 9, 100)] == [1, 1, 2, 2, SIZE, SIZE]
    ends = {len(of.tokens(*EXAMPLES[0], Place(0, 0, 0), size)["x0"].unique()) for size in (1, 2, SIZE)}
    assert ends == {len(set(EXAMPLES[0][0] + EXAMPLES[0][1]))}


def test_padding_costs_no_attention_and_pieces_cover_what_is_seen_once() -> None:
    of = blocks()
    rows = [pack([of.tokens(*example, Place(i, 0, i)) for i, example in enumerate(EXAMPLES)])] * 2
    batch = collate(rows, length=128)
    covered = torch.zeros(128, dtype=torch.long)
    for piece in batch["pieces"].pieces:
        assert (piece.row, piece.end_row) == (0, 2)  # rows of one layout go through together
        covered[piece.start : piece.stop] += 1
        is_padding = batch["document_ids"][0, piece.start] == PADDING_DOCUMENT
        assert bool(is_padding) == (piece.keys == ())
    assert (covered == 1).all()


@each_context
def test_a_recipe_of_blocks_trains_and_leaves_a_block_checkpoint(tmp_path, clean_context: str) -> None:
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    settings = {
        "model__attention": "block",
        "model__block_size": SIZE,
        "model__clean_context": clean_context,
        "data__seq_len": 64,
        "objective__views": 2,
        "objective__complementary": True,
        "objective__ar_weight": 1.0 if clean_context == "causal" else 0.0,
        "objective__block_sizes": {0: 1, 2: 2, 4: SIZE},
    }
    curves = {}
    for kernel in ("sdpa", "sdpa_pieces"):
        argv = recipe_argv(
            tmp_path / "base",
            tmp_path / "pairs.jsonl",
            tmp_path / kernel,
            **settings,
            model__attn_implementation=kernel,
        )
        final = train.train(parse_recipe(argv))
        curves[kernel] = list(losses(final.parent).values())
    assert curves["sdpa"] == pytest.approx(curves["sdpa_pieces"], rel=1e-5)
    spec = DiffusionSpec.of(AutoConfig.from_pretrained(final), final)
    assert (spec.attention, spec.block_size, spec.clean_context) == ("block", SIZE, clean_context)


@pytest.mark.parametrize("kind", ["uniform", "hybrid"])
def test_a_recipe_of_random_noise_trains_on_every_token_of_the_target_and_says_so_in_the_checkpoint(
    tmp_path, kind
) -> None:
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    settings = {
        "model__attention": "block",
        "model__block_size": SIZE,
        "data__seq_len": 64,
        "noise__kind": kind,
        "objective__ar_weight": 1.0,
        "training__learning_rate": 0.01,
        "training__num_steps": 30,
    }
    argv = recipe_argv(tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "out", **settings)
    final = train.train(parse_recipe(argv))
    lines = metrics(final.parent)
    assert "mask_ratio" not in lines[0]  # every token is predicted, noised or not
    assert sum(line["nelbo"] for line in lines[-5:]) < 0.9 * sum(line["nelbo"] for line in lines[:5])
    lm = adapt.load(final)
    assert (lm.spec.noise, lm.spec.p_uniform) == (kind, 0.1 if kind == "hybrid" else None)
    written = lm.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6).sequences
    assert lm.spec.mask_token_id not in written.tolist()[0]
    bound = nelbo(lm, [[5, 6, 7]], [[8, 9, 10, 1]], num_samples=64)[0]
    assert 0 < bound.stderr < bound.nats


def test_batches_of_one_layout_build_flex_attentions_mask_once() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "flex_attention"
    of, masks = blocks(), []
    for i, examples in enumerate((EXAMPLES, EXAMPLES, EXAMPLES[:2])):
        rows = [pack([of.tokens(*example, Place(n, i, n)) for n, example in enumerate(examples)])]
        batch = collate(rows, length=64)
        layout = Layout(batch["document_ids"], batch["view_ids"], batch["position_ids"], batch["context_lengths"])
        masks.append(attention_mask(model.config, layout, cache_key=batch["pieces"].key))
        if i == 2:  # kept or not, it is the mask of this layout
            dense = masks[-1].mask_mod(*_every_pair(64))
            assert torch.equal(dense, mask_rule(layout, layout)(*_every_pair(64)))
    assert masks[0] is masks[1]
    assert masks[2] is not masks[0]
