"""Text, chats and texts with blanks to token ids, prompts to a batch: the mask token's own string is text like any other."""

from __future__ import annotations

import copy
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Chat = list[dict[str, str]]
"""messages: [{"role": "user", "content": "..."}]"""
_BLANK = re.compile(r" *\[\?(\d*)\]")  # a blank takes the place of " word": the space before it is part of its token
_DIGITS = 9  # of a blank's number; Python refuses to read one of thousands
_RENDERING = 10.0  # seconds of the processor for one chat; a template takes a millisecond
_BLANK_MARK = "\ue000[?]\ue001"  # in private characters, so that a text may quote the mask token


def text_ids(tokenizer: Any, text: str, *, blank: str | None = None, **options: Any) -> list[int]:
    """Token ids of a text in which the mask token's own string is text like any other; options go to the tokenizer.

    blank: a string that stands for the mask token instead; it must not occur in the text with any other meaning.
    """
    token = tokenizer.mask_token
    if token is None or (blank is None and token not in text):
        return tokenizer(text, **options)["input_ids"]
    if not tokenizer.is_fast:  # slow ones cannot be told of one token alone
        plain = {"split_special_tokens": True} if blank is None else {}
        return tokenizer(text if blank is None else text.replace(blank, token), **plain, **options)["input_ids"]
    renamed, marker_id = _with_another_name(tokenizer, blank)
    ids = renamed(text, **options)["input_ids"]
    if blank is None:
        assert tokenizer.mask_token_id not in ids, "without its name the mask token cannot be written"
        return ids
    return [tokenizer.mask_token_id if i == marker_id else i for i in ids]


_renamed: WeakKeyDictionary[Any, dict[str | None, tuple[Any, int | None]]] = WeakKeyDictionary()


def _with_another_name(tokenizer: Any, name: str | None) -> tuple[Any, int | None]:
    """(the tokenizer, whose mask token is called `name` or has no name at all; the id of that name)."""
    made = _renamed.setdefault(tokenizer, {})
    if name not in made:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        [entry] = [token for token in state["added_tokens"] if token["content"] == tokenizer.mask_token]
        if name is None:
            state["added_tokens"].remove(entry)
        else:
            entry["content"] = name
        renamed = copy.deepcopy(tokenizer)
        renamed._tokenizer = Tokenizer.from_str(json.dumps(state))
        made[name] = renamed, None if name is None else renamed.backend_tokenizer.token_to_id(name)
    return made[name]


def prompt_ids(tokenizer: Any, prompt: str | Chat) -> list[int]:
    """Token ids of a prompt, or of a chat up to where the answer begins."""
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    text = chat_text(tokenizer, prompt, "chat", add_generation_prompt=True)
    return text_ids(tokenizer, text, add_special_tokens=False)  # as in training: a template has them all


def chat_text(tokenizer: Any, messages: Chat, what: str, **options: Any) -> str:
    """The chat as text, by the tokenizer's template; ValueError, of `what`, where there is none, or it raises or does not end.

    A template is a program of the model's author, in a sandbox: it calls nothing, but it may loop.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{what}: the tokenizer of this checkpoint has no chat template; give the prompt as plain text"
        )
    with template_errors(what):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@contextmanager
def template_errors(what: str) -> Iterator[None]:
    """Inside, a chat template that raises, or does not end, is a ValueError of `what`."""
    try:
        with _no_longer_than(_RENDERING):
            yield
    except (Exception, _TooLongError) as error:  # a template may raise whatever Python does
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{what}: the tokenizer's chat template does not take this chat ({type(error).__name__}: {reason}); mend the chat, or the "
            "template, or give the prompt as plain text"
        ) from error


class _TooLongError(BaseException):
    """No Exception, so that no template's own handling takes it for one."""


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """Ends what runs inside after that much time of the processor; without a bound outside of the main thread, and on Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLongError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_prompts(prompts: Sequence[str | Chat], batch_size: int) -> None:
    """ValueError for what can be refused before a model is there."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    for prompt in prompts:
        if not prompt:
            raise ValueError(f"prompt={prompt!r}: is empty; write at least one word to continue")


def num_blanks(text: str) -> int:
    """Tokens that the blanks of a text ask for, before any is made: [?] one, [?n] n; ValueError where it has none."""
    shown = f"infill={text!r:.60}"
    numbers = [blank.group(1) for blank in _BLANK.finditer(text)]
    if not numbers:
        raise ValueError(f"{shown}: has no blank; write [?] for one token, [?4] for four")
    if any(len(number) > _DIGITS or (number and int(number) == 0) for number in numbers):
        raise ValueError(
            f"{shown}: a blank takes 1 token or more, and no more than the model has positions; write [?4]"
        )
    return sum(int(number or 1) for number in numbers)


def ids_with_blanks(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with mask tokens at its blanks: [?] one token, [?n] n tokens; ValueError where it has none."""
    num_blanks(text)
    if _BLANK_MARK in text:
        raise ValueError(f"infill={text!r}: holds {_BLANK_MARK!r}, which stands for a blank here; write [?]")
    masked = _BLANK.sub(lambda blank: _BLANK_MARK * int(blank.group(1) or 1), text)
    return text_ids(tokenizer, masked, blank=_BLANK_MARK)


def start_token_id(tokenizer: Any) -> int:
    """What stands before a text whose first token needs a predictor: start-of-text, or else end-of-text."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def pad_token_id(tokenizer: Any) -> int:
    """What fills a row up where nobody looks: the tokenizer's padding token, or else end-of-text."""
    return (tokenizer.eos_token_id or 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def left_padded(
    tokenizer: Any, rows: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(input_ids [B, P], attention_mask [B, P]) of prompts that all end in the last column."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    padding: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(tensors, padding_value=pad_token_id(tokenizer), **padding)
    attention_mask = pad_sequence([torch.ones_like(row) for row in tensors], **padding)
    return input_ids.to(device), attention_mask.to(device)
