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

import json
import signal
import sys
from pathlib import Path
from typing import Any

from ..arguments import CommandParser
from ..files.model_folder import check_named_folders
from ..files.user_text import check_user_file
from .settings import SETTINGS, check_settings


def main(argv: list[str]) -> None:
    """The `adapt convert` command."""
    parser = CommandParser(prog="adapt convert", description=__doc__)
    parser.option("base", type=str, metavar="BASE", help="Hub id, folder, or .gguf file")
    parser.option("out", type=str, metavar="OUT", help="new folder")
    parser.option(
        "--attention", type=SETTINGS["attention"], default="bidirectional", help="bidirectional, block or prefix"
    )
    parser.option("--block_size", type=SETTINGS["block_size"], default=None, help="tokens; only for attention=block")
    parser.option(
        "--clean_context",
        type=SETTINGS["clean_context"],
        default=None,
        help="how finished blocks see each other: causal (default) or block; only for attention=block",
    )
    parser.option(
        "--mask_token", type=SETTINGS["mask_token"], default=None, help="default: reserved token, else a new <|mask|>"
    )
    parser.option(
        "--shift_logits", type=SETTINGS["shift_logits"], default=False, help="hidden state i predicts token i+1"
    )
    parser.option(
        "--mask_init_std",
        type=SETTINGS["mask_init_std"],
        default=0.0,
        help="noise around the mean that the mask token's row starts with",
    )
    parser.option("--seed", type=SETTINGS["seed"], default=0, help="of that noise")
    parser.option(
        "--pad_to_multiple_of",
        type=SETTINGS["pad_to_multiple_of"],
        default=None,
        help="rows of the embedding, such as 64; default: as needed",
    )
    parser.option(
        "--dtype",
        type=SETTINGS["dtype"],
        default=None,
        help="bfloat16, float16 or float32; default: as the weights are stored",
    )
    parser.option("--adapter", type=str | None, default=None, help="PEFT folder to merge into BASE first")
    parser.option("--attn_implementation", type=str | None, default=None, help="kernel that the probe runs with")
    parser.option(
        "--trust_remote_code",
        type=SETTINGS["trust_remote_code"],
        default=False,
        help="run Python files that come with the model",
    )
    options = vars(parser.parse_args(argv))
    _check(**options)
    from .convert import convert  # here, because torch takes seconds, and what is refused above needs none

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


def _check(base: str, out: str, adapter: str | None, attn_implementation: str | None, **settings: Any) -> None:
    """ValueError for what can be refused without reading the model."""
    check_settings(Path(out), settings)
    if base.endswith(".gguf"):
        check_user_file(Path(base), "base", "a GGUF file, a model's folder or a Hub id")
    else:
        check_named_folders(base, adapter, "base")
