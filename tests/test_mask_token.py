"""The mask token: a reserved one before a new one, whole for the tokenizer, and never read out of somebody's text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, build_model, build_tokenizer, save_base
from transformers import AutoConfig, AutoTokenizer, Gemma3nTextConfig, Gemma4TextConfig, GenerationConfig

import adapt
from adapt.conversion.convert import convert
from adapt.conversion.mask_token import add_mask_token
from adapt.tokens import text_ids

# What the tokenizers of these families call the rows that they keep for nobody.
RESERVED = {
    "Llama 3, SmolLM3": ["<|reserved_special_token_0|>", "<|reserved_special_token_247|>"],
    "Gemma": ["<unused0>", "<unused98>"],
    "Mistral": ["[control_8]", "[control_768]"],
    "Mistral, Tekken": ["<SPECIAL_20>", "<SPECIAL_999>"],
    "Phi-4": ["<|dummy_0|>", "<|dummy_83|>"],
    "Phi-3": ["<|placeholder1|>", "<|placeholder6|>"],
    "GPT-OSS": ["<|reserved_200000|>", "<|reserved_201087|>"],
    "Cohere": ["<|EXTRA_0_TOKEN|>", "<|EXTRA_9_TOKEN|>"],
    "Falcon 3": [">>UNUSED_221<<", ">>UNUSED_1022<<"],
    "DeepSeek-V3": ["<｜place▁holder▁no▁0｜>", "<｜place▁holder▁no▁798｜>"],
    "InternLM": ["[UNUSED_TOKEN_141]", "[UNUSED_TOKEN_145]"],
    "Yi": ["<|unused000|>", "<|unused999|>"],
}
IN_USE = [
    "<|im_start|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "[INST]",
    "<|user|>",
    "<|fim_prefix|>",
    "<|python_tag|>",
    "<0x0A>",
]


@pytest.mark.parametrize("tokens", RESERVED.values(), ids=RESERVED.keys())
def test_the_last_reserved_token_of_a_family_is_taken_and_nothing_grows(tokens):
    tokenizer = build_tokenizer(*tokens, *IN_USE)
    rows = VOCABULARY + len(tokens) + len(IN_USE)
    assert add_mask_token(tokenizer, rows, None, frozenset()) == (VOCABULARY + len(tokens) - 1, rows)
    assert tokenizer.mask_token == tokens[-1]


@pytest.mark.parametrize("spare, taken, rows", [(2, 1, 2), (1, 0, 1), (0, 0, 1)], ids=["all", "one", "none"])
def test_a_reserved_token_with_a_row_comes_before_one_that_needs_a_new_row(spare, taken, rows):
    """Qwen-like: the tokenizer names more tokens than the embedding has rows."""
    tokenizer = build_tokenizer("<unused0>", "<unused1>")
    found = add_mask_token(tokenizer, VOCABULARY + spare, None, frozenset())
    assert found == (VOCABULARY + taken, VOCABULARY + rows)


def test_tokens_in_use_are_not_taken_for_reserved_ones():
    tokenizer = build_tokenizer(*IN_USE)
    rows = VOCABULARY + len(IN_USE)
    assert add_mask_token(tokenizer, rows, None, frozenset()) == (rows, rows + 1)
    assert tokenizer.mask_token == "<|mask|>"


def test_a_reserved_token_that_has_a_role_is_not_unused():
    tokenizer = build_tokenizer("<unused0>", "<unused1>", "<unused2>")
    tokenizer.pad_token = "<unused2>"
    ends = frozenset({tokenizer.convert_tokens_to_ids("<unused1>")})  # generation_config.json says so
    add_mask_token(tokenizer, VOCABULARY + 3, None, ends)
    assert tokenizer.mask_token == "<unused0>"


@pytest.mark.parametrize(
    "token, said",
    [
        ("the", "occurs in plain text"),
        (" <|m|>", "begins or ends in space"),
        ("<|m\x00|>", "begins or ends in space, or cannot be printed"),
        ("<|endoftext|>", "the chat template writes it"),
        ("<|assistant|>", "the chat template writes it"),
    ],
)
def test_a_token_that_could_be_taken_for_something_else_is_refused(token, said):
    with pytest.raises(ValueError, match=said) as refused:
        add_mask_token(build_tokenizer(), VOCABULARY, token, frozenset())
    assert str(refused.value).startswith("mask_token=")


def test_a_tokenizer_that_merges_the_mask_token_with_its_neighbour_is_refused():
    """A normalizer that rewrites the string is what real tokenizers do it with."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|mask|><|mask|>", special=True)]})
    with pytest.raises(ValueError, match="the tokenizer splits or changes it"):
        add_mask_token(tokenizer, VOCABULARY + 2, "<|mask|>", frozenset())


