"""What a GGUF's `tokenizer.ggml.pre` stands for: how a byte-level tokenizer cut text when its model was taught.

A GGUF stores the name of the rule and not the rule. transformers rebuilds some; where it does not know the name it cuts as GPT-2
does, without a word. Here the rule of a name is held against what the rebuilt tokenizer does to a text that tells them
apart, and put in its place where the two differ. The rules are those of the models' own tokenizer.json, in the families that
llama.cpp (llama-vocab.cpp) has names for; it holds them against the originals in its tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers, processors

PROBE = (
    "It's 1234567 or 12 x1y2 3.14 $5,000; DON'T  we'LL camelCase HTMLParser stop.\nnext\tTabs\n\n  new\r\nline   \n end  "
    "(a)/b_c-d #tag <b>`x`|~ != café cafe\u0301 naïveté ΑΒγδ Привет 日本語テキスト 한국어 हिन्दी ไทย ½ ² ٣٤٥ \u00a0nbsp "
    "\u3000wide 😀👍🏽 a…b “quotes”  "
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cased(end: str, digits: str) -> str:
    """Words cut before a capital, as o200k (gpt-4o) and tekken do; `end` is what may follow a word."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Rule:
    """How text is cut into pieces, inside of which tokens are merged."""

    splits: tuple[str, ...]
    """regexes, one after the other: what a regex matches is a piece, and what lies between is one"""
    nfc: bool = False
    """text is composed first (Unicode NFC)"""
    words_first: bool = False
    """a piece that is a token is that token, whatever the merges say"""
    bos: bool = False
    """texts start with start-of-text where the file does not say"""


def _family(names: str, *splits: str, **options: bool) -> dict[str, Rule]:
    return {name: Rule(splits, **options) for name in names.split()}


RULES: dict[str, Rule] = {
    **_family("a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais mellum phi-2 trillion", _GPT2),
    **_family("mpt olmo", _GPT2, nfc=True),
    **_family("codeshell exaone mellum2 minerva-7b refact smollm starcoder", r"\p{N}", _GPT2),
    **_family("command-r", r"\p{N}", _GPT2, nfc=True),
    **_family("falcon3 falcon-h1 lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral", _LLAMA3, words_first=True, bos=True),
    **_family("chatglm-bpe dbrx glm4 smaug-bpe", _LLAMA3),
    **_family("qwen2", _QWEN2, nfc=True),
    **_family(
        "bailingmoe bailingmoe2 deepseek-r1-qwen grok-2 hunyuan kormo llada-moe megrez solar-open stablelm2", _QWEN2
    ),
    **_family("qwen35", _QWEN35, nfc=True),
    **_family("tekken", _cased("", r"\p{N}"), words_first=True, bos=True),
    **_family("gpt-4o kanana2 llama4 minimax-m2 talkie", _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
    **_family("deepseek-v3 hunyuan-dense joyai-llm", *_DEEPSEEK3),
    **_family("deepseek-coder", "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    **_family("falcon", *_FALCON),
    **_family("bloom gpt3-finnish poro-chat", _BLOOM),
    **_family("viking", _BLOOM, r"\p{N}"),
    **_family("seed-coder", _SEED_CODER),
}
"""By the value of `tokenizer.ggml.pre`."""


def restore(tokenizer: Any, name: str | None, adds_bos: bool | None) -> None:
    """Makes a byte-level tokenizer, in place, cut text as `name` says; adds_bos: `tokenizer.ggml.add_bos_token`, None if absent.

    ValueError for a name that neither we nor transformers know.
    """
    backend = tokenizer.backend_tokenizer
    rule = RULES.get(name or "")
    if rule is None:
        # transformers puts something else than plain GPT-2 splitting there where it knows the name.
        if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            raise ValueError(
                f"tokenizer.ggml.pre={name}: this GGUF's pre-tokenizer cannot be rebuilt (known: {', '.join(sorted(RULES))}); "
                "convert the model from its Hugging Face folder instead"
            )
        return
    wanted = pre_tokenizer_of(rule.splits)
    if backend.pre_tokenizer.pre_tokenize_str(PROBE) != wanted.pre_tokenize_str(PROBE):
        backend.pre_tokenizer = wanted
    if rule.nfc and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()
    if rule.words_first:
        backend.model.ignore_merges = True
    if (rule.bos if adds_bos is None else adds_bos) and tokenizer.bos_token is not None:
        _start_with(tokenizer, tokenizer.bos_token)


def pre_tokenizer_of(splits: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts by the regexes one after the other, and spells bytes as byte-level vocabularies do."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(split), "isolated") for split in splits), byte_level])


def _start_with(tokenizer: Any, bos: str) -> None:
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = template
