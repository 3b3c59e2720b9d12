"""Proof by experiment that a loaded model attends as promised.

A name on a list proves nothing: StableLM and Nemotron ignore `config.is_causal = False` under SDPA and stay silently
causal (transformers 5.23). So every converted and every loaded model is probed with the kernel and dtype that it will
run with, on one packed row of two documents and padding:

    edits         no token moves another that it must not reach, through all layers together
    layers        each layer by itself sees what its kind of attention says, no key more, no key less (`layer_sight`)
    causal mode   under our causal mask the model computes what it computes by itself: nothing but the mask has changed
    order         with its columns shuffled the row gives the same: a token's place is its position, not its column
    head          our head on our hidden states gives the model's logits

Sliding windows and chunks are cut to SPAN tokens meanwhile, in the config that transformers and we read, so that the short row
reaches beyond them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.layout import PADDING_DOCUMENT, Layout
from ..attention.mask import attention_mask
from ..attention.windows import short_spans
from .layer_sight import layer_sight
from .row import FIRST, SPAN, distinct_tokens, edited, row_layout, who_sees_whom
from .same_numbers import (
    check_causal_mode,
    check_order,
    effect_of_positions,
    forward_under,
    shuffled_and_causal,
    tolerance,
)

logger = logging.getLogger(__name__)

_TRIES = 4


@torch.no_grad()
def probe(model: PreTrainedModel, attention: str, clean_context: str | None = None) -> bool:
    """Raises ValueError unless the model attends as `attention` ("bidirectional", "block", "prefix" or "causal") says.

    Returns whether one unpadded document needs no mask at all, because `config.is_causal = False` alone makes this
    model bidirectional; where it does not, the mask is passed always, and a warning says that a plain load stays
    causal.

    Whether a key is seen is asked of gradients, which are exactly zero for a masked key and not for another, in any dtype
    and at any scale of the weights. What is compared as numbers (causal mode, order, head) is held against rounding and, where
    rounding is smaller, against what wrong positions would do, so that weights which hardly use them cannot hide a mistake.
    """
    layout = row_layout(attention, clean_context, model.device)
    length = layout.position_ids.shape[1]
    with _evaluated(model), short_spans(model, SPAN):
        attention_mask(model.config, layout)  # where the kernel takes no mask, that is the reason to give
        hidden = (
            _check_layers(model, attention, layout) if _has_gradients(model) else _check_reach(model, attention, layout)
        )
        _check_edits(model, attention, layout, hidden)
        tokens, _ = distinct_tokens(model, length)
        # Asked only where rounding does not decide: it is a forward, which bfloat16 never needs.
        effect = cache(partial(effect_of_positions, model, tokens, layout, hidden[:1]))
        shuffled, causal = shuffled_and_causal(model, tokens, layout)
        check_order(model, attention, layout, shuffled, hidden[:1], effect)
        mask_free = attention == "bidirectional" and _agrees_without_mask(model, tokens, hidden)
        check_causal_mode(model, tokens, causal, effect)
    return mask_free


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_edits(model: PreTrainedModel, attention: str, layout: Layout, hidden: Tensor) -> None:
    """Nothing reaches, through all layers and by any way, what it must not."""
    reachable = torch.eye(layout.position_ids.shape[1], dtype=torch.bool, device=hidden.device)
    for sees in who_sees_whom(model, layout):
        reachable = (sees.float() @ reachable.float()) > 0
    moved = (hidden[1:] - hidden[:1]).abs().amax(-1).T / hidden.abs().amax(-1).mean()  # [query, edited key]
    noise = 1e-5 if torch.finfo(model.dtype).eps < 1e-6 else 1e-3
    leaked = ~reachable & (moved > noise)
    if leaked.any():
        raise _wrong(model, attention, "", leaked, "sees, but should not,")


def _check_layers(model: PreTrainedModel, attention: str, layout: Layout) -> Tensor:
    """Every layer by itself sees what it should and nothing else; the hidden states [1 + L, L, D] of the first try, for the edits."""
    length = layout.position_ids.shape[1]
    promised = who_sees_whom(model, layout)
    real = (layout.document_ids[0] != PADDING_DOCUMENT)[:, None]  # what padding sees is nobody's business
    unseen: list[Tensor] = []
    hidden: list[Tensor] = []
    for seed in range(_TRIES):  # a key may be seen with a weight that underflows, but not for all texts
        texts = edited(model, length, seed)

        def forward(texts: Tensor = texts) -> None:
            hidden.append(forward_under(model, texts, layout).detach())

        sights = layer_sight(model, forward, length)
        for sight in sights:
            leaked = sight.sees & ~promised[sight.index] & real
            if leaked.any():
                which = [s.index for s in sights if (s.sees & ~promised[s.index] & real).any()]
                raise _wrong(model, attention, _named(which, sight.layer), leaked, "sees, but should not,")
        missing = [~sight.sees & promised[sight.index] & real for sight in sights]
        unseen = [m & u for m, u in zip(missing, unseen or missing, strict=True)]
        if not any(u.any() for u in unseen):
            return hidden[0]
    which = [i for i, u in enumerate(unseen) if u.any()]
    first = which[0]
    raise _wrong(
        model,
        attention,
        _named([sights[i].index for i in which], sights[first].layer),
        unseen[first],
        "does not see, but should,",
    )


def _named(indices: list[int], layer: str) -> str:
    return f" in layers {sorted(set(indices))} ({layer})"


def _wrong(model: PreTrainedModel, attention: str, where: str, pairs: Tensor, what: str) -> ValueError:
    query, key = (int(i) for i in pairs.nonzero()[0])
    return ValueError(
        f"attention={attention}: the probe failed on {type(model).__name__} with "
        f"{model.config._attn_implementation} attention:{where} the token at place {query} {what} the one at {key}; "
        "try another model.attn_implementation (eager, flex_attention, sdpa, sdpa_pieces), or another base model"
    )


def _check_reach(model: PreTrainedModel, attention: str, layout: Layout) -> Tensor:
    """Where there is no gradient: a token moves those that see it, by more than nothing, in one of several texts."""
    length = layout.position_ids.shape[1]
    promised = torch.stack(who_sees_whom(model, layout)).any(0)
    real = (layout.document_ids[0] != PADDING_DOCUMENT)[:, None]
    unseen = promised & real
    tries = [forward_under(model, edited(model, length, seed), layout) for seed in range(_TRIES)]
    for hidden in tries:
        unseen &= (hidden[1:] == hidden[:1]).all(-1).T
    if unseen.any():
        raise _wrong(model, attention, "", unseen, "does not see, but should,")
    return tries[0]


def _has_gradients(model: PreTrainedModel) -> bool:
    """FlexAttention on a CPU is forward only."""
    return model.config._attn_implementation != "flex_attention" or model.device.type != "cpu"


def _agrees_without_mask(model: PreTrainedModel, tokens: Tensor, masked_hidden: Tensor) -> bool:
    text = tokens[None, :FIRST]
    plain: list[Tensor] = []

    def forward() -> None:
        plain.append(forward_under(model, text.expand(FIRST, -1), None).detach())

    if _has_gradients(model):
        promised = who_sees_whom(model, Layout.of("bidirectional", torch.ones_like(text)))
        sights = layer_sight(model, forward, FIRST)
        agrees = all(torch.equal(sight.sees, promised[sight.index]) for sight in sights)
    else:
        forward()
        agrees = True
    expected = masked_hidden[:1, :FIRST]
    agrees &= bool((plain[0][:1] - expected).abs().amax() <= tolerance(model) * expected.abs().amax())
    if not agrees:
        logger.warning(
            f"{type(model).__name__} ignores config.is_causal=False with {model.config._attn_implementation} attention: "
            "we pass an explicit mask, but a plain transformers load of this checkpoint stays causal"
        )
    return agrees
