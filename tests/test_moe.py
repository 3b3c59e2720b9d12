"""Mixture of experts: converts, and trains with its router's balancing loss, on one process and under ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_fixtures import losses, recipe_argv, tiny_llama, tiny_tokenizer, train_ranks, write_pairs
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapt.attention.layout import PADDING_DOCUMENT, Layout
from adapt.objective import cross_entropy
from adapt.training import train
from adapt.training.loss.in_forward import Term, attach_loss
from adapt.training.loss.router import has_router_loss
from adapt.training.recipe import parse_recipe


def tiny_moe(*, router_aux_loss_coef: float = 0.3) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=32,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            router_aux_loss_coef=router_aux_loss_coef,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def causal_layout(num_tokens: list[int], length: int) -> Layout:
    """Rows of one causal document each, then padding."""
    index = torch.arange(length)
    is_token = index[None] < torch.tensor(num_tokens)[:, None]
    documents = torch.where(is_token, 1, PADDING_DOCUMENT)
    return Layout(documents, torch.zeros_like(documents), index.expand(len(num_tokens), -1).contiguous())


def test_the_router_loss_is_the_models_own_and_padding_takes_no_part() -> None:
    model = tiny_moe()
    tokens = torch.randint(5, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    num_tokens = [16, 9, 4]
    is_token = torch.arange(16)[None] < torch.tensor(num_tokens)[:, None]
    own = model(input_ids=tokens, attention_mask=is_token.long(), output_router_logits=True).aux_loss.detach()
    term = Term(
        torch.tensor([0, 17]), cross_entropy, (torch.tensor([7, 8]),), torch.zeros(2)
    )  # no loss but the router's
    options = {"layout": causal_layout(num_tokens, 16), "terms": [term], "num_chunks": 1}
    router_loss, _ = attach_loss(model)(input_ids=tokens, **options)
    torch.testing.assert_close(router_loss, 0.3 * own)
    (gate,) = torch.autograd.grad(router_loss, model.model.layers[0].mlp.gate.weight)
    assert gate.abs().sum() > 0

    tokens[~is_token] = 3
    with_other_padding, _ = model(input_ids=tokens, **options)
    torch.testing.assert_close(with_other_padding, router_loss)


def test_a_dense_model_and_a_zero_coefficient_have_no_router_loss() -> None:
    assert has_router_loss(tiny_moe())
    assert not has_router_loss(tiny_moe(router_aux_loss_coef=0.0))
    assert not has_router_loss(tiny_llama())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    for name, coefficient in (("base", 0.3), ("without", 0.0)):
        tiny_moe(router_aux_loss_coef=coefficient).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.mark.distributed
def test_a_tiny_qwen3_moe_trains_alone_and_under_zero3_with_the_same_curve(folder: Path) -> None:
    settings = {"training__micro_batch_size": 4, "training__num_steps": 24, "training__learning_rate": 0.01}
    settings["training__lr_scheduler"] = "constant"
    train.train(parse_recipe(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "one", **settings)))
    one = losses(folder / "one")
    assert sum(one[step] for step in (22, 23, 24)) < 0.8 * sum(one[step] for step in (1, 2, 3))

    # Two ranks of 4 rows have the micro-batches of one process that accumulates twice 4: the mean over either is the same.
    settings |= {"training__deepspeed": "zero3", "training__num_steps": 5}
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "two", **settings)
    train_ranks(argv, folder / "two.log")
    assert losses(folder / "two") == pytest.approx({step: one[step] for step in range(1, 6)}, rel=1e-5)

    settings |= {"training__deepspeed": None, "training__num_steps": 1}
    train.train(parse_recipe(recipe_argv(folder / "without", folder / "pairs.jsonl", folder / "dense", **settings)))
    # Even routing costs coefficient x experts chosen = 0.6 of the loss's 0.3 x 2.
    assert 0.6 <= one[1] - losses(folder / "dense")[1] < 1.2
