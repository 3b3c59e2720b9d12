"""Experiments on a converted model that share nothing with the converter's own probe: words for the pattern, float64, all logits.

`check` takes the original and the converted model and says by AssertionError what does not hold. In float64 a token that is seen
moves a logit by much more than rounding, and one that is not moves none.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from architecture_sizes import SPAN, VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapt.attention.layout import Layout
from adapt.lm import DiffusionLM
from adapt.model.forward import hidden_states
from adapt.model.head import output_head

ATTENTIONS = ("bidirectional", "block", "prefix")
ROUNDING = 1e-6
"""of the largest logit: what a token that is not seen may move, through float32 norms and the batching of experts"""
AGREES = 1e-5
"""of the largest logit: several models compute norms and softmax in float32 whatever their dtype"""


class Token(NamedTuple):
    document: int
    """0 is padding"""
    view: int
    """0 is the clean text; the others are noisy copies of stretches of it"""
    position: int
    sees: int = 0
    """noisy tokens: how much of the clean text"""


ROWS = {
    "bidirectional": [Token(1, 1, i) for i in range(9)] + [Token(2, 1, i) for i in range(5)] + [Token(0, 1, 0)] * 2,
    "prefix": [Token(1, 0, i) for i in range(5)]
    + [Token(1, 1, i, 5) for i in range(5, 9)]
    + [Token(1, 2, i, 5) for i in range(5, 7)]
    + [Token(2, 0, 0), Token(2, 1, 1, 1), Token(2, 1, 2, 1), Token(0, 0, 0)],
    # Blocks of four after a prompt of four: two of them, and one of another document.
    "block": [Token(1, 0, i) for i in range(8)]
    + [Token(1, 1, i, 4) for i in range(4, 8)]
    + [Token(1, 2, i, 8) for i in range(8, 10)]
    + [Token(2, 0, i) for i in range(4)]
    + [Token(2, 1, i, 4) for i in range(4, 8)]
    + [Token(0, 0, 0)] * 2,
}


def in_words(query: Token, key: Token, kind: str) -> bool:
    """Whether a layer of that kind lets the query see the key."""
    if query.document != key.document:
        return False
    if kind == "chunked_attention" and query.position // SPAN != key.position // SPAN:
        return False
    distance = query.position - key.position
    if kind == "sliding_attention" and abs(distance) > (SPAN - 1 if query.view == 0 else SPAN):
        return False
    if key.view == 0:
        return distance >= 0 if query.view == 0 else key.position < query.sees
    return key.view == query.view


def check(original: PreTrainedModel, lm: DiffusionLM) -> str:
    """The kernels that agree. AssertionError where the converted model does not attend as its checkpoint promises."""
    dtype = original.dtype
    with torch.no_grad():
        try:
            for model in (original, lm.model):
                model.set_experts_implementation("eager")  # the others know no float64
                model.double()(input_ids=_random(1, 4), use_cache=False)
        except RuntimeError:  # XGLM neither
            original.float(), lm.model.float()
    try:
        with torch.no_grad():
            _check_edits(lm)
            _check_separate(lm)
            _check_by_hand(lm)
            _check_causal(original, lm)
            return _check_kernels(lm)
    finally:
        original.to(dtype), lm.model.to(dtype)


def _random(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY - 8, (rows, length), generator=torch.Generator().manual_seed(7))


def _layout(row: list[Token], rows: int = 1) -> Layout:
    documents, views, positions, sees = (torch.tensor(column).expand(rows, -1) for column in zip(*row, strict=True))
    return Layout(documents, views, positions, torch.where(views == 0, positions + 1, sees))


def _logits(lm: DiffusionLM, tokens: Tensor, layout: Layout) -> Tensor:
    return output_head(lm.model)(hidden_states(lm.model, tokens, layout))


def kinds_of(model: PreTrainedModel) -> list[str]:
    """What each layer is, as its config says."""
    config: Any = model.config
    if getattr(config, "layer_types", None):
        return list(config.layer_types)
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def _close(ours: Tensor, expected: Tensor, what: str, rounding: float = AGREES) -> None:
    difference = float((ours - expected).abs().max() / expected.abs().max())
    assert difference <= rounding, f"{what}: differs by {difference:.1e}"


def _check_edits(lm: DiffusionLM) -> None:
    """A token moves the logits of those that see it, and of no others."""
    row = ROWS[lm.spec.attention]
    length = len(row)
    tokens = _random(1, length)
    edited = torch.where(torch.eye(length).bool(), (tokens - 2 + 11) % (VOCABULARY - 10) + 2, tokens)
    logits = _logits(lm, torch.cat([tokens, edited]), _layout(row, length + 1))
    moved = (logits[1:] - logits[:1]).abs().amax(-1).T / logits.abs().max()  # [query, edited key]
    seen = [torch.tensor([[in_words(q, k, kind) for k in row] for q in row]) for kind in kinds_of(lm.model)]
    reachable = torch.eye(length).bool()
    for layer in seen:
        reachable = (layer.double() @ reachable.double()) > 0
    real = torch.tensor([token.document != 0 for token in row])[:, None]
    direct = torch.stack(seen).any(0) & real
    assert (moved[~reachable] < ROUNDING).all(), f"a hidden token moves another by {moved[~reachable].max():.1e}"
    assert (moved[direct] > 10 * ROUNDING).all(), (
        f"a token that is seen moves another by {moved[direct].min():.1e} only"
    )


def _check_separate(lm: DiffusionLM) -> None:
    """Each text and each block alone gives what it gives in the packed row."""
    row = ROWS[lm.spec.attention]
    tokens = _random(1, len(row))
    packed = _logits(lm, tokens, _layout(row))
    for document, view in sorted({(token.document, token.view) for token in row if token.document}):
        alone = [i for i, t in enumerate(row) if (t.document, t.view) == (document, view)]
        sees = max(row[i].sees for i in alone) if view else 0
        before = [i for i, t in enumerate(row) if view and (t.document, t.view) == (document, 0) and t.position < sees]
        columns = before + alone
        layout = _layout([row[i] for i in columns])
        _close(_logits(lm, tokens[:, columns], layout)[:, -len(alone) :], packed[:, alone], "packed is not separate")


def _check_by_hand(lm: DiffusionLM) -> None:
    """A plain call of the model, with masks written from the words, gives the logits that we compute."""
    row = ROWS[lm.spec.attention]
    tokens, kinds = _random(1, len(row)), kinds_of(lm.model)
    eager = lm.model.config._attn_implementation == "eager"
    masks = {}
    for kind in set(kinds):
        seen = torch.tensor([[in_words(q, k, kind) for k in row] for q in row])[None, None]
        masks[kind] = (
            torch.zeros(seen.shape, dtype=lm.model.dtype).masked_fill(~seen, torch.finfo(torch.float32).min)
            if eager
            else seen
        )
    mixed = any(kind != "full_attention" for kind in kinds) and getattr(lm.model.config, "layer_types", None)
    position_ids = torch.tensor([[token.position for token in row]])
    plain: Any = lm.model
    outputs = plain(
        input_ids=tokens,
        attention_mask=masks if mixed else masks[kinds[0]],
        position_ids=position_ids,
        use_cache=False,
    )
    real = torch.tensor([token.document != 0 for token in row])
    _close(_logits(lm, tokens, _layout(row))[:, real], outputs.logits[:, real], "our logits are not the model's")


def _check_causal(original: PreTrainedModel, lm: DiffusionLM) -> None:
    """With the causal mask back the logits are the original's, but for the mask token's column."""
    tokens = _random(2, 14)
    expected = original(input_ids=tokens, use_cache=False).logits
    ours = _logits(lm, tokens, Layout.of("prefix", torch.ones_like(tokens), num_prompt_tokens=14))
    columns = torch.arange(expected.shape[-1]) != lm.spec.mask_token_id
    _close(
        ours[..., : expected.shape[-1]][..., columns], expected[..., columns], "the causal mode is not the original's"
    )


def _with_kernel(lm: DiffusionLM, kernel: str) -> DiffusionLM:
    lm.model.set_attn_implementation(kernel)
    if lm.model.config._attn_implementation == kernel:
        return lm
    # Falcon and CodeGen take a kernel when they are made only, and otherwise stay with theirs.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(lm.model.config), attn_implementation=kernel, trust_remote_code=False
    )
    model.load_state_dict(lm.model.state_dict())
    return dataclasses.replace(lm, model=model.to(lm.model.dtype).eval())


def _check_kernels(lm: DiffusionLM) -> str:
    """Every kernel that the model can run gives the same."""
    row = ROWS[lm.spec.attention]
    tokens, real = _random(1, len(row)), torch.tensor([token.document != 0 for token in row])
    before = lm.model.config._attn_implementation
    expected = _logits(lm, tokens, _layout(row))[:, real]
    agreed = []
    try:
        for kernel in ("eager", "sdpa", "sdpa_pieces"):
            try:
                ours = _logits(_with_kernel(lm, kernel), tokens, _layout(row))[:, real]
            except (ImportError, KeyError, RuntimeError, ValueError):
                continue
            _close(ours, expected, f"{kernel} is not {before}")
            agreed.append(kernel)
    finally:
        lm.model.set_attn_implementation(before)
    return ", ".join(agreed)
