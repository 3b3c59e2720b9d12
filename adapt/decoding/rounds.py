"""The loop over rounds: guess every blank, keep the sure ones, blank the rest, repeat, stop early.

Shapes: B rows, L = P + C tokens, A rows still being refined, M columns that join the cached context, W columns of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..attention.layout import PADDING_DOCUMENT, Layout, parts
from ..attention.views import clean_context_lengths
from ..attention.windows import layer_windows
from ..model.forward import hidden_states
from ..model.head import output_head
from ..noise.hybrid import uniform_tokens
from .cache import Context
from .decoder import Decoder
from .keep import draw, keep
from .settings import SamplerConfig


@dataclass(frozen=True)
class GenerateOutput:
    sequences: Tensor
    """[B, L] prompt and what was written; after the first end-of-text only end-of-text"""
    num_tokens: Tensor
    """[B] tokens written (blanks filled), without end-of-text and what follows it"""
    nfe: int
    """forwards of the batch; the first round computes the prompt along the way"""
    tpf: float
    """tokens written for each forward of a row, end-of-text not counted"""
    history: list[Tensor] = field(default_factory=list)
    """[B, L] at the start and after each round, mask tokens where still blank; only with keep_history"""


class Streamer(Protocol):
    """What `generate` shows its rounds to; transformers' streamers have the same two methods."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Rounds:
    """The loop over rounds. Rows that are finished leave the batch, columns that no row needs leave the canvas."""

    def __init__(
        self,
        lm: Decoder,
        tokens: Tensor,
        is_blank: Tensor,
        layout: Layout,
        sampler: SamplerConfig,
        generator: torch.Generator | None,
        streamer: Streamer | None,
        keep_history: bool,
    ) -> None:
        self.lm, self.sampler, self.generator, self.streamer = lm, sampler, generator, streamer
        self.tokens, self.is_blank, self.layout = tokens, is_blank, layout
        self.head = output_head(lm.model)
        self.keep_history, self.history = keep_history, [] if not keep_history else [tokens.clone()]
        self.was_blank = is_blank.clone()
        self.block_size = lm.spec.block_size if lm.spec.attention == "block" else None
        self.first_blank = is_blank.long().argmax(1)
        # Random blanks need draws even where guesses do not: without a generator of the caller's, always the same.
        self.noise = generator or torch.Generator(tokens.device).manual_seed(0)
        has_predictor = torch.nn.functional.pad(layout.document_ids[:, :-1] != PADDING_DOCUMENT, (1, 0))
        if lm.spec.shift_logits and (is_blank & ~has_predictor).any():
            raise ValueError(
                "infill: with shift_logits the first token of a text has no predictor; put a token before it"
            )
        windows = layer_windows(lm.model.config)
        spans = windows.values() if isinstance(windows, dict) else [windows]
        # Longer than the probe's row, a sliding window may be counted otherwise by the model than by our mask.
        self.mask_free_length = min((span for span in spans if isinstance(span, int)), default=tokens.shape[1])

    @torch.no_grad()
    def run(
        self, num_prompt: int, *, cached: bool, end_of_text: int | None, stop: Callable[[list[int]], bool] | None
    ) -> GenerateOutput:
        batch, device = len(self.tokens), self.tokens.device
        rows = torch.arange(batch, device=device)  # those still being written
        start = torch.full((batch,), num_prompt if cached else 0, device=device)  # where each row's canvas begins
        context = Context.empty(batch, device) if cached else None
        nfe, row_nfe = 0, torch.zeros_like(rows)
        while len(rows):
            # 1. The canvas of each row: its blanks, and what is settled between them.
            if self.sampler.canvas_length is not None or self.block_size is not None:
                start[rows] = self._first_column(rows)
            hidden, columns, is_canvas = self._forward(rows, start[rows], context)
            nfe += 1
            row_nfe[rows] += 1
            # 2. Guess every blank.
            blanks = self.is_blank[rows[:, None], columns] & is_canvas
            guesses, confidence = self._guess(hidden, blanks)
            # 3. Keep the sure ones; the others stay blank.
            row, place = keep(confidence, self.sampler).nonzero(as_tuple=True)
            kept = rows[row], columns[row, place]
            self.tokens[kept], self.is_blank[kept] = guesses[row, place], False
            # 4. Cut what lies behind an end-of-text, and stop. Rows with nothing left to write leave the batch.
            if end_of_text is not None:
                self._cut(rows, num_prompt, end_of_text)
            if stop is not None and end_of_text is not None:
                self._stop(rows, num_prompt, stop, end_of_text)
            if self.keep_history:
                self.history.append(self.tokens.clone())
            if self.streamer is not None:
                self.streamer.put(self.tokens.clone())
            going = self.is_blank[rows].any(1)
            if not going.all():
                rows = rows[going]
                if context is not None and len(rows):
                    context.select(going)
        if self.streamer is not None:
            self.streamer.end()
        num_tokens = self._num_tokens(num_prompt, end_of_text)
        tpf = int(num_tokens.sum()) / max(1, int(row_nfe.sum()))
        return GenerateOutput(self.tokens, num_tokens, nfe, tpf, self.history)

    def _first_column(self, rows: Tensor) -> Tensor:
        """Where each row's canvas begins, [A]: at its first blank, or at the start of the block that it stands in.

        With a causal clean context a block begins after the prompt at the earliest, as it did in training.
        """
        first = self.is_blank[rows].long().argmax(1)
        if self.block_size is None:
            return first
        block_start = first - self.layout.position_ids[rows, first] % self.block_size
        causal = self.lm.spec.clean_context == "causal"
        return torch.maximum(block_start, self.first_blank[rows]) if causal else block_start

    def _forward(self, rows: Tensor, start: Tensor, context: Context | None) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states that predict the canvas [A, W, D], its columns [A, W], which of them are canvas [A, W]).

        One forward over what joined the context since the last round, M columns, and the canvas, W columns: rows may
        differ in both, so columns that a row does not have are padding. The cache keeps the M and forgets the W.
        """
        length = self.tokens.shape[1]
        every = torch.arange(length, device=rows.device)
        used = torch.where(self.layout.document_ids[rows] != PADDING_DOCUMENT, every + 1, 0).amax(1)
        end = used
        if self.sampler.canvas_length is not None:
            end = torch.minimum(used, start + self.sampler.canvas_length)
        if self.block_size is not None:
            into_block = self.layout.position_ids[rows, start] % self.block_size
            end = torch.minimum(used, start - into_block + self.block_size)
        num_cached = start if context is None else context.num_columns
        num_new, width = int((start - num_cached).max()), int((end - start).max())
        columns = start[:, None] + torch.arange(-num_new, width, device=rows.device)
        valid = (columns >= num_cached[:, None]) & (columns < end[:, None])
        columns = columns.clamp(0, length - 1)
        document_ids, view_ids, position_ids = (x[rows[:, None], columns] for x in parts(self.layout))
        view_ids[:, :num_new] = 0
        if self.block_size is not None:
            view_ids[:, num_new:] = 1
        sees = self._context_lengths(position_ids, num_new)
        layout = Layout(torch.where(valid, document_ids, PADDING_DOCUMENT), view_ids, position_ids, sees)
        tokens = self._noised()[rows[:, None], columns]
        if context is None:
            unmasked = self.lm.mask_free and width <= self.mask_free_length and bool((layout.document_ids != 0).all())
            hidden = hidden_states(self.lm.model, tokens, None if unmasked else layout)
            before = None
        else:
            hidden = hidden_states(self.lm.model, tokens, context.followed_by(layout), cache=context.cache)
            before = context.append(layout, hidden, num_new, start)
        hidden = hidden[:, num_new:]
        if self.lm.spec.shift_logits:
            first = torch.zeros_like(hidden[:, :1]) if before is None else before
            hidden = torch.cat([first, hidden[:, :-1]], dim=1)
        return hidden, columns[:, num_new:], valid[:, num_new:]

    def _context_lengths(self, position_ids: Tensor, num_new: int) -> Tensor | None:
        """[A, M + W], with block attention: what joins the context sees up to itself or its block's end, the canvas all before it."""
        if self.block_size is None:
            return None
        new = clean_context_lengths(self.lm.spec, position_ids[:, :num_new])
        canvas = position_ids[:, num_new:]
        return torch.cat([new, canvas[:, :1].expand_as(canvas)], dim=1)

    def _noised(self) -> Tensor:
        """[B, L] what the model sees: mask tokens at the blanks, or for uniform noise random tokens."""
        if self.lm.spec.noise != "uniform":
            return self.tokens
        drawn = uniform_tokens(self.tokens, self.lm.vocab_size, self.lm.spec.mask_token_id, self.noise)
        return torch.where(self.is_blank, drawn, self.tokens)

    def _guess(self, hidden: Tensor, blanks: Tensor) -> tuple[Tensor, Tensor]:
        """(token, its probability) of each blank, [A, W]; probability -1 where there is none."""
        logits = self.head(hidden[blanks]).float()
        logits[:, self.lm.spec.mask_token_id] = -torch.inf
        if logits.isnan().any():
            raise ValueError(
                f"dtype={self.lm.model.dtype}: the model computes NaN here; load it in bfloat16 or float32"
            )
        tokens, probability = draw(logits, self.sampler, self.generator)
        guesses = torch.zeros(blanks.shape, dtype=torch.long, device=blanks.device).masked_scatter_(blanks, tokens)
        confidence = torch.full(blanks.shape, -1.0, device=blanks.device).masked_scatter_(blanks, probability)
        return guesses, confidence

    def _cut(self, rows: Tensor, num_prompt: int, end_of_text: int) -> None:
        """Behind the first kept end-of-text nothing is attended to and nothing is written any more."""
        canvas, blank = self.tokens[rows, num_prompt:], self.is_blank[rows, num_prompt:]
        ends = (canvas == end_of_text) & ~blank
        behind = ends.long().cumsum(1) - ends.long() > 0
        self.tokens[rows, num_prompt:] = torch.where(behind, end_of_text, canvas)
        self.is_blank[rows, num_prompt:] = blank & ~behind
        documents = self.layout.document_ids
        documents[rows, num_prompt:] = torch.where(behind, PADDING_DOCUMENT, documents[rows, num_prompt:])

    def _stop(self, rows: Tensor, num_prompt: int, stop: Callable[[list[int]], bool], end_of_text: int) -> None:
        for row in rows.tolist():
            blank = self.is_blank[row, num_prompt:]
            settled = int(blank.long().argmax()) if blank.any() else len(blank)
            if stop(self.tokens[row, num_prompt : num_prompt + settled].tolist()):
                self.tokens[row, num_prompt + settled :] = end_of_text
                self.is_blank[row, num_prompt:] = False

    def _num_tokens(self, num_prompt: int, end_of_text: int | None) -> Tensor:
        written = self.was_blank[:, num_prompt:]
        if end_of_text is not None:
            written = written & ((self.tokens[:, num_prompt:] == end_of_text).cumsum(1) == 0)
        return written.sum(1)
