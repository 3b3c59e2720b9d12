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

from .attention import PADDING_DOCUMENT, Layout, attention_mask, layer_windows, mask_rule, short_spans
from .layer_sight import layer_sight
from .model import backbone_of, hidden_states, output_head

logger = logging.getLogger(__name__)

SPAN = 3
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

_FIRST = 6  # tokens of the first document: two windows of SPAN, so that it reaches beyond one
_DOCUMENTS = [1] * _FIRST + [2] * 4 + [PADDING_DOCUMENT]
_POSITIONS = [*range(_FIRST), *range(4), 0]
_VIEWS = {"prefix": [0] * 3 + [1] * 3 + [0] * 2 + [1] * 2 + [0], "causal": [0] * 11}
# Blocks of two: the clean copy of four (or two) tokens, then noised blocks at positions 2 and 4 that see what is before them.
_BLOCK_DOCUMENTS = [1] * 8 + [2] * 4 + [PADDING_DOCUMENT]
_BLOCK_VIEWS = [0] * 4 + [1] * 2 + [2] * 2 + [0] * 2 + [1] * 2 + [0]
_BLOCK_POSITIONS = [0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 2, 3, 0]
_BLOCK_SEES = {
    "block": [2, 2, 4, 4, 2, 2, 4, 4, 2, 2, 2, 2, 1],
    "causal": [1, 2, 3, 4, 2, 2, 4, 4, 1, 2, 2, 2, 1],
}


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
    layout = _layout(attention, clean_context, model.device)
    length = layout.position_ids.shape[1]
    with _evaluated(model), short_spans(model, SPAN):
        attention_mask(model.config, layout)  # where the kernel takes no mask, that is the reason to give
        hidden = (
            _check_layers(model, attention, layout) if _has_gradients(model) else _check_reach(model, attention, layout)
        )
        _check_edits(model, attention, layout, hidden)
        tokens, _ = _distinct_tokens(model, length)
        # Asked only where rounding does not decide: it is a forward, which bfloat16 never needs.
        effect = cache(partial(_effect_of_positions, model, tokens, layout, hidden[:1]))
        causal_hidden = _check_order(model, attention, tokens, layout, hidden[:1], effect)
        mask_free = attention == "bidirectional" and _agrees_without_mask(model, tokens, hidden)
        _check_causal_mode(model, tokens, causal_hidden, effect)
    return mask_free


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _layout(attention: str, clean_context: str | None, device: torch.device) -> Layout:
    """The row, [1, L]."""
    parts: list[list[int]] = [_DOCUMENTS, _VIEWS.get(attention, [1] * len(_DOCUMENTS)), _POSITIONS]
    if attention == "block":
        parts = [_BLOCK_DOCUMENTS, _BLOCK_VIEWS, _BLOCK_POSITIONS, _BLOCK_SEES[clean_context or "causal"]]
    return Layout(*(torch.tensor(part, device=device)[None] for part in parts))


def _each(layout: Layout, change: Callable[[Tensor], Tensor]) -> Layout:
    """The layout with all its tensors changed alike."""
    lengths = layout.context_lengths
    return Layout(
        change(layout.document_ids),
        change(layout.view_ids),
        change(layout.position_ids),
        None if lengths is None else change(lengths),
    )


def _stacked(first: Layout, second: Layout) -> Layout:
    """Two rows of a kind as the rows of one layout."""
    lengths = (first.context_lengths, second.context_lengths)
    return Layout(
        torch.cat([first.document_ids, second.document_ids]),
        torch.cat([first.view_ids, second.view_ids]),
        torch.cat([first.position_ids, second.position_ids]),
        None if lengths[0] is None or lengths[1] is None else torch.cat([lengths[0], lengths[1]]),
    )


