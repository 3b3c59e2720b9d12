"""A causal language model becomes a diffusion checkpoint: same weights, a mask token, another attention pattern.

    convert("HuggingFaceTB/SmolLM2-135M-Instruct", "out/smollm2", attention="prefix")

Weights are copied tensor by tensor; only the mask token's row of the embedding (and of an untied head) is written
anew. Meanwhile the model is probed with its weights loaded, and `out` appears only when all of it is there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .. import progress
from ..files import adapters
from ..files.loading import config_of, tokenizer_of
from ..files.marks import publish_marked
from ..files.model_folder import check_model_folder, copy_extras, mark_untrained
from ..files.outputs import scratch_beside
from ..files.safetensors_folder import Shard
from ..files.staging import check_space
from ..model.precision import DTYPES
from ..probe.in_place import probe_in_place
from ..spec import DiffusionSpec
from . import base_model as sources
from .copy_weights import Copy
from .embedding_rows import NewRows, per_layer_rows
from .mask_token import add_mask_token, check_whole
from .settings import check_settings
from .weight_plan import kept_in_float32


def convert(
    base: str | Path,
    out: str | Path,
    *,
    attention: str = "bidirectional",
    block_size: int | None = None,
    clean_context: str | None = None,
    noise: str = "absorbing",
    p_uniform: float | None = None,
    mask_token: str | None = None,
    shift_logits: bool = False,
    mask_init_std: float = 0.0,
    seed: int = 0,
    pad_to_multiple_of: int | None = None,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    attn_implementation: str | Callable[[PretrainedConfig], str] | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> Path:
    """Writes a diffusion checkpoint of `base` (Hub id, folder or .gguf file) to the new folder `out`; returns its path.

    mask_token: default is the tokenizer's own, else a reserved unused special token, else a new `<|mask|>` whose
    embedding row is the mean of all rows. shift_logits: train and decode with hidden state i predicting token i+1.
    block_size and clean_context ("causal", the default, or "block") belong to block attention; noise is what it will be trained
    with ("absorbing", "uniform", or "hybrid" with its p_uniform). mask_init_std: of Gaussian noise around that mean, drawn from
    seed. pad_to_multiple_of: rows of the embedding. dtype: default is what the weights are stored in. verify: probe all
    layers on the loaded weights, which stay in their files (`probe/in_place.py`). attn_implementation: the kernel of the probe, or
    a function that chooses one for the config. adapter: a PEFT folder that is merged into `base` first.
    Raises ValueError if `out` exists, if `base` is not a causal LM with plain attention layers, or if the probe fails.
    """
    out = Path(out)
    check_settings(
        out,
        {
            "attention": attention, "block_size": block_size, "clean_context": clean_context, "noise": noise,
            "p_uniform": p_uniform, "mask_token": mask_token, "shift_logits": shift_logits, "mask_init_std": mask_init_std,
            "seed": seed, "pad_to_multiple_of": pad_to_multiple_of, "dtype": dtype, "trust_remote_code": trust_remote_code,
            "verify": verify,
        },
    )  # fmt: skip
    if attention == "block":
        clean_context = clean_context or "causal"
    base, adapter = adapters.base_and_adapter(base, adapter)
    spec = DiffusionSpec(
        attention=attention,
        mask_token_id=-1,
        shift_logits=shift_logits,
        block_size=block_size,
        clean_context=clean_context,
        noise=noise,
        p_uniform=p_uniform,
        base_model=sources.name_of(base),
    )
    if not str(base).endswith(".gguf"):
        check_model_folder(base, "base")
    with scratch_beside(out) as scratch:
        # 1. Everything that can be refused before weights are copied.
        with progress.doing(f"reading {base}"):
            original = sources.read_base(base, adapter, scratch, trust_remote_code)
        config = original.config
        tokenizer = sources.read_tokenizer(
            original.folder, base, original.num_rows, trust_remote_code=trust_remote_code
        )
        mask_token_id, num_rows = add_mask_token(tokenizer, original.num_rows, mask_token, original.token_ids_in_use())
        num_rows += -num_rows % (pad_to_multiple_of or 1)
        spec = dataclasses.replace(spec, mask_token_id=mask_token_id, base_revision=original.revision)
        rows = NewRows(num_rows, mask_token_id, mask_init_std, seed)
        per_layer = per_layer_rows(original.stored, original.num_rows, rows)
        config.vocab_size, config.dtype = num_rows, original.dtype if dtype is None else DTYPES[dtype]
        for table in per_layer.values():
            config.vocab_size_per_layer_input = table.num_rows
        staged = scratch / "checkpoint"
        copy = Copy(
            original.shards,
            staged,
            dict.fromkeys(original.embeddings, rows) | per_layer,
            dtype=None if dtype is None else config.dtype,
            keep_dtype=kept_in_float32(original.skeleton, original.stored, config.dtype),
        )
        check_space(out, copy.num_bytes)
        # 2. The folder, under another name: what is about the weights, and they.
        staged.mkdir()
        _write_config_and_tokenizer(staged, original, tokenizer, spec, trust_remote_code)
        with copy.writing(out) as (readable, copy_done):
            # 3. The proof, while they are written.
            if verify:
                _verify(staged, readable, original, spec, attn_implementation, trust_remote_code, copy_done)
        publish_marked(staged, out)
    return out


def _write_config_and_tokenizer(
    out: Path, base: sources.Base, tokenizer: PreTrainedTokenizerBase, spec: DiffusionSpec, trust_remote_code: bool
) -> None:
    """Config, generation config, tokenizer, licence."""
    config = base.config
    if hasattr(config, "mask_token_id"):
        config.mask_token_id = spec.mask_token_id
    spec.write_to(config)
    config.save_pretrained(out)
    generation = {**base.generation, "mask_token_id": spec.mask_token_id}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    mark_untrained(out)
    copy_extras(base.folder, out, trust_remote_code=trust_remote_code)


def _verify(
    folder: Path,
    shards: dict[str, Shard],
    original: sources.Base,
    spec: DiffusionSpec,
    kernel: str | Callable[[PretrainedConfig], str] | None,
    trust_remote_code: bool,
    copy_done: Future[None],
) -> None:
    """Raises ValueError unless the model of these weights attends as promised, and the tokenizer still knows the mask token."""
    what = f"base={original.name}"
    tokenizer = tokenizer_of(folder, what, trust_remote_code=trust_remote_code)
    if tokenizer.mask_token_id != spec.mask_token_id:
        raise ValueError(
            f"mask_token={tokenizer.mask_token}: the tokenizer does not keep it when it is saved; choose another"
        )
    check_whole(tokenizer)
    config = config_of(folder, what, trust_remote_code=trust_remote_code)
    kernel = kernel(config) if callable(kernel) else kernel
    options: dict[str, Any] = {"dtype": config.dtype, "writing": folder} | (
        {} if kernel is None else {"attn_implementation": kernel}
    )
    probe_in_place(type(original.skeleton), config, shards, spec, what, copy_done, **options)
