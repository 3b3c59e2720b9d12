"""A converted model in memory: hidden states under an attention pattern, and the head on chosen rows only.

Nothing here knows an architecture. Masks and positions go in through transformers' public arguments, and the head is
the model's own; `probe.py` proves both on the loaded weights.
Shapes: B rows, L tokens, D hidden size, V vocabulary, N chosen rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention import Layout, attention_mask, layer_windows
from .moe import has_router_loss, router_aux_loss
from .objective import RowLoss, weighted_loss
from .pieces import NAME as PIECES
from .pieces import Geometry, geometry_of, with_masks

if TYPE_CHECKING:
    from .checkpoint import DiffusionSpec
    from .sampler import GenerateOutput, SamplerConfig


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    layout: Layout | None,
    *,
    cache: Cache | None = None,
    pieces: Geometry | None = None,
    right_window: Tensor | int | None = None,
    dense: bool = False,
) -> Tensor:
    """Last hidden states [B, Q, D] of input_ids [B, Q] under the attention pattern of `layout`.

    layout: of all keys; with a KV cache it is longer than input_ids, which are its last tokens. None = plain
    bidirectional attention on unpadded rows, for models with `config.is_causal = False`: no mask is built and flash
    kernels apply. pieces: the layout's geometry, where the caller has it on the host already (`collate`). dense: the
    tokens stand in no particular order, so that a kernel that cuts the layout into pieces takes a mask over everything.
    """
    options = {"cache": cache, "pieces": pieces, "right_window": right_window, "dense": dense}
    return _outputs(model, input_ids, layout, **options).last_hidden_state


def _outputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    layout: Layout | None,
    *,
    cache: Cache | None = None,
    pieces: Geometry | None = None,
    right_window: Tensor | int | None = None,
    dense: bool = False,
    output_router_logits: bool = False,
) -> Any:
    """The backbone's outputs; with output_router_logits those of the experts' routers are among them."""
    more = {"output_router_logits": True} if output_router_logits else {}
    if layout is None:
        return backbone_of(model)(input_ids=input_ids, use_cache=False, **more)
    num_queries = input_ids.shape[1]
    inputs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": cache, "use_cache": cache is not None}
    if model.config._attn_implementation == PIECES and cache is None and not dense:
        windows = layer_windows(model.config)
        nothing = input_ids.new_empty(1, 1, 0, 0)  # four dimensions: transformers builds no mask of its own
        inputs["attention_mask"] = {kind: nothing for kind in windows} if isinstance(windows, dict) else nothing
        inputs["pieces"] = with_masks(pieces or geometry_of(layout), layout, windows, right_window)
    else:
        inputs["attention_mask"] = attention_mask(
            model.config,
            layout,
            num_queries=num_queries,
            right_window=right_window,
            dtype=model.dtype,
            cache_key=None if pieces is None else pieces.key,
        )
    backbone = backbone_of(model)
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = layout.last(num_queries).position_ids
    return backbone(**inputs, **more)


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's own head as a function: hidden states [..., D] -> logits [..., V], scaled and capped as it does."""
    linear: Any = model.get_output_embeddings()
    post = after_head(model)
    return lambda hidden: post(linear(hidden))


def after_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the model does to the logits [..., V] that its output embedding gives: scales and caps, or nothing."""
    if model not in _scales_and_caps:
        _scales_and_caps[model] = _scale_and_cap(model)
    scale, soft_cap = _scales_and_caps[model]

    def post(logits: Tensor) -> Tensor:
        if scale != 1:
            logits = logits * scale
        return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap

    return post


_scales_and_caps: WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]] = WeakKeyDictionary()


def _scale_and_cap(model: PreTrainedModel) -> tuple[float, float | None]:
    """(factor of the logits, their soft cap), by sending known ones through the model's own forward.

    Configs call them logit_scale, logits_scaling (a divisor in Granite, a factor in HyperCLOVAX) and other names. No
    parameter is read, so that it works on a model whose weights are elsewhere (DeepSpeed ZeRO-3).
    """
    small, large = 2.0**-10, 1e6
    head: Any = model.get_output_embeddings()
    backbones = {backbone_of(model), model.get_decoder() or model} - {model}  # OPT's forward calls the part of a part
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # what is sent has to come back with its data
    known = torch.tensor([small, large], device=device)[None, :, None].repeat(1, 1, model.config.vocab_size)
    hidden = torch.ones(1, 2, model.config.hidden_size, device=device)
    taken: list[Tensor] = []

    def give_known(hidden: Tensor) -> Tensor:
        taken.append(hidden)
        return known

    forwards: dict[Any, Any] = {module: module.__dict__.get("forward") for module in (*backbones, head)}
    try:
        for backbone in backbones:
            backbone.forward = lambda *_, **__: _OnlyHidden(last_hidden_state=hidden)
        head.forward = give_known
        with torch.no_grad():
            logits: Any = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        for module, forward in forwards.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    low, high = (float(x) for x in logits[0, :, 0])
    scale = float(f"{low / small:.6g}")  # tanh is not quite linear there
    soft_cap = None if high > 0.5 * scale * large else high
    before = float(f"{float(taken[0].float().mean()):.6g}")  # MiniCPM3 scales the hidden states instead
    return scale * before, soft_cap


class _OnlyHidden(BaseModelOutputWithPast):
    """A backbone's output that has nothing else: no attentions, no router logits."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Term(NamedTuple):
    """Rows that go through the head for one loss; see `objective.weighted_loss`."""

    rows: Tensor
    """[N] of the flattened [B * L] hidden states"""
    row_loss: RowLoss
    row_tensors: tuple[Tensor, ...]
    """[N, ...] each: what row_loss takes besides the logits"""
    weights: Tensor
    """[N]"""


