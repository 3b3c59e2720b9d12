"""From examples to a batch: what is noised, what predicts it, and that packing and shared prompts change no loss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_fixtures import tiny_llama

from adapt.attention.layout import PADDING_DOCUMENT, Layout
from adapt.attention.mask import mask_rule
from adapt.model.forward import hidden_states
from adapt.objective import cross_entropy
from adapt.spec import DiffusionSpec
from adapt.training.data.batch import collate, pack
from adapt.training.data.packing import Place
from adapt.training.data.views import Canvases
from adapt.training.loss.in_forward import Term, attach_loss
from adapt.training.sections import NoiseConfig, ObjectiveConfig

MASK, END = 9, 1
EXAMPLES = [([2, 5, 6], [7, 8, END]), ([3], [4, 5, 6, 7, 8, 3, END]), ([8, 7, 6, 5], [4, END]), ([], [6, 5, END])]


def canvases(
    attention: str = "prefix",
    *,
    canvas_length: int | None = None,
    start: str = "prompt",
    shift: bool = False,
    **objective,
) -> Canvases:
    spec = DiffusionSpec(attention=attention, mask_token_id=MASK, shift_logits=shift)
    return Canvases(spec, NoiseConfig(), ObjectiveConfig(**objective), canvas_length, start, END, seed=11)


def packed(of: Canvases, start: int = 0) -> dict[str, torch.Tensor]:
    return pack([of.tokens(*example, Place(i, 0, start + i)) for i, example in enumerate(EXAMPLES)])


each_attention = pytest.mark.parametrize("attention", ["prefix", "bidirectional"])


@each_attention
def test_neither_prompt_nor_padding_is_ever_noised_and_end_of_text_is_learned(attention: str) -> None:
    of, noised_end = canvases(attention), 0
    for ordinal in range(50):
        place = Place(ordinal, 0, ordinal)
        (context, target) = EXAMPLES[0]
        row = of.tokens(context, target, place)
        assert row["xt"][:3].tolist() == context
        assert row["x0"].tolist() == context + target
        assert not row["loss_mask"][:3].any()
        assert row["loss_mask"][3:].all()
        assert torch.equal(row["xt"] == MASK, row["is_noised"])
        noised_end += int(row["is_noised"][-1])
        batch = collate([pack([row]), pack([of.tokens(*EXAMPLES[1], place)])])
        assert int(batch["num_maskable"]) == len(target) + len(EXAMPLES[1][1])
        assert (batch["document_ids"][0, 6:] == PADDING_DOCUMENT).all()
        assert len(batch["rows"]) == len(batch["targets"]) == len(batch["elbo_weight"])
        assert (batch["rows"] < batch["input_ids"].numel()).all()
    assert noised_end > 10


@each_attention
def test_a_complementary_pair_noises_every_token_exactly_once(attention: str) -> None:
    of = canvases(attention, views=4, complementary=True, canvas_length=12)
    for ordinal in range(20):
        row = of.tokens(*EXAMPLES[1], Place(ordinal, 0, ordinal))
        noised = [row["is_noised"][(row["view"] == view) & row["loss_mask"]].int() for view in (1, 2, 3, 4)]
        assert torch.equal(noised[0] + noised[1], torch.ones_like(noised[0]))
        assert torch.equal(noised[2] + noised[3], torch.ones_like(noised[0]))
        assert len(noised[0]) > 12 - 6


def test_pairs_of_views_are_noised_apart() -> None:
    only: list[tuple[bool, bool]] = []
    for ordinal in range(10):
        row = canvases(views=4, complementary=True).tokens([2], [4] * 60, Place(ordinal, 0, ordinal))
        first, other = (row["is_noised"][row["view"] == view] for view in (1, 3))
        only.append((bool((first & ~other).any()), bool((other & ~first).any())))
        weights = [row["elbo_weight"][row["view"] == view][0] for view in (1, 3)]
        assert weights[0] != weights[1]
    assert sum(all(pair) for pair in only) > 5  # draws of their own, not one draw at two times


def test_with_prefix_attention_the_views_share_one_prompt() -> None:
    context, target = EXAMPLES[0]
    row = canvases("prefix", views=3).tokens(context, target, Place(0, 0, 0))
    assert len(row["xt"]) == len(context) + 3 * len(target)
    assert row["view"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert row["position"].tolist() == [0, 1, 2] + 3 * [3, 4, 5]


@each_attention
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("options", [{}, {"canvas_length": 6}, {"canvas_length": 3, "start": "anywhere"}])
def test_sizes_are_the_tokens_that_an_example_takes(attention: str, shift: bool, options: dict) -> None:
    if "start" in options and attention == "bidirectional":
        pytest.skip("canvases anywhere hang off a causal context")
    of = canvases(attention, views=2, shift=shift, **options)
    lengths = [np.array([len(example[part]) for example in EXAMPLES]) for part in (0, 1)]
    for epoch in (0, 1):
        taken = [len(of.tokens(*example, Place(i, epoch, i))["xt"]) for i, example in enumerate(EXAMPLES)]
        assert of.sizes(*lengths, epoch).tolist() == taken


@pytest.mark.parametrize("ar_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    "attention, start", [("prefix", "prompt"), ("bidirectional", "prompt"), ("prefix", "anywhere")]
)
def test_no_epoch_needs_more_room_than_was_asked_for(attention: str, start: str, ar_weight: float) -> None:
    of = canvases(attention, start=start, canvas_length=9, views=2, ar_weight=ar_weight * (start == "anywhere"))
    lengths = [np.array([len(example[part]) for example in EXAMPLES] * 20) for part in (0, 1)]
    room = int(of.room_needed(*lengths).max())
    fitting = dataclasses.replace(of, seq_len=room)
    taken = [int(fitting.sizes(*lengths, epoch).max()) for epoch in range(20)]
    assert room - 2 <= max(taken) <= room


def test_a_canvas_anywhere_sees_the_clean_target_before_it_and_nothing_behind() -> None:
    of = canvases(canvas_length=3, start="anywhere", shift=True, views=3, ar_weight=1.0)
    context, target = [2, 3], [10, 11, 12, 13, 14, 15, END]
    starts = set()
    for i in range(50):
        row = of.tokens(context, target, Place(i, 0, i))
        parts = (row[key][None] for key in ("view", "position", "context_length"))
        layout = Layout(torch.ones_like(row["view"])[None], *parts)
        index, zero = torch.arange(len(row["xt"])), torch.zeros((), dtype=torch.long)
        seen = mask_rule(layout, layout)(zero, zero, index[:, None], index[None])
        for view in (1, 2, 3):
            canvas = row["view"] == view
            start = int(row["position"][canvas][0])
            starts.add(start - len(context))
            for query in index[canvas].tolist():
                context_seen = index[seen[query] & (row["view"] == 0)].tolist()
                assert context_seen == list(range(start))  # the clean copy stands first, in order
                assert torch.equal(seen[query] & (row["view"] > 0), canvas)
            assert row["x0"][canvas].tolist() == (target + [END] * 3)[start - 2 : start - 2 + int(canvas.sum())]
        clean = (row["view"] == 0) & (row["ar_predictor"] >= 0)
        assert row["x0"][clean].tolist() == target  # every token of the target, by the one before it
        assert row["ar_predictor"][clean].tolist() == list(range(1, 1 + len(target)))
    assert starts == set(range(len(target)))


def test_random_tail_is_end_of_text_within_the_canvas_length() -> None:
    of = canvases(canvas_length=10)
    lengths = set()
    for i in range(200):
        row = of.tokens([2, 3], [5, 6, END], Place(i, 0, i))
        canvas = row["x0"][2:].tolist()
        assert canvas[:2] == [5, 6]
        assert set(canvas[2:]) == {END}
        lengths.add(len(canvas))
    assert lengths == set(range(3, 11))
    longer = of.tokens([2], [5] * 11 + [END], Place(0, 0, 0))
    assert longer["x0"].tolist() == [2] + [5] * 11 + [END]


def test_shifted_logits_are_predicted_one_token_earlier_and_a_canvas_start_by_the_prompt() -> None:
    row = pack([canvases(shift=True, views=2).tokens(*example, Place(0, 0, 0)) for example in EXAMPLES[:2]])
    #        prompt        view 1   view 2   | prompt, view 1                     , view 2
    want = [-1, -1, -1] + [2, 3, 4] + [2, 6, 7] + [-1] + [9, *range(10, 16)] + [9, *range(17, 23)]
    assert row["predictor"].tolist() == want


def test_without_a_prompt_the_first_token_has_no_predictor_under_shift_and_is_not_noised() -> None:
    for ordinal in range(20):
        row = canvases(shift=True).tokens([], [6, 5, END], Place(0, 0, ordinal))
        assert row["predictor"].tolist() == [-1, 0, 1]
        assert row["loss_mask"].tolist() == [False, True, True]
        assert not row["is_noised"][0]


@each_attention
def test_documents_positions_and_copies_are_laid_out_apart(attention: str) -> None:
    row = packed(canvases(attention, views=2))
    start = torch.cat([torch.tensor([True]), row["document"][1:] != row["document"][:-1]])
    assert (row["position"][start] == 0).all()
    assert row["document"].unique().tolist() == [1, 2, 3, 4]
    assert row["view"].unique().tolist() == ([0, 1, 2] if attention == "prefix" else [1, 2])


def nll_of(batch: dict[str, torch.Tensor], rows: str = "rows", targets: str = "targets") -> torch.Tensor:
    """-log p of a collated batch, through the forward that training uses."""
    layout = Layout(batch["document_ids"], batch["view_ids"], batch["position_ids"], batch["context_lengths"])
    term = Term(batch[rows], cross_entropy, (batch[targets],), torch.ones(len(batch[rows])))
    _, (nll,) = attach_loss(tiny_llama())(input_ids=batch["input_ids"], layout=layout, terms=[term], num_chunks=1)
    return nll


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "attention, start", [("prefix", "prompt"), ("bidirectional", "prompt"), ("prefix", "anywhere")]
)
@torch.no_grad()
def test_loss_of_a_view_in_a_packed_row_is_its_loss_alone(attention: str, start: str, shift: bool) -> None:
    ar_weight = float(start == "anywhere")  # the clean target goes on beside its canvases, unseen by them
    of = canvases(attention, shift=shift, views=2, canvas_length=6, start=start, ar_weight=ar_weight)
    batch = collate([packed(of), pack([of.tokens(*EXAMPLES[1], Place(9, 0, 9))])], length=96)
    nll = nll_of(batch)

    model, alone = tiny_llama(), []
    for i, (context, target) in [*enumerate(EXAMPLES), (9, EXAMPLES[1])]:
        row = of.tokens(context, target, Place(i, 0, i))
        for view in (1, 2):
            here = row["view"] == view
            if attention == "bidirectional":  # the view holds a context of its own
                here &= row["position"] >= len(context)
            x0, xt, is_noised = row["x0"][here], row["xt"][here], row["is_noised"][here]
            before = int(row["position"][here][0])
            input_ids = torch.cat([torch.tensor((context + target)[:before], dtype=torch.long), xt])[None]
            own = Layout.of(attention, torch.ones_like(input_ids), before)
            logits = model.lm_head(hidden_states(model, input_ids, own))[0]
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            alone.append(F.cross_entropy(logits[before:][is_noised], x0[is_noised], reduction="none"))
    assert len(nll) > 15
    torch.testing.assert_close(nll, torch.cat(alone), rtol=1e-5, atol=1e-5)


def causal_loss(examples: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """(summed, tokens) of what transformers itself computes from labels."""
    model, total, count = tiny_llama(), 0.0, 0
    for context, target in examples:
        labels = torch.tensor([[-100] * len(context) + target])
        num_labels = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=torch.tensor([context + target]), labels=labels).loss) * num_labels
        count += num_labels
    return total, count


@torch.no_grad()
def test_ar_objective_is_the_causal_loss_of_transformers() -> None:
    of = canvases(name="ar", views=4)
    batch = collate([packed(of), pack([of.tokens(*EXAMPLES[1], Place(0, 0, 0))])])
    theirs, count = causal_loss([*EXAMPLES, EXAMPLES[1]])
    nll = nll_of(batch, "ar_rows", "ar_targets")
    assert len(nll) == count
    assert float(nll.sum()) == pytest.approx(theirs, rel=1e-5)
    assert len(batch["rows"]) == 0


@torch.no_grad()
def test_ar_loss_beside_canvases_is_the_causal_loss_of_transformers() -> None:
    batch = collate([packed(canvases(canvas_length=3, start="anywhere", ar_weight=0.5, views=2))])
    theirs, count = causal_loss(EXAMPLES)
    nll = nll_of(batch, "ar_rows", "ar_targets")
    assert len(nll) == count
    assert float(nll.sum()) == pytest.approx(theirs, rel=1e-5)


def test_noise_is_keyed_by_example_epoch_and_view_and_not_by_the_batch() -> None:
    of, example = canvases(views=2), ([2], [4] * 40 + [END])
    row = of.tokens(*example, Place(3, 1, 17))
    again = packed(of, start=50), of.tokens(*example, Place(3, 1, 17))
    assert torch.equal(again[1]["xt"], row["xt"])

    def noised_by(place: Place) -> torch.Tensor:
        return of.tokens(*example, place)["is_noised"]

    assert not torch.equal(noised_by(Place(4, 1, 17)), row["is_noised"])
    assert not torch.equal(noised_by(Place(3, 2, 17)), row["is_noised"])
    assert not torch.equal(*row["is_noised"][1:].view(2, -1))


def test_batch_is_padded_to_the_longest_row_or_to_the_length_asked_for() -> None:
    rows = [packed(canvases()), canvases().tokens(*EXAMPLES[0], Place(0, 0, 0)) | {"document": torch.ones(6).long()}]
    assert collate(rows)["input_ids"].shape == (2, len(rows[0]["xt"]))
    assert collate(rows, length=99)["position_ids"].shape == (2, 99)


def test_a_tail_gives_way_where_the_row_has_no_room_for_it() -> None:
    of = dataclasses.replace(canvases(canvas_length=10, views=2), seq_len=14)
    contexts, targets = np.array([4] * 300), np.array([4] * 300)
    for epoch in range(20):
        sizes = of.sizes(contexts, targets, epoch)
        assert sizes.max() <= 14
    assert set(sizes) == {12, 14}  # 4 + 2 x 4, and one more end-of-text in each view where it fits
