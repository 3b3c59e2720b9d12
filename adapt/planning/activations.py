"""What one micro-batch keeps in memory, found by running the real step on tensors that have shapes and no data.

    model = shape_model(recipe, config, deepspeed=True)
    timeline = trace(recipe, model, micro_batch=8, kernel="flex_attention", stage=2, device="cuda")

No formula of a layer: the architecture's own modules, our objective and autograd run under torch's FakeTensorMode, and every
storage is counted from the operation that makes it to the moment that nobody holds it. What only a kernel's inside takes (a
matrix product's workspace) is not seen. A model of n equal layers is run with three of them, and the middle one repeated in the
account. How activations split into what is kept and what is recomputed: Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers.initialization import no_init_weights

from .. import objective
from ..attention.layout import Layout
from ..attention.sdpa_pieces import with_masks
from ..attention.windows import layer_windows
from ..files.loading import empty_model
from ..model.forward import hidden_states
from ..model.head import after_head
from ..model.parts import decoder_layers
from ..spec import DiffusionSpec
from ..training.data.batch import collate, pack
from ..training.data.packing import Place
from ..training.data.views import Canvases
from ..training.engine.arguments import compute_dtype
from ..training.loss.distill import Teacher
from ..training.loss.terms import noised_loss, terms_of
from ..training.recipe import Recipe
from .allocations import AllocationLog, repeated
from .shape_model import FLASH, without_data

_DRAWS = 4  # micro-batches whose noise is drawn, of which the one with most noised tokens counts


@dataclass(frozen=True)
class Timeline:
    """Bytes held at each moment of a forward and backward pass, [moments, len(KINDS)], besides weights and optimizer."""

    held: np.ndarray
    text_tokens: int
    """clean tokens of the micro-batch, each counted once"""
    head_rows: int
    """hidden states that went through the head"""


def trace(recipe: Recipe, model: Any, *, micro_batch: int, kernel: str, stage: int | None, device: str) -> Timeline:
    """What a forward and backward pass over micro_batch full rows holds, moment by moment.

    kernel: the attention kernel, whose inside is not computed: flash kernels keep queries, keys, values, the output and a number
    a row, with sdpa_pieces of each rectangle. stage: of ZeRO, None without DeepSpeed; it decides about autocast, and in stage 3 how
    the head's weights are used. device: cuda or cpu, which differ in the head's slices.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mode = next(model.parameters()).fake_mode
    canvases = _canvases(recipe, base.config.vocab_size)
    batch, text_tokens = _batch(recipe, canvases, micro_batch)
    dense = ("eager", "sdpa") if device == "cuda" else ("eager", "sdpa", "sdpa_pieces")
    base.config._attn_implementation = kernel if kernel in dense else FLASH
    has_layout = base.config._attn_implementation != FLASH
    right_window = canvases.seq_len if has_layout and recipe.objective.anneal_steps else None
    if has_layout:
        batch |= _masked_pieces(batch, layer_windows(base.config), right_window)
    tape = AllocationLog(base.config.vocab_size)
    layers, num_layers = _equal_layers(base)
    teacher = _teacher(recipe, model, base, mode)
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(mock.patch.dict(objective.SLICE_LOGITS, cpu=objective.SLICE_LOGITS[device]))
        if layers is not None:
            stack.enter_context(_only_three(layers))
            stack.enter_context(tape.marking(layers))
        if stage == 3:
            stack.enter_context(_scattered(base.get_output_embeddings()))
        batch = tree_map_only(Tensor, mode.from_tensor, batch)
        tape.ignore(model, *([] if teacher is None else [teacher.model]))
        stack.enter_context(tape.handing_on(model))
        stack.enter_context(tape)
        autocast = recipe.training.precision == "bf16" and stage is None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model(
                input_ids=batch["input_ids"],
                layout=_layout(batch) if has_layout else None,
                pieces=batch["pieces"],
                right_window=right_window,
                terms=terms_of(
                    batch,
                    noised_loss(recipe, canvases, teacher),
                    None if teacher is None else _taught(teacher, batch, has_layout),
                    torch.ones(()),
                    torch.ones(()) if canvases.has_ar_loss else None,
                ),
                num_chunks=-(-micro_batch * recipe.data.seq_len // objective.ROWS_PER_GATHER),
                router_weight=1.0,
            )
        tape.mark("backward")
        loss.backward()
        tape.mark("end")
        tape.close(model)
    model.zero_grad()
    held = tape.timeline()
    if layers is not None:
        held = repeated(held, tape.marks, num_layers)
    return Timeline(held, text_tokens * micro_batch, len(batch["rows"]) + len(batch["ar_rows"]))


def _canvases(recipe: Recipe, vocab_size: int) -> Canvases:
    ours = recipe.model
    is_block = ours.attention == "block"
    spec = DiffusionSpec(
        attention="prefix" if recipe.objective.name == "ar" else ours.attention or "prefix",
        mask_token_id=0,
        shift_logits=bool(ours.shift_logits),
        block_size=ours.block_size if is_block else None,
        clean_context=(ours.clean_context or "causal") if is_block else None,
        noise=recipe.noise.kind,
        p_uniform=recipe.noise.p_uniform if recipe.noise.kind == "hybrid" else None,
    )
    data = recipe.data
    options = (data.canvas_length, data.canvas_start, 0, recipe.training.seed, data.seq_len, vocab_size)
    return Canvases(spec, recipe.noise, recipe.objective, *options)


def _batch(recipe: Recipe, canvases: Canvases, micro_batch: int) -> tuple[dict[str, Any], int]:
    """(a micro-batch of rows that one text fills, all of it target; tokens of that text).

    That is the most that a row can hold. Of a few draws of the noise the one with most noised tokens.
    """
    fits = [
        length
        for length in range(recipe.data.seq_len, 0, -1)
        if canvases.room_needed(np.array([0]), np.array([length])) <= recipe.data.seq_len
    ]
    if not fits:
        raise ValueError(
            f"data.seq_len={recipe.data.seq_len}: no text fits into a row with all its copies; raise it, or lower objective.views"
        )
    text = [1] * fits[0]
    batches = [
        collate(
            [
                pack([canvases.tokens([], text, Place(k, 0, k))])
                for k in range(draw * micro_batch, (draw + 1) * micro_batch)
            ],
            length=recipe.data.seq_len,
            with_teacher=bool(recipe.objective.distill_weight) and not canvases.is_ar,
        )
        for draw in range(_DRAWS)
    ]
    return max(batches, key=lambda batch: len(batch["rows"])), len(text)


def _teacher(recipe: Recipe, model: Any, base: Any, mode: FakeTensorMode) -> Teacher | None:
    if not recipe.objective.distill_weight or recipe.objective.name == "ar":
        return None
    if recipe.model.lora is not None:
        return Teacher(base, model.disable_adapter)
    with torch.device("meta"), no_init_weights():
        kernel = base.config._attn_implementation
        frozen: Any = empty_model(base.config, dtype=compute_dtype(recipe), attn_implementation=kernel)
        frozen.tie_weights()
    if (layers := _equal_layers(frozen)[0]) is not None:
        del layers[3:]
    after_head(frozen)  # which reads numbers, and so cannot wait for the run on shapes
    return Teacher(without_data(frozen.requires_grad_(False).eval(), mode))


def _layout(batch: dict[str, Any]) -> Layout:
    return Layout(batch["document_ids"], batch["view_ids"], batch["position_ids"], batch["context_lengths"])


def _masked_pieces(batch: dict[str, Any], windows: Any, right_window: int | None) -> dict[str, Any]:
    """The pieces with their masks, made here, where the layout has data that can be looked into."""
    masked = {"pieces": with_masks(batch["pieces"], _layout(batch), windows, right_window)}
    if "teacher_pieces" in batch:
        documents = batch["teacher_document_ids"]
        layout = Layout(documents, torch.zeros_like(documents), batch["teacher_position_ids"])
        masked["teacher_pieces"] = with_masks(batch["teacher_pieces"], layout, windows, None)
    return masked


def _taught(teacher: Teacher, batch: dict[str, Any], has_layout: bool) -> Tensor:
    if has_layout:
        return teacher.hidden(batch)
    with torch.no_grad(), teacher.without_adapters():
        return hidden_states(teacher.model, batch["teacher_input_ids"], None).flatten(0, 1)[batch["teacher_rows"]]


def _equal_layers(base: Any) -> tuple[torch.nn.ModuleList | None, int]:
    """(the list of decoder layers if all have the same weights and there are more than three, their number)."""
    number, layers = base.config.num_hidden_layers, decoder_layers(base)
    if layers is None or number <= 3:
        return None, number
    shapes = [[(name, p.shape, p.dtype) for name, p in layer.named_parameters()] for layer in layers]
    return (layers if all(shape == shapes[0] for shape in shapes) else None), number


@contextmanager
def _scattered(head: torch.nn.Module):
    """Inside, the head's weights look like ZeRO-3's to our loss, which then runs the head again in the backward pass."""
    for weight in (weights := list(head.parameters())):
        weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for weight in weights:
            delattr(weight, "ds_id")


@contextmanager
def _only_three(layers: torch.nn.ModuleList):
    rest = list(layers[3:])
    del layers[3:]
    try:
        yield
    finally:
        layers.extend(rest)
