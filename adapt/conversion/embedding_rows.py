"""The tensors with a row for each token, and what a mask token does to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class NewRows:
    """What a conversion does to an embedding or head [V, ...]: how many rows it has then, and which is the mask token's."""

    num_rows: int
    mask_row: int
    std: float = 0.0
    """Of the noise that the mask token's row has around the mean of all rows; 0 = none."""
    seed: int = 0


def embedding_names(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """Names in the files of the input embedding and, where it is stored apart, of the head's weight and bias."""
    wanted = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"base={model.config.model_type}: has no output embedding, so it is not a causal language model"
        )
    kind, tokens = model.config.model_type, model.config.vocab_size
    for part, table in (("embedding", model.get_input_embeddings()), ("head", head)):
        rows = len(table.weight)  # pyright: ignore[reportArgumentType]
        if rows != tokens:  # CPM-Ant's prompts, Moshi's start token: no longer one row per token
            raise ValueError(
                f"base={kind}: its {part} has {rows} rows, but config.vocab_size={tokens}; a mask token cannot be added to such "
                "a vocabulary"
            )
    wanted |= {id(parameter) for parameter in head.parameters()}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in wanted}
    prefix = model.base_model_prefix + "."
    names |= {name.removeprefix(prefix) for name in names}  # checkpoints of the bare backbone (GPT-2) have no prefix
    found = sorted(names.intersection(stored))
    if not found:
        raise ValueError(
            f"base={model.config.model_type}: none of the tensors in its files is the embedding of this kind of model; "
            "wrong config.json?"
        )
    return found


def per_layer_rows(stored: Mapping[str, dict[str, Any]], num_stored: int, rows: NewRows) -> dict[str, NewRows]:
    """The same for the second table of tokens that Gemma 3n and Gemma 4 have for their layers; empty where there is none.

    It grows where the embedding of `num_stored` rows does, as in transformers' own resizing, or where the mask token is beyond it:
    Gemma 4 looks up every id there.
    """
    found = {name: about["shape"] for name, about in stored.items() if name.endswith("embed_tokens_per_layer.weight")}
    tables = {name: shape[0] for name, shape in found.items() if len(shape) == 2}
    return {
        name: replace(rows, num_rows=rows.num_rows if rows.num_rows > num_stored or rows.mask_row >= size else size)
        for name, size in tables.items()
    }
