"""The probe accepts what attends as promised and refuses, with a reason, what does not."""

import copy
import logging

import pytest
import torch
from tiny_models import build_model, config_of
from transformers import BloomConfig

import adapt
from adapt.attention import Layout
from adapt.checkpoint import DiffusionSpec
from adapt.model import hidden_states
from adapt.probe import probe


def _bidirectional(kind: str, **changes):
    config = config_of(kind, **changes)
    config.is_causal = False
    return build_model(config)


@pytest.mark.parametrize("attention", ["bidirectional", "causal", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_three_patterns_hold_and_only_plain_bidirectional_needs_no_mask(kind, attention):
    assert probe(_bidirectional(kind), attention) is (attention == "bidirectional")


def test_stablelm_ignores_the_flag_and_says_so_and_is_right_with_the_mask(checkpoint_folder, caplog):
    folder = checkpoint_folder("stablelm", "bidirectional")
    with caplog.at_level(logging.WARNING, logger="adapt.probe"):
        lm = adapt.load(folder, device="cpu", attn_implementation="sdpa")
    assert "StableLmForCausalLM ignores config.is_causal=False with sdpa attention" in caplog.text
    assert not lm.mask_free
    tokens = torch.arange(1, 9)[None]
    edited = tokens.clone()
    edited[0, -1] = 50
    with torch.no_grad():
        layout = Layout.of("bidirectional", torch.ones_like(tokens))
        first = [hidden_states(lm.model, t, layout)[0, 0] for t in (tokens, edited)]
        plain = [lm.model.base_model(t).last_hidden_state[0, 0] for t in (tokens, edited)]
    assert (first[0] - first[1]).abs().max() > 1e-4
    assert torch.equal(plain[0], plain[1])  # the silent causality that the warning is about
    # Decoding does not fall for it either: the first blank is filled in sight of the last token.
    written = [lm.infill(torch.tensor([[lm.spec.mask_token_id, *t[0, 1:].tolist()]])).nfe for t in (tokens, edited)]
    assert written == [1, 1]


def test_bfloat16_passes():
    assert probe(_bidirectional("llama").to(torch.bfloat16), "bidirectional")


def test_many_identical_embedding_rows_are_no_obstacle():
    model = _bidirectional("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] = 0.1
    assert probe(model, "bidirectional")


def _drop_mask(model):
    forward = model.base_model.forward

    def unmasked(input_ids, attention_mask=None, position_ids=None, **options):
        return forward(input_ids=input_ids, position_ids=position_ids, **options)

    model.base_model.forward = unmasked
    return model


def _break_head(model):
    """The logits go one token to the right after the output embedding."""
    forward = model.forward

    def rolled(*args, **options):
        outputs = forward(*args, **options)
        outputs.logits = outputs.logits.roll(1, -1)
        return outputs

    model.forward = rolled
    return model


def _with_nan(model):
    with torch.no_grad():
        model.base_model.norm.weight[0] = torch.nan
    return model


@pytest.mark.parametrize(
    "broken, attention, said",
    [
        (lambda: _drop_mask(_bidirectional("llama")), "prefix", "sees, but should not"),
        (lambda: _drop_mask(build_model(config_of("llama"))), "bidirectional", "does not see, but should"),
        (lambda: _break_head(_bidirectional("llama")), "bidirectional", "its logits are not its output embedding"),
        (lambda: _with_nan(_bidirectional("llama")), "bidirectional", "computes NaN or infinity in torch.float32"),
        (
            lambda: build_model(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)),
            "bidirectional",
            "does not take an explicit attention mask",
        ),
    ],
    ids=["leak", "causal", "head", "nan", "bloom"],
)
def test_a_model_that_is_not_what_it_says_is_refused(broken, attention, said):
    with pytest.raises(ValueError, match=said):
        probe(broken(), attention)


def test_the_probe_leaves_the_model_as_it_was():
    model = _bidirectional("llama").train()
    before = copy.deepcopy(model.state_dict())
    probe(model, "bidirectional")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "section, said",
    [
        ({"attention": "prefix"}, "lacks mask_token_id"),
        ({"attention": "prefix", "mask_token_id": 1, "colour": 2}, "unknown keys in its `diffusion` section: colour"),
        ({"attention": "prefix", "mask_token_id": 1, "format_version": 9}, "diffusion.format_version=9"),
        ({"attention": "prefix", "mask_token_id": 1, "noise": "pink"}, "diffusion.noise=pink: choose one of"),
        ({"attention": "block", "mask_token_id": 1}, "diffusion.block_size=None"),
        ({"attention": "block", "mask_token_id": 1, "block_size": 4}, "diffusion.clean_context=None"),
        (None, "has no `diffusion` section"),
    ],
)
def test_a_diffusion_section_that_we_cannot_read_is_refused(section, said):
    config = config_of("llama")
    if section is not None:
        config.diffusion = section
    with pytest.raises(ValueError, match=said):
        DiffusionSpec.of(config, "folder")
