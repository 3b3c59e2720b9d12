"""How one example becomes tokens of a row: a clean copy of what canvases hang off, and K noisy views of its target.

    bidirectional  [view 1 of prompt and target] [view 2 ...]                    no clean copy: a view sees all of itself
    prefix         [clean prompt] [view 1 of the target] [view 2 ...]            a view sees the prompt and itself
    block          [clean text x0] [view 1: block, block, ...] [view 2 ...]      a block sees the clean blocks before it and itself

Prompt tokens are never noised, and are absent from the noisy views wherever the clean copy already shows them. Everything random
is keyed by (seed, example, epoch, view), so that it is the same for any world size, accumulation split or resume point.
Positions count the tokens of an example's text; P of them are its prompt ("context"), T its target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...attention.views import clean_context_lengths, noisy_view
from ...noise.absorbing import cart_weight, complement_weight, elbo_weight, q_sample, sample_t
from ...noise.hybrid import corrupt
from ...noise.keyed import generator_for, uniform_for
from ...spec import DiffusionSpec
from ..sections import NoiseConfig, ObjectiveConfig
from .packing import Place


@dataclass(frozen=True)
class Canvases:
    """Lays out and noises examples as a checkpoint's attention and a recipe's objective want it."""

    spec: DiffusionSpec
    noise: NoiseConfig
    objective: ObjectiveConfig
    canvas_length: int | None
    canvas_start: str
    end_of_text: int
    seed: int
    seq_len: int | None = None
    """tokens of a row; a tail of end-of-text gives way where an example would not fit with it"""
    vocab_size: int = 0
    """tokens of the tokenizer, which random noise is drawn from; absorbing noise needs none"""

    @property
    def is_ar(self) -> bool:
        return self.objective.name == "ar"

    @property
    def has_ar_loss(self) -> bool:
        return self.is_ar or self.objective.ar_weight > 0

    @property
    def views(self) -> int:
        return 0 if self.is_ar else self.objective.views

    @property
    def attention(self) -> str:
        return "prefix" if self.is_ar else self.spec.attention

    @property
    def block_sizes(self) -> list[int]:
        """All block sizes of the run, the checkpoint's own last."""
        return [*self.objective.block_sizes.values(), self.spec.block_size or 1]

    def block_size(self, step: int) -> int:
        """Block size at an optimizer step: the curriculum's, or the checkpoint's."""
        schedule = self.objective.block_sizes
        return schedule[max(start for start in schedule if start <= step)] if schedule else self.spec.block_size or 1

    def piece_length(self, seq_len: int) -> int:
        """Tokens of the pieces into which long plain text is cut, so that one fits into a row with all its copies.

        With block attention a piece ends where a block ends: only the end of a text is padded with end-of-text.
        """
        if self.attention == "block":
            size = self.spec.block_size or 1
            return max(seq_len // (1 + self.views) // size, 1) * size
        return seq_len // max(self.views, 1)

    def sizes(self, context_lengths: np.ndarray, target_lengths: np.ndarray, epoch: int) -> np.ndarray:
        """Room that each example is given in a row of that epoch, [E] tokens; a curriculum's small blocks leave some free."""
        starts, lengths = self._canvases(context_lengths, target_lengths, np.arange(len(target_lengths)), epoch)
        ends = context_lengths[:, None] + starts + lengths
        clean = [self._num_clean(context_lengths, target_lengths, starts, ends, size) for size in self.block_sizes]
        return np.max(clean, axis=0) + (ends - self._first_position(context_lengths, starts)).sum(1)

    def room_needed(self, context_lengths: np.ndarray, target_lengths: np.ndarray) -> np.ndarray:
        """seq_len that each example needs in any epoch, [E]; a random tail of end-of-text gives way, so it does not count."""
        if self.attention == "block":
            return self.sizes(context_lengths, target_lengths, 0)
        if self.canvas_start == "anywhere" and not self.is_ar:
            beside = target_lengths if self.has_ar_loss else target_lengths - 1
            return context_lengths + beside + self.views * (self.canvas_length or 0)
        if self.attention == "bidirectional":
            return self.views * (context_lengths + target_lengths)
        return context_lengths + max(self.views, 1) * target_lengths

    def longest_canvas(self, context_lengths: np.ndarray, target_lengths: np.ndarray) -> int:
        """Tokens of the longest stretch in which attention is bidirectional: how far the annealed window has to open."""
        if self.canvas_start == "anywhere":
            return int(self.canvas_length or 0)
        canvas = np.maximum(target_lengths, self.canvas_length or 0)
        return int((canvas + context_lengths * (self.attention == "bidirectional")).max())

    def tokens(
        self, context: list[int], target: list[int], place: Place, block_size: int | None = None
    ) -> dict[str, Tensor]:
        """The tokens of one example, 1-D tensors: xt, x0, is_noised, predictor and so on, all of one length but teacher_ids and
        num_clean.

        predictor is the place, inside the example, of the hidden state that predicts a noised token: the token itself, or with
        shift_logits the one before it (a canvas' first token is predicted by the last clean token that it sees). ar_predictor is
        the same for the next-token loss on the clean target. -1: none. teacher_ids: the clean text, for distillation.
        """
        size = block_size or self.spec.block_size or 1
        num_context, num_target = np.array([len(context)]), np.array([len(target)])
        starts, lengths = self._canvases(num_context, num_target, np.array([place.example]), place.epoch)
        ends = num_context[:, None] + starts + lengths
        text = torch.tensor(context + target + [self.end_of_text] * int(lengths.max(initial=0)), dtype=torch.long)
        num_clean = int(self._num_clean(num_context, num_target, starts, ends, size)[0])
        parts = [self._clean(text[:num_clean], len(context), len(context) + len(target), size)]
        offset = num_clean
        firsts = self._first_position(num_context, starts, size)
        for view, (first, end) in enumerate(zip(firsts[0].tolist(), ends[0].tolist(), strict=True)):
            part = self._noisy(text, torch.arange(first, end), view, len(context), offset, place, size)
            parts.append({**part, "teachable": part["is_noised"] & (part["position"] < len(context) + len(target))})
            offset += end - first
        row = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        # Of the example's own tokens, those in the row: without further copies, and without the tail of end-of-text.
        num_own = min(max([num_clean, *ends[0].tolist()]), len(context) + len(target))
        return {**row, "teacher_ids": text[: len(context) + len(target)], "num_clean": torch.tensor([num_own])}

    def _canvases(
        self, context_lengths: np.ndarray, target_lengths: np.ndarray, examples: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where in its target each view's canvas starts, and its length with the tail of end-of-text: [E, K] each.

        One tail for all views of an example, so that complementary views cover the same tokens.
        """
        target = target_lengths[:, None].repeat(self.views, 1)
        starts = np.zeros_like(target)
        if self.attention == "block":  # a text ends with its last block full of end-of-text, as a decoder writes it
            return starts, target + -(context_lengths + target_lengths)[:, None] % self.block_sizes[-1]
        if self.is_ar or self.canvas_length is None:
            return starts, target
        if self.canvas_start == "anywhere":  # stratified over the target
            where = uniform_for(self.seed, examples, 2 * epoch + 1)[:, None] + np.arange(self.views)
            starts = (where / self.views * target).astype(np.int64)
        rest = target - starts
        tail = uniform_for(self.seed, examples, 2 * epoch)[:, None] * (np.maximum(self.canvas_length - rest, 0) + 1)
        if self.canvas_start == "prompt" and self.seq_len is not None:
            contexts = context_lengths * (self.views if self.attention == "bidirectional" else 1)
            room = np.maximum(self.seq_len - contexts - self.views * target_lengths, 0) // self.views
            tail = np.minimum(tail, room[:, None])
        longest = self.canvas_length if self.canvas_start == "anywhere" else np.iinfo(np.int64).max
        return starts, np.minimum(rest + tail.astype(np.int64), longest)

    def _num_clean(
        self, context_lengths: np.ndarray, target_lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray, size: int
    ) -> np.ndarray:
        """Tokens of the clean copy, [E]: what any canvas sees of it, and the whole text where it has a loss of its own."""
        if self.attention == "bidirectional":
            return np.zeros_like(context_lengths)
        if self.attention == "block":
            seen = np.maximum((ends.max(1) - 1) // size * size, context_lengths * (self.spec.clean_context == "causal"))
        else:
            seen = context_lengths + starts.max(1, initial=0)
        return np.maximum(seen, (context_lengths + target_lengths) * self.has_ar_loss)

    def _first_position(self, context_lengths: np.ndarray, starts: np.ndarray, size: int | None = None) -> np.ndarray:
        """Position of the first token of each view, [E, K]; size None: the earliest of any block size of the run."""
        firsts = context_lengths[:, None] + starts
        if self.attention == "bidirectional":
            return np.zeros_like(firsts)
        if self.attention == "block" and self.spec.clean_context == "block":
            return np.min([firsts // b * b for b in ([size] if size else self.block_sizes)], axis=0)
        return firsts

    def _clean(self, ids: Tensor, num_context: int, num_text: int, size: int) -> dict[str, Tensor]:
        place, never = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.bool)
        is_ar_target = (place >= max(num_context, 1)) & (place < num_text) & self.has_ar_loss
        return {
            "xt": ids,
            "x0": ids,
            "is_noised": never,
            "loss_mask": never,
            "teachable": never,
            "predictor": torch.full_like(ids, -1),
            "ar_predictor": torch.where(is_ar_target, place - 1, -1),
            "t": torch.zeros(len(ids)),
            "elbo_weight": torch.zeros(len(ids)),
            "loss_weight": torch.zeros(len(ids)),
            "position": place,
            "context_length": place + 1 if self.is_ar else clean_context_lengths(self.spec, place, size),
            "view": torch.zeros_like(ids),
        }

    def _noisy(
        self, text: Tensor, position: Tensor, view: int, num_context: int, offset: int, place: Place, size: int
    ) -> dict[str, Tensor]:
        _, block, view_ids, sees, predictor = noisy_view(self.spec, position, offset, view, size)
        loss_mask = (predictor >= 0) & (position >= num_context)
        x0 = text[position]
        t = self._times(place, view, int(block[-1]) + 1)[block]
        xt, is_noised = self._noised(x0, t, loss_mask, place, view)
        weight = self._elbo_weight(t, view)
        loss_weight = {
            "elbo": lambda: weight,
            "uniform": lambda: torch.ones_like(weight),
            "cart": lambda: cart_weight(position, sees, block, is_noised),
        }[self.objective.weight]()
        return {
            "xt": xt,
            "x0": x0,
            "is_noised": is_noised,
            "loss_mask": loss_mask,
            "predictor": predictor,
            "ar_predictor": torch.full_like(position, -1),
            "t": t,
            "elbo_weight": weight,
            "loss_weight": loss_weight,
            "position": position,
            "context_length": sees,
            "view": view_ids,
        }

    def _pair(self, view: int) -> tuple[int, bool]:
        """(number of the draw that a view takes its noise from, whether it is the complement of that draw)."""
        return (view // 2, view % 2 == 1) if self.objective.complementary else (view, False)

    def _times(self, place: Place, view: int, num_blocks: int) -> Tensor:
        pair, _ = self._pair(view)
        start = float(torch.rand((), generator=generator_for(self.seed, -2)))
        draws = self.objective.views // (2 if self.objective.complementary else 1)
        return sample_t(
            torch.tensor(place.ordinal * draws + pair),
            blocks=torch.arange(num_blocks),
            offset=start,
            t_min=self.noise.t_min,
            t_max=self.noise.t_max,
        )

    def _noised(self, x0: Tensor, t: Tensor, loss_mask: Tensor, place: Place, view: int) -> tuple[Tensor, Tensor]:
        """(xt, which tokens the loss is taken at): the noised ones, or for noise that cannot be told from text all of them."""
        pair, is_complement = self._pair(view)
        generator = generator_for(self.seed, place.example, place.epoch, pair)
        mask = self.spec.mask_token_id
        if self.noise.kind != "absorbing":
            xt = corrupt(
                x0,
                t,
                loss_mask,
                kind=self.noise.kind,
                vocab_size=self.vocab_size,
                mask_token_id=mask,
                p_uniform=self.noise.p_uniform,
                generator=generator,
            )
            return xt, loss_mask
        xt, is_noised = q_sample(
            x0, t, loss_mask, mask_token_id=mask, schedule=self.noise.schedule, generator=generator
        )
        if is_complement:
            is_noised = loss_mask & ~is_noised
            xt = torch.where(is_noised, mask, x0)
        return xt, is_noised

    def _elbo_weight(self, t: Tensor, view: int) -> Tensor:
        _, is_complement = self._pair(view)
        if self.noise.kind != "absorbing":
            return torch.ones_like(
                t
            )  # the weight is inside the loss of a row, which depends on what the noise did to it
        if is_complement:
            return complement_weight(t, self.noise.schedule, self.noise.t_min)
        return elbo_weight(t, self.noise.schedule)
