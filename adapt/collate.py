"""Packed rows of examples -> a batch: noise drawn, positions and views laid out, the rows for the head listed.

Everything random is keyed by (seed, example, epoch, view), and is drawn on the CPU, in the loader's workers. The indices of
the noised rows are computed here too, so that the training step never waits for the device to count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .attention import PADDING_DOCUMENT
from .checkpoint import DiffusionSpec
from .config import NoiseConfig, ObjectiveConfig
from .noise import complement_weight, elbo_weight, generator_for, q_sample, sample_t
from .packing import Packing, Place

Batch = dict[str, Tensor]


class Sizes(NamedTuple):
    """Tokens of each example, [E]: those that it takes in a row, and those of one stretch of bidirectional attention."""

    total: np.ndarray
    canvas: np.ndarray


@dataclass(frozen=True)
class Canvases:
    """How one example becomes tokens of a row: its context and K noised copies of its target."""

    spec: DiffusionSpec
    noise: NoiseConfig
    objective: ObjectiveConfig
    canvas_length: int | None
    end_of_text: int
    seed: int

    @property
    def is_ar(self) -> bool:
        return self.objective.name == "ar"

    @property
    def views(self) -> int:
        return 1 if self.is_ar else self.objective.views

    def sizes(self, context_lengths: np.ndarray, target_lengths: np.ndarray) -> Sizes:
        """Tokens of each example, with a random tail of end-of-text the most it can take."""
        if self.is_ar:
            return Sizes(context_lengths + target_lengths, np.zeros_like(target_lengths))
        canvas = np.maximum(target_lengths, self.canvas_length or 0)
        if self.spec.attention == "bidirectional":  # each view needs a context of its own, which sees the canvas
            return Sizes(self.views * (context_lengths + canvas), context_lengths + canvas)
        return Sizes(context_lengths + self.views * canvas, canvas)

    def tokens(self, context: list[int], target: list[int], place: Place) -> dict[str, Tensor]:
        """The tokens of one example, 1-D tensors of one length: xt, x0, is_noised, predictor and so on; see `pack`.

        predictor is the place, inside the example, of the hidden state that predicts a token: the token itself, or with
        shift_logits the one before it (a canvas' first token is predicted by the context's last). -1: none, never noised.
        """
        shift = self.is_ar or self.spec.shift_logits
        context_ids = torch.tensor(context, dtype=torch.long)
        pieces: list[dict[str, Tensor]] = []
        offset = 0
        for view in range(self.views):
            x0 = torch.tensor(self._canvas(target, place, view), dtype=torch.long)
            own_context = view == 0 or self.spec.attention == "bidirectional"
            canvas_start = offset + len(context) if own_context else offset
            context_start = offset if own_context else 0
            predictor = canvas_start + torch.arange(len(x0)) - int(shift)
            if shift:
                predictor[0] = context_start + len(context) - 1 if context else -1
            xt, is_noised, weight = self._noised(x0, predictor >= 0, place, view)
            canvas = {
                "xt": xt,
                "x0": x0,
                "is_noised": is_noised,
                "predictor": predictor,
                "loss_mask": predictor >= 0,
                "elbo_weight": weight.expand(len(x0)),
                "position": len(context) + torch.arange(len(x0)),
                "view": torch.full((len(x0),), 0 if self.is_ar else view + 1),
                "copy": torch.full((len(x0),), view if self.spec.attention == "bidirectional" else 0),
            }
            if own_context:
                pieces.append(self._context(context_ids, view))
            pieces.append(canvas)
            offset = canvas_start + len(x0)
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def _context(self, ids: Tensor, view: int) -> dict[str, Tensor]:
        bidirectional = self.spec.attention == "bidirectional" and not self.is_ar
        never = torch.zeros(len(ids), dtype=torch.bool)
        return {
            "xt": ids,
            "x0": ids,
            "is_noised": never,
            "predictor": torch.full_like(ids, -1),
            "loss_mask": never,
            "elbo_weight": torch.zeros(len(ids)),
            "position": torch.arange(len(ids)),
            "view": torch.full_like(ids, view + 1 if bidirectional else 0),
            "copy": torch.full_like(ids, view if bidirectional else 0),
        }

    def _canvas(self, target: list[int], place: Place, view: int) -> list[int]:
        """The target, followed by end-of-text up to a random length of at most canvas_length."""
        if self.is_ar or self.canvas_length is None or len(target) >= self.canvas_length:
            return target
        # One length for all views of an example, so that complementary views cover the same tokens.
        generator = generator_for(self.seed, place.example, place.epoch, -1)
        length = int(torch.randint(len(target), self.canvas_length + 1, (), generator=generator))
        return target + [self.end_of_text] * (length - len(target))

    def _noised(self, x0: Tensor, loss_mask: Tensor, place: Place, view: int) -> tuple[Tensor, Tensor, Tensor]:
        """(xt, is_noised, elbo_weight []); for the AR objective the tokens are clean and all are predicted."""
        if self.is_ar:
            return x0, loss_mask, torch.ones(())
        pair, is_second = divmod(view, 2) if self.objective.complementary else (view, 0)
        draws = self.objective.views // (2 if self.objective.complementary else 1)
        start = float(torch.rand((), generator=generator_for(self.seed, -2)))
        ordinal = torch.tensor(place.ordinal * draws + pair)
        t = sample_t(ordinal, offset=start, t_min=self.noise.t_min)
        xt, is_noised = q_sample(
            x0,
            t,
            loss_mask,
            mask_token_id=self.spec.mask_token_id,
            schedule=self.noise.schedule,
            generator=generator_for(self.seed, place.example, place.epoch, pair),
        )
        if not is_second:
            return xt, is_noised, elbo_weight(t, self.noise.schedule)
        is_noised = loss_mask & ~is_noised
        xt = torch.where(is_noised, self.spec.mask_token_id, x0)
        return xt, is_noised, complement_weight(t, self.noise.schedule, self.noise.t_min)


class PackedRows(torch.utils.data.Dataset):
    """Row k of the run as tensors; `len` is the number of rows that the run reads."""

    def __init__(self, examples: Dataset, packing: Packing, canvases: Canvases, num_rows: int) -> None:
        self.examples, self.packing, self.canvases, self.num_rows = examples, packing, canvases, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def epochs(self, num_rows: int) -> float:
        """Passes over the data after that many rows."""
        return (self.packing.row(num_rows - 1)[-1].ordinal + 1) / len(self.packing.sizes) if num_rows else 0.0

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        places = self.packing.row(k)
        rows = self.examples[[place.example for place in places]]
        return pack(
            [
                self.canvases.tokens(context, target, place)
                for context, target, place in zip(rows["context"], rows["target"], places, strict=True)
            ]
        )


def pack(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples side by side in one row, each a document of its own, and what `predictor` means moved along."""
    parts, document, offset = [], PADDING_DOCUMENT + 1, 0
    for example in examples:
        predictor = torch.where(example["predictor"] >= 0, example["predictor"] + offset, -1)
        parts.append({**example, "predictor": predictor, "document": document + example["copy"]})
        document += int(example["copy"].max()) + 1
        offset += len(predictor)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def collate(rows: list[dict[str, Tensor]], length: int | None = None) -> Batch:
    """A batch of B rows padded to `length` (default: the longest), L tokens, of which N are noised and go through the head.

    input_ids, document_ids, view_ids, position_ids [B, L]; rows (index into B * L of the hidden state that predicts), targets,
    elbo_weight [N]; num_maskable [] tokens that might have been noised.
    """
    length = length or max(len(row["xt"]) for row in rows)

    def stacked(key: str, fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row[key], (0, length - len(row[key])), value=fill) for row in rows])

    predictors = [row["predictor"][row["is_noised"]] + b * length for b, row in enumerate(rows)]
    return {
        "input_ids": stacked("xt", 0),
        "document_ids": stacked("document", PADDING_DOCUMENT),
        "view_ids": stacked("view", 0),
        "position_ids": stacked("position", 0),
        "rows": torch.cat(predictors),
        "targets": torch.cat([row["x0"][row["is_noised"]] for row in rows]),
        "elbo_weight": torch.cat([row["elbo_weight"][row["is_noised"]] for row in rows]),
        "num_maskable": torch.stack([row["loss_mask"].sum() for row in rows]).sum(),
    }

