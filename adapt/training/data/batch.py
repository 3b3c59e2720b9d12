"""Rows of a run -> a batch: examples packed side by side, padded, and the hidden states that the head is to run on listed.

Noise is drawn here, on the CPU, in the loader's workers, and the indices of the noised rows are computed here too, so that the
training step never waits for the device to count them.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ...attention.layout import PADDING_DOCUMENT
from ...attention.sdpa_pieces import geometry
from .packing import Packing
from .views import Canvases

Batch = dict[str, Any]


class PackedRows(torch.utils.data.Dataset):
    """Row k of the run as tensors; `len` is the number of rows that the run reads."""

    def __init__(
        self, examples: Dataset, packing: Packing, canvases: Canvases, num_rows: int, rows_per_step: int
    ) -> None:
        self.examples, self.packing, self.canvases = examples, packing, canvases
        self.num_rows, self.rows_per_step = num_rows, rows_per_step

    def __len__(self) -> int:
        return self.num_rows

    def epochs(self, num_rows: int) -> float:
        """Passes over the data after that many rows."""
        return (self.packing.row(num_rows - 1)[-1].ordinal + 1) / self.packing.num_examples if num_rows else 0.0

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        places = self.packing.row(k)
        rows = self.examples[[place.example for place in places]]
        block_size = self.canvases.block_size(k // self.rows_per_step)
        return pack(
            [
                self.canvases.tokens(context, target, place, block_size)
                for context, target, place in zip(rows["context"], rows["target"], places, strict=True)
            ]
        )


def pack(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples side by side in one row, each a document of its own, and what their predictors mean moved along."""
    parts, offset, teacher_offset = [], 0, 0
    for document, example in enumerate(examples, PADDING_DOCUMENT + 1):
        teacher_ids = example["teacher_ids"]
        teacher = {
            "teacher_document": torch.full_like(teacher_ids, document),
            "teacher_position": torch.arange(len(teacher_ids)),
            # Of what is not taught, which may lie behind the text's end, any row will do.
            "teacher_row": (teacher_offset + example["position"] - 1).clamp(0, teacher_offset + len(teacher_ids) - 1),
        }
        moved = {
            key: torch.where(example[key] >= 0, example[key] + offset, -1) for key in ("predictor", "ar_predictor")
        }
        parts.append({**example, **moved, **teacher, "document": torch.full_like(example["xt"], document)})
        offset, teacher_offset = offset + len(example["xt"]), teacher_offset + len(teacher_ids)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def collate(rows: list[dict[str, Tensor]], length: int | None = None, with_teacher: bool = False) -> Batch:
    """A batch of B rows padded to `length` (default: the longest), L tokens, of which N are noised and go through the head.

    input_ids, document_ids, view_ids, position_ids, context_lengths [B, L]; pieces: the pattern's geometry, on the host;
    rows (index into B * L of the hidden state that predicts), targets, xt, t, elbo_weight, loss_weight [N]; ar_rows, ar_targets
    [M] of the next-token loss; num_maskable [] tokens that might have been noised; counts: these, N and M as numbers, which
    are known without asking the device; num_clean, num_useful: texts' own tokens, each counted once, and tokens that are not
    padding. with_teacher: also the clean texts, for distillation; see `_teacher`.
    """
    length = length or max(len(row["xt"]) for row in rows)
    assert all(len(row["xt"]) <= length for row in rows)  # padding would cut it

    def stacked(key: str, fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row[key], (0, length - len(row[key])), value=fill) for row in rows])

    def indices(predictor: str, chosen: list[Tensor]) -> Tensor:
        return torch.cat(
            [row[predictor][at] + b * length for b, (row, at) in enumerate(zip(rows, chosen, strict=True))]
        )

    def of_rows(key: str, chosen: list[Tensor]) -> Tensor:
        return torch.cat([row[key][at] for row, at in zip(rows, chosen, strict=True)])

    noised = [row["is_noised"] for row in rows]
    ar = [row["ar_predictor"] >= 0 for row in rows]
    return {
        "input_ids": stacked("xt", 0),
        "document_ids": stacked("document", PADDING_DOCUMENT),
        "view_ids": stacked("view", 0),
        "position_ids": stacked("position", 0),
        "context_lengths": stacked("context_length", 1),
        "pieces": geometry(rows, length),
        "rows": indices("predictor", noised),
        "targets": of_rows("x0", noised),
        "xt": of_rows("xt", noised),
        "t": of_rows("t", noised),
        "elbo_weight": of_rows("elbo_weight", noised),
        "loss_weight": of_rows("loss_weight", noised),
        "ar_rows": indices("ar_predictor", ar),
        "ar_targets": of_rows("x0", ar),
        "num_maskable": torch.stack([row["loss_mask"].sum() for row in rows]).sum(),
        "counts": (
            sum(int(row["loss_mask"].sum()) for row in rows),
            int(torch.cat(noised).sum()),
            int(torch.cat(ar).sum()),
        ),
        "num_clean": torch.cat([row["num_clean"] for row in rows]).sum(),
        "num_useful": torch.tensor(sum(len(row["xt"]) for row in rows)),
        **(_teacher(rows, noised, length) if with_teacher else {}),
    }


def _teacher(rows: list[dict[str, Tensor]], noised: list[Tensor], unit: int) -> Batch:
    """The clean texts of a batch, [B, T] with T a multiple of `unit` (few shapes for compiled kernels), and for each noised token
    the row of B * T whose hidden state predicts it there.

    is_taught [N]: False for what the original would never write, such as the end-of-text behind an end-of-text.
    """
    length = -(-max(len(row["teacher_ids"]) for row in rows) // unit) * unit

    def stacked(key: str, fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row[key], (0, length - len(row[key])), value=fill) for row in rows])

    layouts = [
        {
            "document": row["teacher_document"],
            "view": torch.zeros_like(row["teacher_document"]),
            "position": row["teacher_position"],
            "context_length": row["teacher_position"] + 1,
        }
        for row in rows
    ]
    chosen = list(zip(rows, noised, strict=True))
    return {
        "teacher_input_ids": stacked("teacher_ids", 0),
        "teacher_document_ids": stacked("teacher_document", PADDING_DOCUMENT),
        "teacher_position_ids": stacked("teacher_position", 0),
        "teacher_pieces": geometry(layouts, length),
        "teacher_rows": torch.cat([row["teacher_row"][at] + b * length for b, (row, at) in enumerate(chosen)]),
        "is_taught": torch.cat([(row["teachable"] & (row["position"] > 0))[at] for row, at in chosen]),
    }
