"""The half of the probe that compares numbers: shuffled columns, the causal mode and the head give what they should.

What differs is held against rounding and, where rounding is smaller, against what wrong positions would do, so that weights which
hardly use them cannot hide a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..attention.layout import PADDING_DOCUMENT, Layout
from ..attention.windows import short_spans
from ..model.forward import hidden_states
from ..model.head import output_head
from ..model.parts import backbone_of
from .row import FIRST, SPAN, each_part, stacked

CANNOT = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def forward_under(model: PreTrainedModel, tokens: Tensor, layout: Layout | None, dense: bool = False) -> Tensor:
    """Hidden states in float32 under one layout for all rows, None = the model called plainly; ValueError where it cannot."""
    try:
        rows = None if layout is None else each_part(layout, lambda x: x.expand(len(tokens), -1))
        hidden = hidden_states(model, tokens, rows, dense=dense).float()
    except torch.OutOfMemoryError:
        raise
    except CANNOT as error:
        what = "does not run as it is" if layout is None else "does not take an explicit attention mask"
        raise cannot(model, error, what) from error
    if not hidden.isfinite().all():
        raise ValueError(
            f"base={type(model).__name__}: computes NaN or infinity in {model.dtype}; try another dtype, or mend it"
        )
    return hidden


def cannot(model: PreTrainedModel, error: Exception, what: str) -> Exception:
    if str(error).startswith(("base=", "model.")):  # ours
        return error
    reason = " ".join((str(error) or type(error).__name__).split())[:160]
    return ValueError(
        f"base={type(model).__name__}: {what} with {model.config._attn_implementation} attention ({reason})"
    )


def effect_of_positions(model: PreTrainedModel, tokens: Tensor, layout: Layout, hidden: Tensor) -> float:
    """How much positions twice as far apart, under the same mask, change the hidden states: what a mistake in them does."""
    lengths = layout.context_lengths
    spread = Layout(
        layout.document_ids, layout.view_ids, 2 * layout.position_ids, None if lengths is None else 2 * lengths
    )
    with short_spans(model, 2 * SPAN):
        return _difference(forward_under(model, tokens[None], spread), hidden, layout)


def _difference(hidden: Tensor, expected: Tensor, layout: Layout | None = None) -> float:
    """|hidden - expected| / |expected|, the mean over real tokens."""
    relative = (hidden - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float((relative if layout is None else relative[layout.document_ids != PADDING_DOCUMENT]).mean())


def _is_rounding(model: PreTrainedModel, difference: float, effect: Callable[[], float]) -> bool:
    rounding = 128 * torch.finfo(model.dtype).eps
    return difference <= tolerance(model) and (difference <= rounding or difference <= 0.1 * effect())


def shuffled_and_causal(model: PreTrainedModel, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Hidden states of the row with its columns shuffled (put in order again), and of its beginning under our causal mask.

    [1, L, D] and [1, FIRST, D]; of one forward, because each reads all weights.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens.device)
    one_text = (torch.arange(len(tokens), device=tokens.device) < FIRST)[None]
    causal = Layout.of("prefix", one_text, num_prompt_tokens=len(tokens))
    both = stacked(each_part(layout, lambda x: x[:, order]), causal)
    hidden = forward_under(model, torch.stack([tokens[order], tokens]), both, dense=True)
    return hidden[:1, order.argsort()], hidden[1:, :FIRST]


def check_order(
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


def check_causal_mode(model: PreTrainedModel, tokens: Tensor, ours: Tensor, effect: Callable[[], float]) -> None:
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


def tolerance(model: PreTrainedModel) -> float:
    return 1e-4 if torch.finfo(model.dtype).eps < 1e-6 else 0.1


def _plain(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states, logits) of a forward without a mask: of one, because each reads all weights."""
    seen: list[Any] = []
    backbones = {backbone_of(model), model.get_decoder() or model} - {model}  # OPT's forward calls the part of a part
    hooks = [part.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs)) for part in backbones]
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    except CANNOT as error:
        raise cannot(model, error, "does not run as it is") from error
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
    if ours.shape != logits.shape or (ours - logits).abs().amax() > tolerance(model) * logits.abs().amax():
        raise ValueError(wrong)
