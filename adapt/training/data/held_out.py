"""The rows that a run is tried on and never trained on: files of their own, or a share of the training rows.

Their noise is the same in every evaluation and in every run, and covers all times, so that values compare from the first step to
the last and between recipes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..recipe import Recipe
from ..sections import DataConfig
from .batch import PackedRows
from .examples import drop_too_long, lengths, load_examples, load_rows
from .packing import Packing
from .views import Canvases

_SEED = 0  # of the rows that are held out and of their noise, whatever training.seed is


class Rows(NamedTuple):
    train: Dataset
    held_out: Dataset | None


def load_split(config: DataConfig) -> Rows:
    """The rows of data.train without those of data.eval; ValueError where one of both is left empty, or as `load_rows` says."""
    rows = load_rows(config)
    if config.eval is None:
        return Rows(rows, None)
    if not isinstance(config.eval, float):
        with _errors_name_data_eval():
            return Rows(rows, load_rows(_as_training_data(config)))
    num_held_out = round(config.eval * len(rows))
    if not 0 < num_held_out < len(rows):
        raise ValueError(
            f"data.eval={config.eval}: of {len(rows)} rows this keeps {num_held_out} out of training; give a share that leaves rows "
            "on both sides, or files"
        )
    order = np.random.Generator(np.random.Philox(key=[_SEED, len(rows)])).permutation(len(rows))
    return Rows(rows.select(np.sort(order[num_held_out:])), rows.select(np.sort(order[:num_held_out])))


def held_out_rows(
    recipe: Recipe, canvases: Canvases, tokenizer: PreTrainedTokenizerBase, rows: Dataset, is_main: bool
) -> PackedRows:
    """One pass over the held-out rows, laid out as training lays out its own, with all times and the checkpoint's block size."""
    noise = dataclasses.replace(recipe.noise, t_min=1e-3, t_max=1.0)
    objective = dataclasses.replace(recipe.objective, weight="elbo", block_sizes={})
    canvases = dataclasses.replace(canvases, noise=noise, objective=objective, seed=_SEED)
    piece_length = canvases.piece_length(recipe.data.seq_len)
    with _errors_name_data_eval():
        named = recipe.data if isinstance(recipe.data.eval, float | None) else _as_training_data(recipe.data)
        examples = load_examples(named, tokenizer, rows=rows, piece_length=piece_length, is_main_process=is_main)
        needed = canvases.room_needed(lengths(examples, "context"), lengths(examples, "target"))
        what = "of data.eval take more with all their copies"
        examples = drop_too_long(examples, needed, recipe.data, is_main, what=what)
    sizes = partial(canvases.sizes, lengths(examples, "context"), lengths(examples, "target"))
    packing = Packing(sizes, recipe.data.seq_len, _SEED)
    return PackedRows(examples, packing, canvases, packing.num_rows(1), rows_per_step=1)


def _as_training_data(config: DataConfig) -> DataConfig:
    """The files of data.eval where those of data.train stand."""
    assert isinstance(config.eval, str | list)
    return dataclasses.replace(config, train=config.eval)


@contextmanager
def _errors_name_data_eval() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("data.train", "data.eval")) from error
