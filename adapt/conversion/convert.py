"""Converts a causal language model into a diffusion checkpoint: same weights, a mask token, another attention pattern.

    adapt convert HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2 --attention prefix
    adapt convert ./my-llama out/my-dlm                        # a local folder, bidirectional
    adapt convert ./my-llama out/my-dlm --attention block --block_size 32
    adapt convert model.Q4_1.gguf out/from-gguf --shift_logits true
    adapt convert ./my-llama out/my-dlm --adapter ./my-lora    # a PEFT adapter merged in (or BASE is its folder)

Weights are copied tensor by tensor; only the mask token's row of the embedding (and of an untied head) is written
anew. Meanwhile the model is probed with its weights loaded, and OUT appears only when all of it is there.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .. import progress
from ..arguments import CommandParser
from ..files import adapters
from ..files.loading import config_of, tokenizer_of
from ..files.marks import publish_marked
from ..files.model_folder import check_model_folder, copy_extras, mark_untrained
from ..files.outputs import check_new_folder, scratch_beside
from ..files.safetensors_folder import Shard
from ..files.staging import check_space
from ..model.precision import DTYPES
from ..probe.in_place import probe_in_place
from ..spec import ATTENTIONS, CLEAN_CONTEXTS, DiffusionSpec
from . import base_model as sources
from .copy_weights import Copy
from .embedding_rows import NewRows, per_layer_rows
from .mask_token import add_mask_token, check_whole
from .weight_plan import kept_in_float32

_MOST_PADDING = 1 << 16


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
    layers on the loaded weights, which stay in their files (memory: `mapped.py`). attn_implementation: the kernel of the probe, or
    a function that chooses one for the config. adapter: a PEFT folder that is merged into `base` first.
    Raises ValueError if `out` exists, if `base` is not a causal LM with plain attention layers, or if the probe fails.
    """
    out = check_new_folder(out)
    _check_attention(attention, block_size, clean_context)
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
    _check_weights_settings(dtype, pad_to_multiple_of, mask_init_std)
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


def _check_attention(attention: str, block_size: int | None, clean_context: str | None) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention}: choose one of {', '.join(ATTENTIONS)}")
    for name, value in (("block_size", block_size), ("clean_context", clean_context)):
        if value is not None and attention != "block":
            raise ValueError(f"{name}={value}: belongs to attention=block, but attention={attention}; leave it out")
    if attention == "block" and (block_size is None or block_size < 1):
        raise ValueError(f"block_size={block_size}: attention=block needs one of at least 1; try 16 or 32")
    if clean_context is not None and clean_context not in CLEAN_CONTEXTS:
        raise ValueError(f"clean_context={clean_context}: choose one of {', '.join(CLEAN_CONTEXTS)}")


def _check_weights_settings(dtype: str | None, pad_to_multiple_of: int | None, mask_init_std: float) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(sorted(DTYPES))}")
    if pad_to_multiple_of is not None and not 1 <= pad_to_multiple_of <= _MOST_PADDING:
        raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: must be from 1 to {_MOST_PADDING}; try 64")
    if not 0 <= mask_init_std <= 1:
        raise ValueError(f"mask_init_std={mask_init_std}: must be from 0 to 1; try 0.02")


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


def main(argv: list[str]) -> None:
    """The `adapt convert` command."""
    parser = CommandParser(prog="adapt convert", description=__doc__)
    parser.add_argument("base", type=str, metavar="BASE", help="Hub id, folder, or .gguf file")
    parser.add_argument("out", type=str, metavar="OUT", help="new folder")
    parser.add_argument("--attention", type=str, default="bidirectional", help="bidirectional, block or prefix")
    parser.add_argument("--block_size", type=int | None, default=None, help="tokens; only for attention=block")
    parser.add_argument(
        "--clean_context",
        type=str | None,
        default=None,
        help="how finished blocks see each other: causal (default) or block; only for attention=block",
    )
    parser.add_argument(
        "--mask_token", type=str | None, default=None, help="default: reserved token, else a new <|mask|>"
    )
    parser.add_argument("--shift_logits", type=bool, default=False, help="hidden state i predicts token i+1")
    parser.add_argument(
        "--mask_init_std", type=float, default=0.0, help="noise around the mean that the mask token's row starts with"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that noise")
    parser.add_argument(
        "--pad_to_multiple_of",
        type=int | None,
        default=None,
        help="rows of the embedding, such as 64; default: as needed",
    )
    parser.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help="bfloat16, float16 or float32; default: as the weights are stored",
    )
    parser.add_argument("--adapter", type=str | None, default=None, help="PEFT folder to merge into BASE first")
    parser.add_argument("--attn_implementation", type=str | None, default=None, help="kernel that the probe runs with")
    parser.add_argument(
        "--trust_remote_code", type=bool, default=False, help="run Python files that come with the model"
    )
    options = vars(parser.parse_args(argv))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        out = convert(**options)
    finally:
        signal.signal(signal.SIGTERM, before)
    spec = json.loads((out / "config.json").read_text())["diffusion"]
    print(
        f"{out}: {spec['attention']} attention, mask token {spec['mask_token_id']}; probed on the loaded weights",
        file=sys.stderr,
    )


def _stop(*_: object) -> None:
    """SIGTERM leaves as Ctrl-C does: what was written so far is removed on the way out."""
    raise SystemExit(128 + signal.SIGTERM)