def test_an_id_far_beyond_the_embedding_is_refused_before_rows_are_made():
    tokenizer = build_tokenizer(*(f"<|t{i}|>" for i in range(50)))
    with pytest.raises(ValueError, match="tokenizer of another model"):
        add_mask_token(tokenizer, -5000, None, frozenset())


def test_a_token_that_ends_texts_is_refused():
    with pytest.raises(ValueError, match="is the tokenizer's end, start or padding token"):
        add_mask_token(build_tokenizer("<|eot|>"), VOCABULARY + 1, "<|eot|>", frozenset({VOCABULARY}))


# -- text that quotes it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [[], ["<|reserved_special_token_0|>"]], ids=["new", "reserved"])
def test_text_that_quotes_the_mask_token_is_text_and_other_special_tokens_stay_special(special):
    tokenizer = build_tokenizer(*special)
    add_mask_token(tokenizer, VOCABULARY + len(special), None, frozenset())
    mask = tokenizer.mask_token
    text = f"The cat {mask}{mask} sat<|endoftext|> on{mask}"
    ids = text_ids(tokenizer, text, add_special_tokens=False)
    assert tokenizer.mask_token_id not in ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == text
    plain = "The cat sat on the mat."
    assert text_ids(tokenizer, plain) == tokenizer(plain)["input_ids"]


def test_text_is_cut_as_the_base_cuts_it_which_does_not_know_the_new_token():
    base, ours = build_tokenizer(), build_tokenizer()
    add_mask_token(ours, VOCABULARY, None, frozenset())
    for text in ("a <|mask|> b", "<|mask|>", "x<|mask|><|mask|>y <|endoftext|>"):
        assert text_ids(ours, text) == base(text)["input_ids"]
        assert ours.mask_token_id in ours(text)["input_ids"]  # what would have happened


def test_blanks_become_the_mask_token_beside_its_quoted_string():
    tokenizer = build_tokenizer()
    add_mask_token(tokenizer, VOCABULARY, None, frozenset())
    ids = text_ids(tokenizer, "The #?# sat on <|mask|> the#?##?#.", blank="#?#")
    assert ids.count(tokenizer.mask_token_id) == 3
    assert tokenizer.decode(ids) == "The <|mask|> sat on <|mask|> the<|mask|><|mask|>."


def test_no_command_reads_a_blank_out_of_a_prompt_or_a_document(checkpoint_folder, tmp_path, monkeypatch):
    """Training data, prompts, lm-eval's contexts, held-out text: none has a mask token; infilling has its blanks only."""
    from adapt.training.data.examples import load_examples
    from adapt.training.recipe import DataConfig
    from adapt_eval.lm import AdaptLM
    from adapt_eval.measure.likelihood import windows_of

    lm = adapt.load(checkpoint_folder("qwen3", "prefix"), device="cpu")
    mask = lm.tokenizer.mask_token_id
    quoted = "The cat <|mask|> sat"
    rows = {"text.jsonl": {"text": quoted}, "pairs.jsonl": {"prompt": quoted, "completion": quoted}}
    rows["chat.jsonl"] = {"messages": [{"role": "user", "content": quoted}, {"role": "assistant", "content": quoted}]}
    for file, row in rows.items():
        (tmp_path / file).write_text(json.dumps(row) + "\n")
        config = DataConfig(train=str(tmp_path / file), seq_len=128)
        for example in load_examples(config, lm.tokenizer, is_main_process=False):
            assert mask not in example["context"] + example["target"]  # pyright: ignore[reportArgumentType]
            assert "<|mask|>" in lm.tokenizer.decode(example["target"])  # pyright: ignore[reportArgumentType]
    assert mask not in AdaptLM(lm).tok_encode(quoted)
    assert mask not in windows_of(tmp_path / "text.jsonl", lm.tokenizer, seq_len=8, max_tokens=8)[0]

    seen: list[torch.Tensor] = []

    for name in ("generate", "infill"):
        plain = getattr(adapt.DiffusionLM, name)

        def spy(self, input_ids, *, plain=plain, **options):
            seen.append(input_ids)
            return plain(self, input_ids, **options)

        monkeypatch.setattr(adapt.DiffusionLM, name, spy)
    lm.write([quoted, "One"], max_new_tokens=2)
    assert mask not in seen.pop()
    text = lm.fill(f"{quoted} [?2] on")
    assert (seen.pop() == mask).sum() == 2
    assert text.startswith(quoted)


