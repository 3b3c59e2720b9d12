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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .. import progress
from ..attention.layout import PADDING_DOCUMENT, Layout
from ..attention.mask import attention_mask
from ..attention.windows import short_spans
from ..model.forward import hidden_states
from ..model.head import output_head
from ..model.parts import backbone_of
from .layer_sight import layer_sight
from .row import FIRST, SPAN, distinct_tokens, each_part, edited, row_layout, stacked, who_sees_whom

logger = logging.getLogger(__name__)

_TRIES = 4
_CANNOT = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
    with progress.doing("proving the attention pattern"), _evaluated(model), short_spans(model, SPAN):
        attention_mask(model.config, layout)  # where the kernel takes no mask, that is the reason to give
        hidden = (
            _check_layers(model, attention, layout) if _has_gradients(model) else _check_reach(model, attention, layout)
        )
        _check_edits(model, attention, layout, hidden)
        tokens, _ = distinct_tokens(model, length)
        # Asked only where rounding does not decide: it is a forward, which bfloat16 never needs.
        effect = cache(partial(_effect_of_positions, model, tokens, layout, hidden[:1]))
        shuffled, causal = _shuffled_and_causal(model, tokens, layout)
        _check_order(model, attention, layout, shuffled, hidden[:1], effect)
        mask_free = attention == "bidirectional" and _agrees_without_mask(model, tokens, hidden)
        _check_causal_mode(model, tokens, causal, effect)
    return mask_free


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _forward(model: PreTrainedModel, tokens: Tensor, layout: Layout | None, dense: bool = False) -> Tensor:
    """Hidden states in float32 under one layout for all rows, None = the model called plainly; ValueError where it cannot."""
    try:
        rows = None if layout is None else each_part(layout, lambda x: x.expand(len(tokens), -1))
        hidden = hidden_states(model, tokens, rows, dense=dense).float()
    except torch.OutOfMemoryError:
        raise
    except _CANNOT as error:
        what = "does not run as it is" if layout is None else "does not take an explicit attention mask"
        raise _cannot(model, error, what) from error
    if not hidden.isfinite().all():
        raise ValueError(
            f"base={type(model).__name__}: computes NaN or infinity in {model.dtype}; try another dtype, or mend it"
        )
    return hidden


def _cannot(model: PreTrainedModel, error: Exception, what: str) -> Exception:
    if str(error).startswith(("base=", "model.")):  # ours
        return error
    reason = " ".join((str(error) or type(error).__name__).split())[:160]
    return ValueError(
        f"base={type(model).__name__}: {what} with {model.config._attn_implementation} attention ({reason})"
    )


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
            hidden.append(_forward(model, texts, layout).detach())

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


def _effect_of_positions(model: PreTrainedModel, tokens: Tensor, layout: Layout, hidden: Tensor) -> float:
    """How much positions twice as far apart, under the same mask, change the hidden states: what a mistake in them does."""
    lengths = layout.context_lengths
    spread = Layout(
        layout.document_ids, layout.view_ids, 2 * layout.position_ids, None if lengths is None else 2 * lengths
    )
    with short_spans(model, 2 * SPAN):
        return _difference(_forward(model, tokens[None], spread), hidden, layout)


