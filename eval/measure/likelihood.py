"""Likelihood of held-out text: the original's exact loss against the adapted model's bound, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapt.decoding.likelihood import nelbo
from adapt.progress import doing
from adapt.tokens import text_ids

from .corpus import texts_of

_CHUNK = 8


def windows_of(corpus: str | Path, tokenizer: Any, *, seq_len: int, max_tokens: int) -> list[list[int]]:
    """Whole windows of seq_len tokens, text by text, until max_tokens; ValueError if no text is long enough."""
    windows: list[list[int]] = []
    for text in texts_of(corpus):
        tokens = text_ids(tokenizer, text, add_special_tokens=False, verbose=False)  # long texts are cut below
        for at in range(0, len(tokens) - seq_len + 1, seq_len):
            windows.append(tokens[at : at + seq_len])
            if len(windows) * seq_len >= max_tokens:
                return windows
    if not windows:
        raise ValueError(f"corpus={corpus}: no text of {seq_len} tokens or more; give longer texts")
    return windows


@torch.inference_mode()
def nll(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Nats of all tokens but the first of each window, summed, under an autoregressive model."""
    total = 0.0
    for at in range(0, len(windows), _CHUNK):
        ids = torch.tensor([list(w) for w in windows[at : at + _CHUNK]], device=model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total


def likelihood_row(
    corpus: str | Path,
    base: Any,
    lm: Any,
    tokenizer: Any,
    *,
    seq_len: int = 256,
    max_tokens: int = 4096,
    num_samples: int = 32,
    seed: int = 1234,
    progress: bool = True,
) -> dict[str, Any]:
    """A row of the report's `likelihood`: nats per token of `base` (exact) and of `lm` (upper bound, Monte-Carlo stderr).

    Each window's first token is given; all others are scored, by both arms.
    """
    windows = windows_of(corpus, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
    scored = len(windows) * (seq_len - 1)
    size = sum(len(tokenizer.decode(w[1:]).encode()) for w in windows)
    with doing("held-out likelihood of the original", shown=progress):
        base_nats = nll(base, windows)
    bound, variance = 0.0, 0.0
    with doing("held-out likelihood of the adapted model", total=len(windows), shown=progress) as task:
        for at in range(0, len(windows), _CHUNK):
            chunk = windows[at : at + _CHUNK]
            for one in nelbo(
                lm, [w[:1] for w in chunk], [w[1:] for w in chunk], num_samples=num_samples, seed=seed + at
            ):
                bound, variance = bound + one.nats, variance + one.stderr**2
            task.update(len(chunk))
    return {
        "corpus": Path(corpus).name,
        "unit": "nats/token",
        "base_nll": base_nats / scored,
        "adapted_nelbo": bound / scored,
        "mc_stderr": math.sqrt(variance) / scored,
        "bits_per_byte": {"base": base_nats / math.log(2) / size, "adapted": bound / math.log(2) / size},
        "tokens": scored,
        "num_samples": num_samples,
    }
