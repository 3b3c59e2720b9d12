"""Configs, tokenizers and weights out of folders of strangers: the one place that has transformers read them.

None of their Python runs unless the caller says `trust_remote_code=True`, links do not lead out of the folder, sizes are held
against the stored tensors before memory is taken for them, and tensors that are missing or that the config does not know are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from .hub import CONFIGS, TEXTS, local_folder
from .json_file import read_json
from .model_config import CONFIG, TRUST, check_made, check_tokenizer_numbers, drop_code, one_line, read_model_config
from .model_folder import check_files
from .safetensors_folder import Shard, read_shards

_BUFFERS = 1 << 30  # bytes; the largest of a real model are some 100 MB of positions
_MORE_THAN_STORED = 2  # times the stored numbers; tied weights and merged experts stay below
# Buffers that old checkpoints store, and that no model of today reads: causal masks, rotary frequencies, positions.
OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|causal_mask$|rotary(_pos)?_emb\.inv_freq$|(^|\.)position_ids$"
)


def config_of(
    folder: str | Path, what: str, *, trust_remote_code: bool = False, todo: str = TRUST, **options: Any
) -> PretrainedConfig:
    """The config of a folder, a config.json or a Hub id; ValueError, of `what`, for one that cannot be, or that needs code."""
    path = local_folder(folder, what, CONFIGS, trust_remote_code=trust_remote_code)
    check_files(path, what)
    read_model_config(path, what, todo=todo, trust_remote_code=trust_remote_code)
    with one_line(f"{what}: config.json makes no model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    check_made(config, what)
    # Not that of the machine it was saved on, which need not be had here.
    config._attn_implementation = options.get("attn_implementation")
    return config if trust_remote_code else drop_code(config)


def tokenizer_of(folder: str | Path, what: str, *, trust_remote_code: bool = False, todo: str = TRUST) -> Any:
    """The tokenizer of a folder or a Hub id; ValueError, of `what`, for one that cannot be read, or that needs code."""
    path, code = local_folder(folder, what, TEXTS, trust_remote_code=trust_remote_code), None
    check_files(path, what)
    if (path / CONFIG).is_file():  # transformers looks there too
        read_model_config(path, what, trust_remote_code=trust_remote_code, todo=todo)
    if (path / "tokenizer_config.json").is_file():
        saved = read_json(path / "tokenizer_config.json", what)
        check_tokenizer_numbers(saved, what)
        code = saved.get("auto_map")
    try:
        with one_line(f"{what}: its tokenizer cannot be read"):
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in f"{error} {error.__cause__}":  # `one_line` cuts what transformers says
            raise
        raise ValueError(
            f"{what}: its tokenizer is made by Python code of its own ({str(code)[:60]}), which was not run; {todo}"
        ) from error
    if not trust_remote_code:
        tokenizer._auto_map = None
        tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a config with random weights; on the device of the caller's `with torch.device(...)`."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def model_of(folder: str | Path, what: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model of a folder or a Hub id with all of its weights; ValueError, of `what`, unless they are those of its config."""
    check_weights(folder, what, trust_remote_code=trust_remote_code)
    return weights_of(folder, what, trust_remote_code=trust_remote_code, **options)


def weights_of(folder: str | Path, what: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """`model_of` for a folder that was checked before: under ZeRO-3 a model cannot be made on the meta device to compare."""
    path = local_folder(folder, what, trust_remote_code=trust_remote_code)
    check_files(path, what)
    options["config"] = config_of(path, what, trust_remote_code=trust_remote_code)  # which names no kernel
    with one_line(f"{what}: cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    model, loading = loaded
    check_loaded(loading, what)
    model.name_or_path = model.config._name_or_path = str(folder)  # an adapter names it, and not a place in the cache
    if not trust_remote_code:
        drop_code(model.config)
    return model


def check_loaded(loading: Mapping[str, Any], what: str) -> None:
    """ValueError for a tensor that was not found, or that the model has no place for.

    transformers only warns of them: the one it leaves random, without the other it is another model.
    """
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise ValueError(f"{what}: no weights for {', '.join(missing[:3])}; it is not complete, or not of this model")
    unexpected = sorted(key for key in loading.get("unexpected_keys") or () if not OLD_BUFFERS.search(key))
    if unexpected:
        raise ValueError(
            f"{what}: holds weights that its config.json has no place for ({', '.join(unexpected[:3])}); wrong config.json, or "
            "another model's weights?"
        )


def check_weights(folder: str | Path, what: str, *, trust_remote_code: bool = False) -> None:
    """ValueError, of `what`, where config.json and the stored tensors are not of one model. Takes no memory."""
    path = local_folder(folder, what, trust_remote_code=trust_remote_code)
    config = config_of(path, what, trust_remote_code=trust_remote_code)
    skeleton(config, what, read_shards(path, what), trust_remote_code=trust_remote_code, more_rows=False)


def skeleton(
    config: PretrainedConfig,
    what: str,
    shards: Mapping[str, Shard],
    *,
    trust_remote_code: bool = False,
    more_rows: bool = True,
) -> PreTrainedModel:
    """The model without memory for its weights; ValueError where a stored tensor has another shape than config.json says.

    more_rows: the embedding may have more than the vocabulary, and conversion makes the vocabulary as large.
    """
    _check_layers(config, what, shards)
    with one_line(f"{what}: config.json makes no model"):
        with torch.device("meta"):
            model = empty_model(config, trust_remote_code=trust_remote_code)
    stored = {name: tensor["shape"] for shard in shards.values() for name, tensor in shard.tensors.items()}
    embeddings = {
        id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module
    }
    prefix = model.base_model_prefix + "."
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = stored.get(name, stored.get(name.removeprefix(prefix)))
        first = 1 if more_rows and id(parameter) in embeddings else 0
        if shape is not None and shape[first:] != list(parameter.shape)[first:]:
            raise ValueError(
                f"{what}: {name} is stored with the shape {shape}, but config.json says {list(parameter.shape)}; "
                "wrong config.json, or another model's weights?"
            )
    check_memory(model, what, sum(math.prod(shape) for shape in stored.values()))
    return model


def check_memory(model: PreTrainedModel, what: str, num_stored: int) -> None:
    """ValueError for a model that takes memory for what is not stored, before it is taken."""
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > _BUFFERS:
        raise ValueError(
            f"{what}: config.json asks for {buffers / 1e9:.0f} GB besides the weights; check its numbers of positions"
        )
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > _MORE_THAN_STORED * num_stored:
        raise ValueError(
            f"{what}: config.json asks for {wanted:,} weights, but its files hold {num_stored:,}; wrong config.json?"
        )


def _check_layers(config: PretrainedConfig, what: str, shards: Mapping[str, Shard]) -> None:
    """A million layers are a million modules, before the first missing weight is noticed; a few runs through each may be meant."""
    numbers = [
        int(i) for shard in shards.values() for name in shard.tensors for i in re.findall(r"\.(\d{1,9})\.", name)
    ]
    stored = 1 + max(numbers, default=-1)
    layers = getattr(config, "num_hidden_layers", None)
    if stored and isinstance(layers, int) and layers > 64 * stored:
        raise ValueError(
            f"{what}: config.json says num_hidden_layers={layers}, but the weights have {stored}; wrong config.json?"
        )
