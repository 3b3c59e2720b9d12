"""Whether a model has positions, and this machine memory, for what is asked of it; known before a token is made."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .decoder import Decoder
from .settings import SamplerConfig

_UNBOUNDED = 1 << 20  # tokens; of a model that says nothing of positions


def positions_of(lm: Decoder) -> int:
    """Tokens that a row may have."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else _UNBOUNDED


def check_room(
    lm: Decoder,
    *,
    prompt: int,
    blanks: int,
    rows: int = 1,
    sampler: SamplerConfig | None = None,
    what: str = "max_new_tokens",
) -> None:
    """ValueError, of `what`, where rows of `prompt` tokens and `blanks` to fill are more than the model's positions, or than memory."""
    limit, setting = positions_of(lm), f"{what}={blanks}"
    if prompt + blanks > limit:
        raise ValueError(
            f"{setting}: with the prompt's {prompt} tokens that is more than the {limit} positions that the model has; shorten one "
            "of them"
        )
    at_once = (sampler and sampler.canvas_length) or lm.spec.block_size or blanks
    wanted = _fewest_bytes(lm, rows, prompt + blanks, min(blanks, at_once))
    if wanted > (free := free_bytes(lm.device)):
        raise ValueError(
            f"{setting}: {rows} rows of {prompt + blanks} tokens take {wanted / 1e9:.1f} GB and more, and {lm.device} has "
            f"{free / 1e9:.1f} GB free; give fewer tokens, or smaller batches"
        )


def _fewest_bytes(lm: Decoder, rows: int, length: int, columns: int) -> int:
    """What the first round holds at least: the hidden states of all tokens, and float32 logits of the blanks."""
    config = lm.model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None) or 1
    return rows * (length * hidden * lm.model.dtype.itemsize + columns * lm.vocab_size * 4)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device; without an end where the machine does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return 1 << 62 if found is None else int(found[1]) << 10
