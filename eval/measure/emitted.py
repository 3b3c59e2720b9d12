"""What a model emitted: the text before the first stop, and how many tokens that text is. One rule for all arms.

Tokens are counted on the emitted text with one tokenizer (the base's): what comes after the stop, end-of-text, padding
and special tokens do not count, and an arm gains nothing by spelling the same text in more tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapt.tokens import text_ids


class Stop:
    """Callable on a row's settled new tokens: True once its text holds a stop string (or end-of-text).

    Asked after every round by the diffusion sampler and after every token by `generate`, so that both kinds of arm end
    a row at the same place. `tail_tokens`: how many last tokens are enough to see a stop that has just been completed.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.until = [text for text in until if text]
        self.eos_ids = frozenset(eos_ids)
        # A token may hold as little as one byte of the stop string; 4 more cover a character that is cut in two.
        self.tail_tokens = 4 + max((len(text.encode()) for text in self.until), default=0)

    def __call__(self, tokens: list[int]) -> bool:
        if not self.eos_ids.isdisjoint(tokens):
            return True
        if not self.until:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self.until)


def emitted_text(tokenizer: Any, tokens: Sequence[int], until: Sequence[str], eos_ids: Sequence[int] = ()) -> str:
    """Text of the new tokens up to the first end-of-text or stop string, without special tokens.

    The stop is looked for before special tokens are dropped, because tasks stop at strings such as `<|im_end|>`.
    """
    ends = frozenset(eos_ids)
    kept = list(tokens)
    for i, token in enumerate(kept):
        if token in ends:
            kept = kept[:i]
            break
    text = tokenizer.decode(kept, skip_special_tokens=False)
    at = min((text.find(stop) for stop in until if stop and stop in text), default=-1)
    if at >= 0:
        text = text[:at]
    for special in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        text = text.replace(special, "")
    return text


def count_tokens(tokenizer: Any, text: str, spent: Sequence[int], eos_ids: Sequence[int] = ()) -> int:
    """Tokens of the emitted text under `tokenizer`, and never more than the model itself `spent` before end-of-text.

    The cap matters where a text does not survive the round trip: half a character decodes to a replacement character,
    which costs three bytes to spell.
    """
    ends = frozenset(eos_ids)
    before_end = next((i for i, token in enumerate(spent) if token in ends), len(spent))
    return min(before_end, len(text_ids(tokenizer, text, add_special_tokens=False)))


def end_of_text_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the tokenizer's eos and those of the model's generation config."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list | tuple) else [declared]
    return sorted({i for i in (tokenizer.eos_token_id, *declared) if i is not None})
