"""The mask token: which string and row it is, and texts in which its string means nothing.

A token that the base keeps for nobody (reserved, unused) comes before a new one, because its row is there already. Wherever
text becomes tokens, `text_ids` is asked: a document that quotes the mask token's string is text, not a blank.
"""

from __future__ import annotations

import re
from typing import Any

DEFAULT_MASK_TOKEN = "<|mask|>"
# `<|reserved_special_token_0|>` of Llama 3 and SmolLM3, `<unused0>` of Gemma, `[control_8]` and `<SPECIAL_20>` of Mistral,
# `<|dummy_0|>` and `<|placeholder1|>` of Phi, `<|reserved_200000|>` of GPT-OSS, `<|EXTRA_0_TOKEN|>` of Cohere,
# `>>UNUSED_221<<` of Falcon 3, `<｜place▁holder▁no▁0｜>` of DeepSeek, `[UNUSED_TOKEN_141]` of InternLM.
_RESERVED = re.compile(
    r"(<[|｜]?|\[|>>)"
    r"(reserved|unused|extra|dummy|placeholder|place▁holder▁no|spare|control|special)(_special)?(_(token|id))?[_▁]?\d+(_token)?"
    r"([|｜]?>|\]|<<)",
    re.IGNORECASE,
)
_ROLES = ("bos", "cls", "eos", "pad", "sep", "unk")
_FURTHEST = 4096  # rows beyond the embedding; an added token with the id 10**9 would be as many rows


def add_mask_token(tokenizer: Any, num_rows: int, wanted: str | None, taken: frozenset[int]) -> tuple[int, int]:
    """(id of the mask token, rows that the embedding needs), having put the token into the tokenizer.

    wanted: the token; default is the tokenizer's own mask token, else the last reserved one with a row, else a new `<|mask|>`.
    taken: ids that mean something else (end of text, padding), which the config and generation_config know of.
    Raises ValueError for a token that occurs in text, that the chat template writes, or that the tokenizer splits.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    # What has a role in the base is not unused, whatever it is called.
    roles = {*taken, *(getattr(tokenizer, f"{name}_token_id") for name in _ROLES)}
    reserved = {
        vocabulary[token]: token for token in added if _RESERVED.fullmatch(token) and vocabulary[token] not in roles
    }
    # The last that has a row already, else the one that needs the fewest.
    best = max((i for i in reserved if i < num_rows), default=min(reserved, default=None))
    own = tokenizer.mask_token
    mask_token = wanted if wanted is not None else own or reserved.get(best, DEFAULT_MASK_TOKEN)
    is_ordinary = mask_token in vocabulary and mask_token not in added
    if is_ordinary or not re.search(r"[^\w\s.,;:!?'\"()-]", mask_token):
        raise ValueError(f"mask_token={mask_token}: occurs in plain text; choose an unused special token, or a new one")
    if mask_token != mask_token.strip() or not mask_token.isprintable():
        raise ValueError(f"mask_token={mask_token!r}: begins or ends in space, or cannot be printed; try <|mask|>")
    if mask_token in str(tokenizer.chat_template):
        raise ValueError(
            f"mask_token={mask_token}: the chat template writes it; choose an unused special token, or a new one"
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})
    mask_token_id = tokenizer.mask_token_id
    check_whole(tokenizer)
    if mask_token_id in roles:
        raise ValueError(
            f"mask_token={mask_token}: is the tokenizer's end, start or padding token; choose an unused one"
        )
    if mask_token_id >= num_rows + _FURTHEST:
        raise ValueError(
            f"mask_token={mask_token}: the tokenizer gives it the id {mask_token_id}, but the embedding has {num_rows} rows; "
            "is it the tokenizer of another model?"
        )
    return mask_token_id, max(num_rows, mask_token_id + 1)


def check_whole(tokenizer: Any) -> None:
    """ValueError unless the mask token is one token wherever it stands: alone, in a word, twice in a row, between spaces."""
    token, own = tokenizer.mask_token, tokenizer.mask_token_id
    for text, count in ((token, 1), (token * 2, 2), (f"a{token}b", 1), (f"a {token} b", 1), (f"{token}\n{token}", 2)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids.count(own) != count or (not set(text) - set(token) and len(ids) != count):
            raise ValueError(
                f"mask_token={token}: the tokenizer splits or changes it; choose another string, like {DEFAULT_MASK_TOKEN}"
            )
