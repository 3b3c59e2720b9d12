"""The original as a teacher: its own next-token distribution at the noised tokens, pulled towards by KL and never changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_collate import EXAMPLES, MASK, canvases
from torch.distributions import Categorical, kl_divergence
from training_fixtures import losses, metrics, recipe_argv, tiny_llama, write_base, write_pairs
from transformers import AutoModelForCausalLM

from adapt.attention.layout import Layout
from adapt.model.forward import hidden_states
from adapt.spec import DiffusionSpec
from adapt.training import train, trainer
from adapt.training.data.batch import collate, pack
from adapt.training.data.packing import Place
from adapt.training.loss.distill import Teacher
from adapt.training.recipe import parse_recipe

KINDS = ["prefix", "bidirectional", "block"]


def batch_of(kind: str, shift: bool = False) -> dict:
    of = canvases("prefix", shift=shift, views=2, canvas_length=8 if kind != "block" else None)
    blocks = {"block_size": 4, "clean_context": "causal"} if kind == "block" else {}
    spec = DiffusionSpec(attention=kind, mask_token_id=MASK, shift_logits=shift, **blocks)
    of = dataclasses.replace(of, spec=spec)
    rows = [pack([of.tokens(*example, Place(i, 0, i)) for i, example in enumerate(EXAMPLES)])]
    return collate([*rows, pack([of.tokens(*EXAMPLES[1], Place(9, 0, 9))])], with_teacher=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_it_is_what_transformers_predicts_at_that_token_from_the_clean_text(kind: str, shift: bool) -> None:
    batch, model = batch_of(kind, shift), tiny_llama()
    hidden = Teacher(model).hidden(batch)
    texts = [c + t for c, t in EXAMPLES]
    expected = {tuple(text): model.model(torch.tensor([text])).last_hidden_state[0] for text in texts}
    # Every taught token, found again in the text that it comes from.
    per_row = [texts, [texts[1]]]
    width = batch["input_ids"].shape[1]
    own_places = batch["rows"] + int(shift)
    taught = 0
    for n in range(len(hidden)):
        if not batch["is_taught"][n]:
            continue
        row = int(batch["rows"][n]) // width
        at = int(own_places[n]) % width if not shift else None
        text = per_row[row][int(batch["teacher_document_ids"].flatten()[batch["teacher_rows"][n]]) - 1]
        position = int(batch["teacher_position_ids"].flatten()[batch["teacher_rows"][n]]) + 1
        assert text[position] == int(batch["targets"][n])
        if at is not None:
            assert int(batch["position_ids"][row, at]) == position
        torch.testing.assert_close(hidden[n], expected[tuple(text)][position - 1], rtol=1e-5, atol=1e-5)
        taught += 1
    assert taught > 10
    assert not batch["is_taught"].all()  # the tail of end-of-text is none of the original's business


@torch.no_grad()
def test_a_lone_text_whose_last_block_is_filled_up_is_taught_up_to_its_end() -> None:
    spec = DiffusionSpec(attention="block", mask_token_id=MASK, block_size=16, clean_context="causal")
    of = dataclasses.replace(canvases("prefix", views=8), spec=spec)
    batch = collate([pack([of.tokens([1], [5, 6, 7], Place(0, 0, 0))])], with_teacher=True)
    hidden = Teacher(tiny_llama()).hidden(batch)
    assert len(hidden) == len(batch["targets"])
    is_own = batch["position_ids"].flatten()[batch["rows"]] < 4
    assert torch.equal(batch["is_taught"], is_own)
    assert is_own.any()
    assert not is_own.all()


def test_the_loss_is_the_likelihood_plus_the_divergence_and_its_gradient_reaches_the_student_only() -> None:
    torch.manual_seed(0)
    model = tiny_llama().requires_grad_(True)
    logits, targets = torch.randn(6, 65, requires_grad=True), torch.randint(60, (6,))
    hidden, is_taught = torch.randn(6, 32), torch.tensor([True, True, False, True, False, True])
    loss, nats = Teacher(model).row_loss(0.7)(logits, targets, hidden, is_taught)
    p = model.lm_head(hidden).softmax(-1).detach()
    q = logits.softmax(-1)
    kl = (p * (p / q[:, :64]).log()).sum(-1)
    torch.testing.assert_close(nats, torch.stack([-q[torch.arange(6), targets].log(), kl * is_taught], dim=1))
    torch.testing.assert_close(loss, nats[:, 0] + 0.7 * kl * is_taught)
    loss.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


def curve(folder: Path, name: str, **settings) -> list[float]:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / name, **settings)
    return list(losses(train.train(parse_recipe(argv)).parent).values())


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_run_is_taught_and_adapters_that_are_off_are_the_original(folder: Path, lora) -> None:
    name = "lora" if lora else "full"
    block = {"model__attention": "block", "model__block_size": 4, "data__seq_len": 64}
    settings = {**block, "model__lora": lora, "training__learning_rate": 0.02, "objective__ar_weight": 1.0}
    taught = curve(folder, name, objective__distill_weight=0.5, **settings)
    alone = curve(folder, f"{name}-alone", **settings)
    assert all(a > b for a, b in zip(taught, alone, strict=True))  # a divergence is added, which is never negative
    assert taught[-1] < taught[0]


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_reported_divergence_is_the_one_that_torch_computes_of_both_models(folder: Path, lora, monkeypatch) -> None:
    batches: list[dict] = []
    compute_loss = trainer.DiffusionTrainer.compute_loss

    def recorded(self, model, batch, *rest, **more):
        batches.append(batch)
        return compute_loss(self, model, batch, *rest, **more)

    monkeypatch.setattr(trainer.DiffusionTrainer, "compute_loss", recorded)
    settings = {"objective__distill_weight": 0.5, "training__num_steps": 1, "training__micro_batch_size": 4}
    out = folder / f"reported-{bool(lora)}"
    curve(folder, out.name, model__lora=lora, data__canvas_length=12, **settings)
    # In its first step a run's model is still the base, apart from who sees whom.
    base = AutoModelForCausalLM.from_pretrained(out / "converted", attn_implementation="eager").requires_grad_(False)
    total = count = 0.0
    for batch in batches:
        layout = Layout(batch["document_ids"], batch["view_ids"], batch["position_ids"], batch["context_lengths"])
        adapted = base.lm_head(hidden_states(base, batch["input_ids"], layout)).flatten(0, 1)[batch["rows"]]
        original = base.lm_head(Teacher(base).hidden(batch))
        kl = kl_divergence(Categorical(logits=original), Categorical(logits=adapted))
        total, count = total + float(kl[batch["is_taught"]].sum()), count + int(batch["is_taught"].sum())
    assert 0 < count < sum(len(batch["rows"]) for batch in batches)  # a tail of end-of-text has no teacher
    assert metrics(out)[0]["distill_kl"] == pytest.approx(total / count, rel=1e-5)


def test_lora_and_a_copy_of_the_base_teach_the_same_first_step(folder: Path) -> None:
    settings = {"objective__distill_weight": 0.5, "training__num_steps": 1}
    with_adapters_off = curve(folder, "off", model__lora={"r": 4}, **settings)
    with_a_copy = curve(folder, "copy", **settings)
    assert with_adapters_off == pytest.approx(with_a_copy, rel=1e-5)