def attach_loss(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose forward also answers `model(input_ids, layout=, terms=, ...)` with (loss [], [nats of each term's rows]).

    The loss has to be inside `forward`, because that is the only call that DeepSpeed ZeRO-3, autocast and PEFT see. Without
    `terms` the forward is the model's own. A mixture of experts that has a balancing loss adds router_weight times it.
    """
    plain_forward = model.forward
    after_head(model)  # while the forward is still the model's own

    def forward(*args, terms: list[Term] | None = None, **kwargs):
        if terms is None:
            return plain_forward(*args, **kwargs)
        return _loss(model, terms, *args, **kwargs)

    model.forward = forward
    return model


def _loss(
    model: PreTrainedModel,
    terms: list[Term],
    *,
    input_ids: Tensor,
    layout: Layout,
    num_chunks: int,
    pieces: Geometry | None = None,
    right_window: int | None = None,
    router_weight: float = 1.0,
    **_: None,  # what PEFT adds
) -> tuple[Tensor, list[Tensor]]:
    routed = has_router_loss(model)
    options = {"pieces": pieces, "right_window": right_window, "output_router_logits": routed}
    outputs = _outputs(model, input_ids, layout, **options)
    hidden = outputs.last_hidden_state.flatten(0, 1)
    # The head as it is now: PEFT replaces a tied one when it trains the mask token's row.
    linear: Any = model.get_output_embeddings()
    post = after_head(model)
    sums, nats = zip(
        *(
            weighted_loss(
                hidden.index_select(0, term.rows),
                linear,
                post,
                term.row_loss,
                term.row_tensors,
                term.weights,
                num_chunks,
            )
            for term in terms
        ),
        strict=True,
    )
    loss = torch.stack(sums).sum()
    return loss + router_weight * router_aux_loss(model, outputs, layout) if routed else loss, list(nats)


def backbone_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head. ValueError where transformers does not say which part that is."""
    if model.base_model is not model:
        return model.base_model
    for part in model.children():  # Llama 4's base_model_prefix names no attribute of it
        if isinstance(part, PreTrainedModel) and model.get_input_embeddings() in part.modules():
            return part
    raise ValueError(f"base={type(model).__name__}: has no base_model apart from its head, so it cannot be adapted")


@dataclass(frozen=True)
class DiffusionLM:
    """A diffusion language model: the Hugging Face model, its tokenizer, and the `diffusion` section of its config."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: DiffusionSpec
    mask_free: bool = False
    """Plain bidirectional attention needs no explicit mask on this model (the probe has shown it)."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def start_token_id(self) -> int:
        """What stands before a text whose first token needs a predictor: start-of-text, or else end-of-text."""
        tokenizer: Any = self.tokenizer  # transformers types its token ids as anything
        return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, sampler: SamplerConfig | None = None, **options
    ) -> GenerateOutput:
        """Writes `max_new_tokens` after each prompt [B, P] (left-padded) by refining blanks; see `sampler.generate`."""
        from .sampler import SamplerConfig, generate

        return generate(self, input_ids, max_new_tokens=max_new_tokens, sampler=sampler or SamplerConfig(), **options)

    def infill(self, input_ids: Tensor, *, sampler: SamplerConfig | None = None, **options) -> GenerateOutput:
        """Fills the mask tokens of input_ids [B, L], wherever they are; see `sampler.infill`."""
        from .sampler import SamplerConfig, infill

        return infill(self, input_ids, sampler=sampler or SamplerConfig(), **options)
