"""Converts a causal language model into a diffusion checkpoint: same weights, a mask token, another attention pattern.

    adapt convert HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2 --attention prefix
    adapt convert ./my-llama out/my-dlm                        # a local folder, bidirectional
    adapt convert ./my-llama out/my-dlm --attention block --block_size 32
    adapt convert model.Q4_1.gguf out/from-gguf --shift_logits true

Weights are copied tensor by tensor; only the mask token's row of the embedding (and of an untied head) is written
anew. The result is probed with its weights loaded, and appears under OUT only when all of it is there.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from . import weights
from .arguments import CommandParser
from .attention import layer_windows
from .checkpoint import ATTENTIONS, CLEAN_CONTEXTS, DiffusionSpec, check_model_folder, load

DEFAULT_MASK_TOKEN = "<|mask|>"
RESERVED = re.compile(
    r"^(<\|?reserved_special_token_\d+\|?>|<\|?(unused|extra)_?\d+\|?>|\[unused\d+\]|<\|?reserved_?\d+\|?>)$"
)
# Without any of them transformers makes an empty tokenizer, and says nothing.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt")
_KEEP = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")


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
    attn_implementation: str | None = None,
    verify: bool = True,
) -> Path:
    """Writes a diffusion checkpoint of `base` (Hub id, folder or .gguf file) to the new folder `out`; returns its path.

    mask_token: default is the tokenizer's own, else a reserved unused special token, else a new `<|mask|>` whose
    embedding row is the mean of all rows. shift_logits: train and decode with hidden state i predicting token i+1.
    block_size and clean_context ("causal", the default, or "block") belong to block attention; noise is what it will be trained
    with ("absorbing", "uniform", or "hybrid" with its p_uniform).
    Raises ValueError if `out` exists, if `base` is not a causal LM with plain attention layers, or if the probe fails.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"out={out}: exists already; choose a new folder or remove it (nothing was overwritten)")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention}: choose one of {', '.join(ATTENTIONS)}")
    for name, value in (("block_size", block_size), ("clean_context", clean_context)):
        if value is not None and attention != "block":
            raise ValueError(f"{name}={value}: belongs to attention=block, but attention={attention}; leave it out")
    if attention == "block":
        if block_size is None or block_size < 1:
            raise ValueError(f"block_size={block_size}: attention=block needs one of at least 1; try 16 or 32")
        clean_context = clean_context or "causal"
        if clean_context not in CLEAN_CONTEXTS:
            raise ValueError(f"clean_context={clean_context}: choose one of {', '.join(CLEAN_CONTEXTS)}")
    spec = DiffusionSpec(
        attention=attention,
        mask_token_id=-1,
        shift_logits=shift_logits,
        block_size=block_size,
        clean_context=clean_context,
        noise=noise,
        p_uniform=p_uniform,
        base_model=str(base),
    )
    if not str(base).endswith(".gguf"):
        check_model_folder(base, "base")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _no_traceback_when_full(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        source, revision = _fetch(base, Path(scratch))
        config = AutoConfig.from_pretrained(source)
        _check_base(config, base)
        if not any(file for pattern in _VOCABULARIES for file in source.glob(pattern)):
            raise ValueError(
                f"base={base}: no tokenizer in it; put the model's tokenizer.json (or tokenizer.model) beside it"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        mask_token_id, num_rows = _add_mask_token(tokenizer, weights.num_embeddings(source, config), mask_token)
        spec = dataclasses.replace(spec, mask_token_id=mask_token_id, base_revision=revision)
        staged = Path(scratch) / "checkpoint"
        _write(source, staged, config, tokenizer, spec, num_rows)
        if verify:
            load(staged, device="cpu", attn_implementation=attn_implementation)
        staged.rename(out)
    return out


@contextmanager
def _no_traceback_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizer's Rust raises a bare Exception for the same thing
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise ValueError(
            f"out={out}: the disk is full, nothing was left on it; free some space or write elsewhere"
        ) from error


def _fetch(base: str | Path, scratch: Path) -> tuple[Path, str | None]:
    """(local folder with config, safetensors and tokenizer; the Hub revision if it came from there)."""
    if str(base).endswith(".gguf"):
        from .gguf_source import gguf_to_folder

        return gguf_to_folder(base, scratch / "dequantized", dtype=torch.float32), None
    if Path(base).is_dir():
        return Path(base), None
    try:
        snapshot = Path(
            snapshot_download(str(base), allow_patterns=list(_KEEP), ignore_patterns=["*/*", "consolidated*"])
        )
    except Exception as error:  # huggingface_hub raises a dozen unrelated types; each means: no such model to be had
        raise ValueError(
            f"base={base}: neither a folder nor a model that the Hub gives us ({type(error).__name__})"
        ) from error
    return snapshot, snapshot.name


def _check_base(config: PretrainedConfig, base: str | Path) -> None:
    if getattr(config, "diffusion", None) is not None:
        raise ValueError(f"base={base}: is a diffusion checkpoint already; train it with `model.base: {base}`")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"base={base}: is an encoder-decoder ({config.model_type}); only decoder-only causal LMs can be adapted"
        )
    if config.get_text_config() is not config or {"audio_config", "vision_config"} & set(config.sub_configs):
        raise ValueError(
            f"base={base}: is multimodal ({config.model_type}); save its language model as a folder of its own first"
        )
    layer_windows(config)


def _add_mask_token(tokenizer: Any, num_rows: int, wanted: str | None) -> tuple[int, int]:
    """(id of the mask token, rows that the embedding needs), having put the token into the tokenizer."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    reserved = sorted((token for token in added if RESERVED.match(token)), key=vocabulary.__getitem__)
    mask_token = wanted if wanted is not None else tokenizer.mask_token or [DEFAULT_MASK_TOKEN, *reserved][-1]
    is_ordinary = mask_token in vocabulary and mask_token not in added
    if is_ordinary or not re.search(r"[^\w\s.,;:!?'\"()-]", mask_token):
        raise ValueError(f"mask_token={mask_token}: occurs in plain text; choose an unused special token, or a new one")
    if mask_token in str(tokenizer.chat_template):
        raise ValueError(
            f"mask_token={mask_token}: the chat template writes it; choose an unused special token, or a new one"
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})
    mask_token_id = tokenizer.mask_token_id
    if tokenizer.encode(mask_token, add_special_tokens=False) != [mask_token_id]:
        raise ValueError(
            f"mask_token={mask_token}: the tokenizer splits or changes it; choose another string, like "
            f"{DEFAULT_MASK_TOKEN}"
        )
    if mask_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        raise ValueError(
            f"mask_token={mask_token}: is the tokenizer's end, start or padding token; choose an unused one"
        )
    return mask_token_id, max(num_rows, mask_token_id + 1)


def _write(
    source: Path,
    out: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    num_rows: int,
) -> None:
    out.mkdir()
    embeddings = weights.embedding_names(source, config)

    def with_mask_row(rows: Tensor) -> Tensor:
        """Embedding or head rows [V, ...] grown to num_rows, the mask token's (and any new) row at the mean of all."""
        mean = rows.float().mean(0).to(rows.dtype)
        grown = torch.cat([rows, mean.expand(num_rows - len(rows), *rows.shape[1:])])
        grown[spec.mask_token_id] = mean
        return grown

    weights.copy(source, out, {name: with_mask_row for name in embeddings})
    config.vocab_size = num_rows
    spec.write_to(config)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for extra in ("generation_config.json", "LICENSE", "LICENSE.txt"):
        if (source / extra).is_file():
            shutil.copyfile(source / extra, out / extra)


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
    parser.add_argument("--attn_implementation", type=str | None, default=None, help="kernel that the probe runs with")
    out = convert(**vars(parser.parse_args(argv)))
    spec = json.loads((out / "config.json").read_text())["diffusion"]
    print(
        f"{out}: {spec['attention']} attention, mask token {spec['mask_token_id']}; probed on the loaded weights",
        file=sys.stderr,
    )
