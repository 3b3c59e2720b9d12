"""The probe accepts what attends as promised and refuses, with a reason, what does not."""

import copy
import logging

import pytest
import torch
from tiny_models import build_model, config_of
from transformers import BloomConfig

import adapt
from adapt.attention.layout import Layout
from adapt.model.forward import hidden_states
from adapt.probe.probe import probe
from adapt.spec import DiffusionSpec


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
    with caplog.at_level(logging.WARNING, logger="adapt.probe.probe"):
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


def test_the_mask_token_itself_goes_through_the_model():
    model = _bidirectional("llama")
    model.config.diffusion = {"mask_token_id": 7}
    assert probe(model, "bidirectional")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        probe(model, "bidirectional")


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


# -- what hides from edits --------------------------------------------------------------------------------------------


def _mask_of_layer(model, index, change):
    """The layer's mask is changed before it gets it: what a model does that builds its own."""

    def hook(_layer, args, kwargs):
        return args, {**kwargs, "attention_mask": change(kwargs["attention_mask"])}

    model.model.layers[index].register_forward_pre_hook(hook, with_kwargs=True)
    return model


def _causal(mask):
    return mask & torch.ones(mask.shape[-2:]).tril().bool() if mask is not None else None


def _everything_of_the_row(mask):
    """Everything but padding and the other document: the window is lost."""
    return mask | (torch.tensor(DOCUMENTS)[:, None] == torch.tensor(DOCUMENTS)) if mask is not None else None


DOCUMENTS = [1] * 7 + [2] * 4 + [0]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "index, change, said",
    [
        (1, _causal, r"in layers \[1\] \(\w+\) the token at place 0 does not see, but should, the one at 1"),
        (0, _everything_of_the_row, r"in layers \[0\] \(\w+\) the token at place 0 sees, but should not, the one at 4"),
    ],
    ids=["one causal layer", "one window lost"],
)
def test_one_wrong_layer_cannot_hide_behind_the_others_in_any_dtype_or_scale(index, change, said, dtype, scale):
    def gemma():
        model = _bidirectional("gemma3")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.mul_(scale)  # what attention adds is far below the rounding of what it is added to
        return model.to(dtype)

    probe(gemma(), "bidirectional")
    with pytest.raises(ValueError, match=said):
        probe(_mask_of_layer(gemma(), index, change), "bidirectional")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_load_that_stays_causal_is_noticed_however_little_attention_adds(dtype):
    for kind, mask_free in (("stablelm", False), ("llama", True)):
        model = _bidirectional(kind)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.mul_(1e-4)
        assert probe(model.to(dtype), "bidirectional") is mask_free


def test_positions_that_do_not_arrive_are_noticed_even_where_no_mask_is_wrong():
    model = _bidirectional("llama")
    forward = model.model.forward
    model.model.forward = lambda input_ids, position_ids=None, **options: forward(input_ids=input_ids, **options)
    with pytest.raises(ValueError, match="goes by the column in which a token stands"):
        probe(model, "block")


def test_a_window_that_the_config_says_and_the_model_does_not_have_is_noticed():
    config = config_of("llama")
    config.sliding_window = 3
    with pytest.raises(ValueError, match="under our causal mask it differs"):
        probe(build_model(config), "prefix")
    assert config.sliding_window == 3


def test_windows_and_gradients_are_as_before_a_probe_that_fails():
    model = _mask_of_layer(_bidirectional("gemma3", sliding_window=50), 1, _causal)
    frozen = model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not see"):
        probe(model.train(), "bidirectional")
    assert model.config.sliding_window == 50
    assert model.training
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]


def test_experts_layers_without_rope_and_shared_keys_and_values_pass():
    from transformers import Gemma3nTextConfig, Qwen3MoeConfig, SmolLM3Config

    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    size |= {
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {
        "layer_types": kinds,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 300,
    }
    for config in (
        Qwen3MoeConfig(**size, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        SmolLM3Config(**size, num_hidden_layers=2, no_rope_layers=[1, 0]),
        Gemma3nTextConfig(
            **size,
            **shared,
            sliding_window=9,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ):
        for attention in ("bidirectional", "block"):
            probe(build_model(config), attention)
