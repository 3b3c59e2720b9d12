"""GGUF files: the download is whole or absent, weights equal Hugging Face's, the pre-tokenizer is the model's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.cohere.tokenization_cohere import CohereTokenizer
from transformers.models.gpt_neox.tokenization_gpt_neox import GPTNeoXTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from adapt.conversion.gguf import gguf_to_folder, load_gguf, load_tokenizer
from adapt.conversion.gguf_header import NEED_VOCABULARY, read_header, write_without_vocabulary
from adapt.conversion.gguf_tokenizer import PROBE, RULES, pre_tokenizer_of
from adapt_recipes.quickstart.smollm2 import cached_smollm2

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "1 2", "Ġ 1"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "ĠĠ", "12", "Ġ1", "at"]  # no merge makes "at"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    pre: str | None,
    leave_out: str = "",
    adds_bos: bool | None = None,
    alignment: int = 32,
) -> Path:
    """What llama.cpp's converter writes for a Llama with a byte-level tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def rope_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
        # GGUF interleaves the two halves that Hugging Face rotates.
        halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))

    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = rope_pairs(weight, config.num_attention_heads)
            if ours == "attn_k":
                weight = rope_pairs(weight, config.num_key_value_heads)
            if ours != leave_out:
                writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama(), pre="smollm")


def test_logits_from_gguf_equal_the_hugging_face_model(smollm_like: Path) -> None:
    model, tokenizer = load_gguf(smollm_like)
    original = tiny_llama()
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits)
    assert model.config.tie_word_embeddings
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == 64


def test_folder_loads_to_the_same_weights_and_tokenizer(smollm_like: Path, tmp_path: Path) -> None:
    folder = gguf_to_folder(smollm_like, tmp_path / "made" / "folder", torch.float32)
    model, tokenizer = load_gguf(smollm_like)
    again, tokenizer_again = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert again.dtype == torch.float32
    assert getattr(again.config, "quantization_config", None) is None
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    text = "pay 12  12\n 12 now"
    assert tokenizer_again(text).input_ids == tokenizer(text).input_ids
    assert tokenizer_again.decode(tokenizer_again(text).input_ids) == text
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    with pytest.raises(ValueError, match="exists already"):
        gguf_to_folder(smollm_like, folder)


def test_dtype_is_the_one_asked_for(smollm_like: Path) -> None:
    assert load_gguf(smollm_like, torch.bfloat16)[0].dtype == torch.bfloat16


def test_smollm_digits_are_tokens_of_their_own(smollm_like: Path) -> None:
    tokenizer = load_tokenizer(smollm_like)
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    plain = AutoTokenizer.from_pretrained(smollm_like.parent, gguf_file=smollm_like.name)
    assert plain.tokenize("a 12") != ["a", "Ġ", "1", "2"], "transformers restores Digits itself now: drop our restoring"


def test_special_tokens_and_chat_template_are_kept(smollm_like: Path) -> None:
    tokenizer = load_tokenizer(smollm_like)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("<|im_end|>").input_ids == [2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "<|im_start|>a<|im_end|>"


def test_gpt2_splitting_is_left_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="gpt-2"))
    assert tokenizer.tokenize("a12") == ["a", "12"]


def test_pre_tokenizers_that_transformers_restores_pass(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="qwen2"))
    assert tokenizer.tokenize("a12") == ["a", "1", "2"]


# The tokenizers that transformers has in code, of models whose GGUF files bear the name.
ORIGINALS = {
    "command-r": CohereTokenizer,
    "gpt-2": GPT2Tokenizer,
    "olmo": GPTNeoXTokenizer,
    "qwen2": Qwen2Tokenizer,
    "qwen35": Qwen3_5Tokenizer,
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_a_gguf_gives_the_token_ids_of_the_original_tokenizer(pre: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre))
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    original = ORIGINALS[pre](vocab={token: i for i, token in enumerate(TOKENS)}, merges=merges)
    backends = tokenizer.backend_tokenizer, original.backend_tokenizer
    ids, expected = (backend.encode(PROBE, add_special_tokens=False).ids for backend in backends)
    assert ids == expected


def test_transformers_own_rules_cut_the_probe_as_ours_do() -> None:
    table = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    both = sorted(set(table) & set(RULES))
    assert len(both) > 15
    for name in both:
        ours, theirs = pre_tokenizer_of(RULES[name].splits), pre_tokenizer_of([table[name]])
        assert ours.pre_tokenize_str(PROBE) == theirs.pre_tokenize_str(PROBE), name


def test_the_probe_tells_all_rules_apart() -> None:
    splits = {rule.splits for rule in RULES.values()}
    assert len({str(pre_tokenizer_of(split).pre_tokenize_str(PROBE)) for split in splits}) == len(splits) > 8


def test_what_a_tokenizer_does_counts_and_not_that_its_name_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    monkeypatch.setitem(mapping.GGUF_PRE_TOKENIZER_SPLITS, "qwen2", r"\p{N}+|[^\p{N}]+")
    tokenizer = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="qwen2"))
    assert tokenizer.tokenize("a12") == ["a", "1", "2"]


def test_a_word_of_llama_3s_vocabulary_is_that_token_whatever_the_merges_say(tmp_path: Path) -> None:
    for pre, tokens in (("llama-bpe", ["at"]), ("gpt-2", ["a", "t"])):
        tokenizer = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", tiny_llama(), pre=pre))
        assert tokenizer.tokenize("at") == tokens