# -- its row ----------------------------------------------------------------------------------------------------------


def _embedding(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def test_the_new_row_is_the_mean_with_noise_of_the_size_asked_for_by_seed(base_folder, tmp_path):
    old = _embedding(base_folder("qwen3"))
    rows = {
        name: _embedding(convert(base_folder("qwen3"), tmp_path / name, mask_init_std=std, seed=seed, verify=False))
        for name, std, seed in [("none", 0.0, 0), ("a", 0.5, 0), ("again", 0.5, 0), ("b", 0.5, 1)]
    }
    torch.testing.assert_close(rows["none"][VOCABULARY], old.mean(0))
    noise = rows["a"][VOCABULARY] - old.mean(0)
    assert 0.3 < noise.std() < 0.7
    assert torch.equal(rows["a"], rows["again"])
    assert not torch.equal(rows["a"], rows["b"])
    others = torch.arange(len(old)) != VOCABULARY
    assert torch.equal(rows["a"][others], old[others])


def test_tokenizer_config_and_generation_config_agree_on_the_mask_token(base_folder, tmp_path):
    for name, has_one in (("with", True), ("without", False)):
        base = save_base("llama", tmp_path / f"base {name}", build_tokenizer("<unused0>"), vocab_size=VOCABULARY + 1)
        (base / "generation_config.json").unlink()
        if has_one:
            said = {"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": True}
            (base / "generation_config.json").write_text(json.dumps(said))
        out = convert(base, tmp_path / name, verify=False)
        mask = AutoTokenizer.from_pretrained(out).mask_token_id
        generation = GenerationConfig.from_pretrained(out)
        assert AutoConfig.from_pretrained(out).diffusion["mask_token_id"] == mask == VOCABULARY
        assert generation.mask_token_id == mask
        assert generation.eos_token_id == ([0, 5] if has_one else 0)


@pytest.mark.parametrize("special, options", [([], {}), ([], {"pad_to_multiple_of": 64}), (["<unused0>"], {})])
@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_the_second_table_of_gemma_has_a_row_for_the_mask_token(tmp_path, kind, special, options):
    size = {"vocab_size": VOCABULARY + len(special), "vocab_size_per_layer_input": VOCABULARY + len(special)}
    size |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    size |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size_per_layer_input": 8, "sliding_window": 9}
    size |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
    size |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    more = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 2} if kind == "gemma3n" else {}
    of_kind = {"gemma3n": Gemma3nTextConfig, "gemma4": Gemma4TextConfig}
    build_model(of_kind[kind](**size, **more)).save_pretrained(tmp_path / "base")
    build_tokenizer(*special).save_pretrained(tmp_path / "base")
    out = convert(tmp_path / "base", tmp_path / "out", attention="prefix", **options)
    config, mask = AutoConfig.from_pretrained(out), VOCABULARY
    assert config.vocab_size == config.vocab_size_per_layer_input == (320 if options else VOCABULARY + 1)
    [name] = [name for name in load_file(out / "model.safetensors") if name.endswith("embed_tokens_per_layer.weight")]
    old, new = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("base", "out"))
    assert torch.equal(new[:VOCABULARY], old[:VOCABULARY])
    torch.testing.assert_close(new[mask], old.mean(0), rtol=1e-4, atol=1e-6)
    lm = adapt.load(out, device="cpu")
    assert lm.generate(torch.tensor([[5, 6]]), max_new_tokens=2).sequences.max() < mask
