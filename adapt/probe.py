"""Proof by experiment that a loaded model attends as promised: edit one token, see which logits move.

A name on a list proves nothing: StableLM and Nemotron ignore `config.is_causal = False` under SDPA and stay silently
causal (transformers 5.23). So every converted and every loaded model is probed with the kernel and dtype that it will
run with.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import PADDING_DOCUMENT, Layout, attention_mask, layer_windows, mask_rule
from .model import hidden_states, output_head

logger = logging.getLogger(__name__)

_DOCUMENTS = [1] * 9 + [2] * 5 + [PADDING_DOCUMENT] * 2
_POSITIONS = [*range(9), *range(5), 0, 1]
_PREFIX_VIEWS = [0] * 4 + [1] * 5 + [0] * 2 + [1] * 3 + [0] * 2
# Blocks of two: the clean copy of four (or two) tokens, then noised blocks at positions 2 and 4 that see what is before them.
_BLOCK_VIEWS = [0] * 4 + [1] * 2 + [2] * 3 + [0] * 2 + [1] * 3 + [0] * 2
_BLOCK_POSITIONS = [0, 1, 2, 3, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1]
_BLOCK_SEES = {
    "block": [2, 2, 4, 4, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 1, 2],
    "causal": [1, 2, 3, 4, 2, 2, 4, 4, 4, 1, 2, 2, 2, 2, 1, 2],
}


@torch.no_grad()
def probe(model: PreTrainedModel, attention: str, clean_context: str | None = None) -> bool:
    """Raises ValueError unless the model attends as `attention` ("bidirectional", "block", "prefix" or "causal") says.

    Returns whether one unpadded document needs no mask at all, because `config.is_causal = False` alone makes this
    model bidirectional; where it does not, the mask is passed always, and a warning says that a plain load stays
    causal.

    One forward over copies of a packed row (two documents and padding), each copy with another token edited. What a
    token may not see, even through other tokens, must not move it; what it sees directly must. And our head must be
    the model's.
    """
    length, device = len(_DOCUMENTS), model.device
    views = {"block": _BLOCK_VIEWS, "causal": [0] * length, "prefix": _PREFIX_VIEWS}.get(attention, [1] * length)
    parts: list[list[int]] = [_DOCUMENTS, views, _POSITIONS]
    if attention == "block":
        parts[2:] = [_BLOCK_POSITIONS, _BLOCK_SEES[clean_context or "causal"]]
    layout = Layout(*(torch.tensor(part, device=device).expand(length + 1, -1) for part in parts))
    tokens, others = _distinct_tokens(model, length)
    edited = torch.cat([tokens[None], torch.where(torch.eye(length, device=device).bool(), others, tokens)])

    was_training = model.training
    model.eval()
    hidden = _forward(model, edited, layout)
    moved = (hidden[1:] - hidden[:1]).abs().amax(-1)  # [edited key, query]
    moved = moved / hidden.abs().amax(-1).mean()
    _check_pattern(model, attention, layout, moved)
    plain = _check_head(model, tokens[: _DOCUMENTS.count(1)])
    mask_free = attention == "bidirectional" and _agrees_without_mask(model, plain, hidden)
    model.train(was_training)
    return mask_free


def _distinct_tokens(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor]:
    """`length` tokens and another for each, no two with one embedding (rows never trained are often alike)."""
    embedding: Any = model.get_input_embeddings()  # asked as a module: its weights may be in a file (`mapped.py`)
    candidates = torch.randperm(len(embedding.weight), generator=torch.Generator().manual_seed(0))[: 64 * length]
    _, kinds = torch.unique(embedding(candidates.to(embedding.weight.device)), dim=0, return_inverse=True)
    num_kinds = int(kinds.max()) + 1
    if num_kinds < 2 * length:
        raise ValueError(
            f"base={type(model).__name__}: only {num_kinds} different rows in its embedding; wrong weights?"
        )
    # Kinds are in lexicographic order: far apart there, so that no two are alike but for rounding.
    chosen = [(kinds == kind).nonzero()[0] for kind in torch.linspace(0, num_kinds - 1, 2 * length).long().tolist()]
    picked = candidates[torch.cat(chosen).cpu()].to(model.device)
    return picked[:length], picked[length:]


def _forward(model: PreTrainedModel, tokens: Tensor, layout: Layout) -> Tensor:
    """Hidden states in float32; ValueError where the model cannot take the mask, or computes nonsense."""
    attention_mask(model.config, layout)  # where the kernel takes no mask, that is the reason to give
    try:
        hidden = hidden_states(model, tokens, layout).float()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"base={type(model).__name__}: does not take an explicit attention mask ({reason})") from error
    if not hidden.isfinite().all():
        raise ValueError(
            f"base={type(model).__name__}: computes NaN or infinity in {model.dtype}; try another dtype, or mend it"
        )
    return hidden


def _check_pattern(model: PreTrainedModel, attention: str, layout: Layout, moved: Tensor) -> None:
    direct, reachable = _visibility(model, layout)
    padding = layout.document_ids[0] == PADDING_DOCUMENT  # what it sees is nobody's business, as long as nobody sees it
    unmoved = direct & (moved <= 1e-6) & ~padding
    leaked = ~reachable & (moved > 1e-3 if model.dtype != torch.float32 else moved > 1e-5)
    for pairs, what in ((unmoved, "does not see, but should,"), (leaked, "sees, but should not,")):
        if pairs.any():
            key, query = (int(i) for i in pairs.nonzero()[0])
            raise ValueError(
                f"attention={attention}: the probe failed on {type(model).__name__} with "
                f"{model.config._attn_implementation} attention: the token at place {query} {what} the one at {key}; "
                "try another model.attn_implementation (eager, flex_attention, sdpa, sdpa_pieces), or another base model"
            )


def _visibility(model: PreTrainedModel, layout: Layout) -> tuple[Tensor, Tensor]:
    """(seen in some layer, reachable through all layers), [key, query] each."""
    windows = layer_windows(model.config)
    if isinstance(windows, dict):
        per_layer = [windows[kind] for kind in model.config.layer_types]
    else:
        per_layer = [windows] * model.config.num_hidden_layers
    length = layout.position_ids.shape[1]
    index = torch.arange(length, device=layout.position_ids.device)
    zero = torch.zeros((), dtype=torch.long, device=index.device)
    reachable = torch.eye(length, dtype=torch.bool, device=index.device)
    direct = torch.zeros_like(reachable)
    for window in per_layer:
        seen = mask_rule(layout, layout, window=window)(zero, zero, index[None, :], index[:, None])
        direct |= seen
        reachable = (reachable.float() @ (seen | torch.eye(length, device=index.device).bool()).float()) > 0
    return direct, reachable


def _agrees_without_mask(model: PreTrainedModel, plain: Tensor, masked_hidden: Tensor) -> bool:
    expected = masked_hidden[:1, : plain.shape[1]]
    if (plain - expected).abs().amax() <= _tolerance(model) * expected.abs().amax():
        return True
    logger.warning(
        f"{type(model).__name__} ignores config.is_causal=False with {model.config._attn_implementation} attention: "
        "we pass an explicit mask, but a plain transformers load of this checkpoint stays causal"
    )
    return False


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-4 if model.dtype == torch.float32 else 0.1


def _check_head(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The hidden states [1, L, D] of a plain forward, from whose logits our head must not differ."""
    seen: list[Any] = []  # of the same forward: a second one would read all weights again
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
    try:
        logits = model(input_ids=tokens[None], use_cache=False).logits.float()
    finally:
        hook.remove()
    hidden = seen[0].last_hidden_state
    ours = output_head(model)(hidden).float()
    if (ours - logits).abs().amax() > _tolerance(model) * logits.abs().amax():
        raise ValueError(
            f"base={type(model).__name__}: its logits are not its output embedding applied to its hidden states"
        )
    return hidden.float()