@pytest.mark.parametrize(
    "pre, adds_bos, starts",
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_start_of_text_is_added_where_the_file_or_its_family_says(pre, adds_bos, starts, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre, adds_bos=adds_bos)
    folder = gguf_to_folder(path, tmp_path / "folder")
    for tokenizer in (load_tokenizer(path), AutoTokenizer.from_pretrained(folder)):
        ids = tokenizer("a").input_ids
        assert ids == [1, *ids[-1:]] if starts else len(ids) == 1
        assert tokenizer("a", add_special_tokens=False).input_ids == ids[-1:]


@pytest.mark.parametrize("pre", ["superbpe", None])
def test_pre_tokenizer_that_cannot_be_rebuilt_is_refused(pre: str | None, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre)
    with pytest.raises(ValueError, match=f"tokenizer.ggml.pre={pre}: .*Hugging Face folder"):
        load_tokenizer(path)


def test_bad_files_are_refused_in_one_line(smollm_like: Path, tmp_path: Path) -> None:
    cases = {"absent.gguf": (None, "no such file"), "text.gguf": (b"hello", "not a GGUF file")}
    cases["cut.gguf"] = (smollm_like.read_bytes()[:2000], "damaged")
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            gguf_to_folder(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_missing_weights_are_refused_and_leave_no_folder(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="smollm", leave_out="ffn_up")
    with pytest.raises(ValueError, match="no weights for"):
        gguf_to_folder(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_real_smollm2_tokenizer() -> None:
    if (path := cached_smollm2()) is None:
        pytest.skip("SmolLM2's GGUF is not in the cache; `adapt quickstart` puts it there")
    tokenizer = load_tokenizer(path)
    assert tokenizer.tokenize("At 14:30  12") == ["At", "Ġ", "1", "4", ":", "3", "0", "ĠĠ", "1", "2"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    original = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PROBE) == original.pre_tokenize_str(PROBE)


def test_header_is_what_the_gguf_package_reads(smollm_like: Path) -> None:
    header, reader = read_header(smollm_like), gguf.GGUFReader(smollm_like)
    own = {key for key in reader.fields if key.startswith("GGUF.")}  # counts of the file's own, which are no metadata
    assert header.entries.keys() == reader.fields.keys() - own
    for key in header.entries:
        value = reader.fields[key].contents()
        assert header.get(key) == (len(value) if isinstance(value, list) else value), key


def test_loading_makes_no_object_of_every_token(
    smollm_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three readings of 262,144 tokens took two thirds of a Gemma's conversion."""
    read, build = [], gguf.GGUFReader._build_fields

    def recorded(self, *args):
        read.append(self)
        return build(self, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", recorded)
    gguf_to_folder(smollm_like, tmp_path / "out")
    assert len(read) > 2, "transformers reads the file in another way now: does it still need our help?"
    assert max(len(field.data) for reader in read for field in reader.fields.values()) == 1


def test_a_file_without_vocabulary_has_the_same_tensors_at_any_alignment(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="smollm", alignment=256)
    bare = write_without_vocabulary(read_header(path), tmp_path / "bare.gguf")
    tensors, expected = (gguf.GGUFReader(file).tensors for file in (bare, path))
    assert [t.name for t in tensors] == [t.name for t in expected]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(tensors, expected, strict=True))


def test_architectures_whose_vocabulary_is_counted_by_its_tokens_keep_it() -> None:
    mapping = pytest.importorskip("transformers.integrations.ggml").GGUF_CONFIG_MAPPING
    uncounted = {name for name, keys in mapping.items() if "vocab_size" not in keys} - {"general", "tokenizer"}
    assert uncounted == NEED_VOCABULARY


def set_number(path: Path, key: str, value: int) -> Path:
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key) + 4
    content[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("claimed, message", [(1, "would leave some unread"), (3, "no weights for"), (40, "asks for")])
def test_a_header_with_another_number_of_layers_than_the_file_is_refused(
    claimed: int, message: str, tmp_path: Path
) -> None:
    path = set_number(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="smollm"), "llama.block_count", claimed)
    with pytest.raises(ValueError, match=rf"^base=.*{message}"):
        gguf_to_folder(path, tmp_path / "out")


@pytest.mark.parametrize(
    "key, value",
    [
        ("llama.block_count", 10**6),
        ("llama.block_count", 0),
        ("llama.embedding_length", 1 << 30),
        ("llama.embedding_length", 1 << 20),
        ("llama.embedding_length", 17),
        ("llama.vocab_size", 1 << 30),
        ("llama.vocab_size", 1 << 27),
        ("llama.feed_forward_length", 1 << 27),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count_kv", 0),
        ("llama.rope.dimension_count", 0),
        ("llama.context_length", 0),
        ("general.alignment", 1 << 30),
        ("general.alignment", 48),
        ("tokenizer.ggml.eos_token_id", 1 << 31),
        ("tokenizer.ggml.bos_token_id", 1 << 31),
        ("tokenizer.ggml.tokens", 1 << 20),  # the number that tells what the array holds
        ("GGUF", 7),
    ],
)
def test_numbers_of_a_header_that_no_model_has_are_refused_in_one_line(key: str, value: int, tmp_path: Path) -> None:
    path = set_number(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="smollm", alignment=64), key, value)
    with pytest.raises(ValueError, match=r"^base=[^\n]*$"):
        gguf_to_folder(path, tmp_path / "out")


@pytest.mark.parametrize("merges", [["a", "b"], ["a b c", "a b"], ["zz yy", "a b"]])
def test_merges_that_are_none_are_refused_in_one_line(merges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "MERGES", merges)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="smollm")
    with pytest.raises(ValueError, match=r"^base=[^\n]*$"):
        load_tokenizer(path)
