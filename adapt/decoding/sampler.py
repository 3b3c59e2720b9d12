"""Decoding by refinement: guess every blank, keep the sure ones, blank the rest, repeat, stop early.

With prefix and block attention the prompt and finished blocks go through the model once and their KV cache is exact, so that
a round costs the canvas (or block) alone; with bidirectional attention each round recomputes everything. The head always runs
on blanks only. Models of uniform noise see a random token at each blank, drawn anew each round, instead of the mask token.
Shapes: B rows, P prompt tokens, C canvas tokens, L = P + C, A rows still being refined, W columns still needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.layout import Layout
from .decoder import Decoder
from .room import check_room
from .rounds import GenerateOutput, Rounds, Streamer
from .settings import SamplerConfig


def generate(
    lm: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampler: SamplerConfig,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    keep_history: bool = False,
) -> GenerateOutput:
    """Writes at most max_new_tokens after each prompt of input_ids [B, P], left-padded as attention_mask [B, P] says.

    Once an end-of-text is kept, what lies to its right is cut off. stop is asked about the tokens of a row that are
    settled from the left without a gap, after each round; True ends the row there. Greedy rows do not depend on their
    batch.
    """
    _check_prompt(lm, input_ids, attention_mask, max_new_tokens)
    longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).max())
    check_room(lm, prompt=longest, blanks=max_new_tokens, rows=len(input_ids), sampler=sampler)
    lm_input = input_ids.to(lm.device)
    real = torch.ones_like(lm_input) if attention_mask is None else attention_mask.to(lm_input).long()
    if sampler.canvas_length is not None and lm.spec.attention != "prefix":
        why = (
            "nothing joins a cached context" if lm.spec.attention == "bidirectional" else "the canvases are the blocks"
        )
        raise ValueError(
            f"sampler.canvas_length={sampler.canvas_length}: with {lm.spec.attention} attention {why}; set it to null, or "
            "convert with --attention prefix"
        )
    canvas = torch.full((len(lm_input), max_new_tokens), lm.spec.mask_token_id, device=lm.device)
    tokens = torch.cat([lm_input, canvas], dim=1)
    num_prompt = lm_input.shape[1]
    layout = Layout.of(lm.spec.attention, torch.cat([real, torch.ones_like(canvas)], dim=1), num_prompt)
    is_blank = torch.zeros_like(tokens, dtype=torch.bool)
    is_blank[:, num_prompt:] = True
    loop = Rounds(lm, tokens, is_blank, layout, sampler, generator, streamer, keep_history)
    return loop.run(num_prompt, cached=lm.spec.attention != "bidirectional", end_of_text=lm.end_of_text, stop=stop)


def infill(
    lm: Decoder,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    sampler: SamplerConfig,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
    keep_history: bool = False,
) -> GenerateOutput:
    """Fills the mask tokens of input_ids [B, L], each with one token; the rest stays as it is.

    With prefix attention what comes before the first blank is the prompt, and everything after is canvas. With block attention
    the blocks are filled one after the other, and do not see what stands in later ones.
    """
    if sampler.canvas_length is not None:
        raise ValueError(
            f"sampler.canvas_length={sampler.canvas_length}: infilling has the whole text as its canvas; set it to null"
        )
    tokens = input_ids.to(lm.device).clone()
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens).long()
    is_blank = (tokens == lm.spec.mask_token_id) & real.bool()
    if not is_blank.any(dim=1).all():
        raise ValueError(
            f"infill: a text has no blank; put the mask token (id {lm.spec.mask_token_id}) where it should write"
        )
    longest, blanks = int(real.sum(1).max()), int(is_blank.sum(1).max())
    check_room(lm, prompt=longest - blanks, blanks=blanks, rows=len(tokens), sampler=sampler, what="infill")
    layout = Layout.of("bidirectional", real)
    if lm.spec.attention != "bidirectional":
        before_first = (is_blank.cumsum(1) == 0) & real.bool()
        layout = Layout(layout.document_ids, (~before_first).long(), layout.position_ids)
    loop = Rounds(lm, tokens, is_blank, layout, sampler, generator, streamer, keep_history)
    return loop.run(0, cached=lm.spec.attention == "block", end_of_text=None, stop=None)


def _check_prompt(lm: Decoder, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has the shape {list(input_ids.shape)}; needs [batch, at least one token]")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError(
            "attention_mask: prompts must be padded on the left, so that they all end where the canvas begins"
        )
    if lm.end_of_text is None:
        raise ValueError("checkpoint: its tokenizer has no end-of-text token, at which to stop; set its eos_token")