def _difference(hidden: Tensor, expected: Tensor, layout: Layout | None = None) -> float:
    """|hidden - expected| / |expected|, the mean over real tokens."""
    relative = (hidden - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float((relative if layout is None else relative[layout.document_ids != PADDING_DOCUMENT]).mean())


def _is_rounding(model: PreTrainedModel, difference: float, effect: Callable[[], float]) -> bool:
    rounding = 128 * torch.finfo(model.dtype).eps
    return difference <= _tolerance(model) and (difference <= rounding or difference <= 0.1 * effect())


def _shuffled_and_causal(model: PreTrainedModel, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Hidden states of the row with its columns shuffled (put in order again), and of its beginning under our causal mask.

    [1, L, D] and [1, FIRST, D]; of one forward, because each reads all weights.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens.device)
    one_text = (torch.arange(len(tokens), device=tokens.device) < FIRST)[None]
    causal = Layout.of("prefix", one_text, num_prompt_tokens=len(tokens))
    both = stacked(each_part(layout, lambda x: x[:, order]), causal)
    hidden = _forward(model, torch.stack([tokens[order], tokens]), both, dense=True)
    return hidden[:1, order.argsort()], hidden[1:, :FIRST]


def _check_order(
    model: PreTrainedModel,
    attention: str,
    layout: Layout,
    shuffled: Tensor,
    hidden: Tensor,
    effect: Callable[[], float],
) -> None:
    difference = _difference(shuffled, hidden, layout)
    if not _is_rounding(model, difference, effect):
        raise ValueError(
            f"base={type(model).__name__}: goes by the column in which a token stands and not by the position that it is "
            f"given (shuffled columns change it by {difference:.0e}), so packed documents and {attention} attention would "
            "mislead it (ALiBi, positions counted from the mask, convolutions); choose another base model"
        )


def _check_causal_mode(model: PreTrainedModel, tokens: Tensor, ours: Tensor, effect: Callable[[], float]) -> None:
    with _as_causal(model):
        plain, logits = _plain(model, tokens[None, :FIRST])
    difference = _difference(ours, plain.float())
    if not _is_rounding(model, difference, effect):
        raise ValueError(
            f"base={type(model).__name__}: under our causal mask it differs by {difference:.0e} from what it computes by "
            "itself, so its layers or its positions are not what its config says; choose another base model"
        )
    _check_head(model, plain, logits)


@contextmanager
def _as_causal(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the config says causal, as the original's does."""
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    bidirectional = [config for config in configs.values() if getattr(config, "is_causal", True) is False]
    try:
        for config in bidirectional:
            config.is_causal = True
        yield
    finally:
        for config in bidirectional:
            config.is_causal = False


def _check_reach(model: PreTrainedModel, attention: str, layout: Layout) -> Tensor:
    """Where there is no gradient: a token moves those that see it, by more than nothing, in one of several texts."""
    length = layout.position_ids.shape[1]
    promised = torch.stack(who_sees_whom(model, layout)).any(0)
    real = (layout.document_ids[0] != PADDING_DOCUMENT)[:, None]
    unseen = promised & real
    tries = [_forward(model, edited(model, length, seed), layout) for seed in range(_TRIES)]
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
        plain.append(_forward(model, text.expand(FIRST, -1), None).detach())

    if _has_gradients(model):
        promised = who_sees_whom(model, Layout.of("bidirectional", torch.ones_like(text)))
        sights = layer_sight(model, forward, FIRST)
        agrees = all(torch.equal(sight.sees, promised[sight.index]) for sight in sights)
    else:
        forward()
        agrees = True
    expected = masked_hidden[:1, :FIRST]
    agrees &= bool((plain[0][:1] - expected).abs().amax() <= _tolerance(model) * expected.abs().amax())
    if not agrees:
        logger.warning(
            f"{type(model).__name__} ignores config.is_causal=False with {model.config._attn_implementation} attention: "
            "we pass an explicit mask, but a plain transformers load of this checkpoint stays causal"
        )
    return agrees


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-4 if torch.finfo(model.dtype).eps < 1e-6 else 0.1


def _plain(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states, logits) of a forward without a mask: of one, because each reads all weights."""
    seen: list[Any] = []
    backbones = {backbone_of(model), model.get_decoder() or model} - {model}  # OPT's forward calls the part of a part
    hooks = [part.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs)) for part in backbones]
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    except _CANNOT as error:
        raise _cannot(model, error, "does not run as it is") from error
    finally:
        for hook in hooks:
            hook.remove()
    hidden = [outputs.last_hidden_state for outputs in seen if hasattr(outputs, "last_hidden_state")]
    return hidden[-1], logits.float()  # ModernBERT's "decoder" is its head


def _check_head(model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
    wrong = f"base={type(model).__name__}: its logits are not its output embedding applied to its hidden states"
    try:
        ours = output_head(model)(hidden).float()
    except RuntimeError as error:  # a head that takes another width
        raise ValueError(wrong) from error
    if ours.shape != logits.shape or (ours - logits).abs().amax() > _tolerance(model) * logits.abs().amax():
        raise ValueError(wrong)