def _distinct_tokens(model: PreTrainedModel, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`length` tokens and another for each, no two with one embedding (rows never trained are often alike); the mask token first
    among the others, where the config names it.
    """
    embedding: Any = model.get_input_embeddings()  # asked as a module: its weights may be in a file (`mapped.py`)
    candidates = torch.randperm(len(embedding.weight), generator=torch.Generator().manual_seed(seed))[: 64 * length]
    _, kinds = torch.unique(embedding(candidates.to(embedding.weight.device)), dim=0, return_inverse=True)
    num_kinds = int(kinds.max()) + 1
    if num_kinds < 2 * length:
        raise ValueError(
            f"base={type(model).__name__}: only {num_kinds} different rows in its embedding; wrong weights?"
        )
    # Kinds are in lexicographic order: far apart there, so that no two are alike but for rounding.
    chosen = [(kinds == kind).nonzero()[0] for kind in torch.linspace(0, num_kinds - 1, 2 * length).long().tolist()]
    picked = candidates[torch.cat(chosen).cpu()].to(model.device)
    others = picked[length:]
    if section := getattr(model.config, "diffusion", None):
        others[0] = section["mask_token_id"]
    return picked[:length], others


def _forward(model: PreTrainedModel, tokens: Tensor, layout: Layout | None, dense: bool = False) -> Tensor:
    """Hidden states in float32 under one layout for all rows, None = the model called plainly; ValueError where it cannot."""
    try:
        rows = None if layout is None else _each(layout, lambda x: x.expand(len(tokens), -1))
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
    for sees in _promised(model, layout):
        reachable = (sees.float() @ reachable.float()) > 0
    moved = (hidden[1:] - hidden[:1]).abs().amax(-1).T / hidden.abs().amax(-1).mean()  # [query, edited key]
    noise = 1e-5 if torch.finfo(model.dtype).eps < 1e-6 else 1e-3
    leaked = ~reachable & (moved > noise)
    if leaked.any():
        raise _wrong(model, attention, "", leaked, "sees, but should not,")


def _check_layers(model: PreTrainedModel, attention: str, layout: Layout) -> Tensor:
    """Every layer by itself sees what it should and nothing else; the hidden states [1 + L, L, D] of the first try, for the edits."""
    length = layout.position_ids.shape[1]
    promised = _promised(model, layout)
    real = (layout.document_ids[0] != PADDING_DOCUMENT)[:, None]  # what padding sees is nobody's business
    unseen: list[Tensor] = []
    hidden: list[Tensor] = []
    for seed in range(_TRIES):  # a key may be seen with a weight that underflows, but not for all texts
        texts = _edited(model, length, seed)

        def forward(texts: Tensor = texts) -> None:
            hidden.append(_forward(model, texts, layout).detach())

        sights = layer_sight(model, backbone_of(model), forward, length)
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


def _edited(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """[1 + L, L]: a text, and below it the text with each of its tokens edited in turn."""
    tokens, others = _distinct_tokens(model, length, seed)
    edits = torch.where(torch.eye(length, device=tokens.device).bool(), others, tokens)
    return torch.cat([tokens[None], edits])


def _named(indices: list[int], layer: str) -> str:
    return f" in layers {sorted(set(indices))} ({layer})"


def _wrong(model: PreTrainedModel, attention: str, where: str, pairs: Tensor, what: str) -> ValueError:
    query, key = (int(i) for i in pairs.nonzero()[0])
    return ValueError(
        f"attention={attention}: the probe failed on {type(model).__name__} with "
        f"{model.config._attn_implementation} attention:{where} the token at place {query} {what} the one at {key}; "
        "try another model.attn_implementation (eager, flex_attention, sdpa, sdpa_pieces), or another base model"
    )


def _promised(model: PreTrainedModel, layout: Layout) -> list[Tensor]:
    """Who sees whom, [query, key], for each layer of the model."""
    windows = layer_windows(model.config)
    if isinstance(windows, dict):
        per_layer = [windows[kind] for kind in model.config.layer_types]
    else:
        per_layer = [windows] * model.config.num_hidden_layers
    index = torch.arange(layout.position_ids.shape[1], device=layout.position_ids.device)
    zero = torch.zeros((), dtype=torch.long, device=index.device)
    rules = {window: mask_rule(layout, layout, window=window) for window in set(per_layer)}
    seen = {window: rule(zero, zero, index[:, None], index[None, :]) for window, rule in rules.items()}
    return [seen[window] for window in per_layer]


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


def _check_order(
    model: PreTrainedModel, attention: str, tokens: Tensor, layout: Layout, hidden: Tensor, effect: Callable[[], float]
) -> Tensor:
    """Returns the first document's hidden states under our causal mask: of the same forward, as each reads all weights."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens.device)
    elsewhere = _each(layout, lambda x: x[:, order])
    one_text = (torch.arange(len(tokens), device=tokens.device) < _FIRST)[None]
    causal = Layout.of("prefix", one_text, num_prompt_tokens=len(tokens))
    before = None if elsewhere.context_lengths is None else causal.position_ids + 1
    causal = Layout(causal.document_ids, causal.view_ids, causal.position_ids, before)
    both = _forward(model, torch.stack([tokens[order], tokens]), _stacked(elsewhere, causal), dense=True)
    difference = _difference(both[:1], hidden[:, order], elsewhere)
    if not _is_rounding(model, difference, effect):
        raise ValueError(
            f"base={type(model).__name__}: goes by the column in which a token stands and not by the position that it is "
            f"given (shuffled columns change it by {difference:.0e}), so packed documents and {attention} attention would "
            "mislead it (ALiBi, positions counted from the mask, convolutions); choose another base model"
        )
    return both[1:, :_FIRST]


def _check_causal_mode(model: PreTrainedModel, tokens: Tensor, ours: Tensor, effect: Callable[[], float]) -> None:
    with _as_causal(model):
        plain, logits = _plain(model, tokens[None, :_FIRST])
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
    promised = torch.stack(_promised(model, layout)).any(0)
    real = (layout.document_ids[0] != PADDING_DOCUMENT)[:, None]
    unseen = promised & real
    tries = [_forward(model, _edited(model, length, seed), layout) for seed in range(_TRIES)]
    for hidden in tries:
        unseen &= (hidden[1:] == hidden[:1]).all(-1).T
    if unseen.any():
        raise _wrong(model, attention, "", unseen, "does not see, but should,")
    return tries[0]


def _has_gradients(model: PreTrainedModel) -> bool:
    """FlexAttention on a CPU is forward only."""
    return model.config._attn_implementation != "flex_attention" or model.device.type != "cpu"


def _agrees_without_mask(model: PreTrainedModel, tokens: Tensor, masked_hidden: Tensor) -> bool:
    text = tokens[None, :_FIRST]
    plain: list[Tensor] = []

    def forward() -> None:
        plain.append(_forward(model, text.expand(_FIRST, -1), None).detach())

    if _has_gradients(model):
        promised = _promised(model, Layout.of("bidirectional", torch.ones_like(text)))
        sights = layer_sight(model, backbone_of(model), forward, _FIRST)
        agrees = all(torch.equal(sight.sees, promised[sight.index]) for sight in sights)
    else:
        forward()
        agrees = True
    expected = masked_hidden[:1, :_FIRST]
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
