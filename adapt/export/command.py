"""Writes a diffusion checkpoint as a folder that works without this package: weights, tokenizer, model card, decoding code.

    adapt export runs/mine/model out/mine --format hf
    adapt export runs/mine/converted out/mine --format hf --adapter runs/mine/adapter --dtype bfloat16
    adapt export runs/mine/model out/mine --format hf --report out/report/report.json --license apache-2.0

and then, wherever transformers is:

    model = AutoModelForCausalLM.from_pretrained("out/mine")
    model.generate(**inputs, custom_generate="out/mine", trust_remote_code=True, max_new_tokens=64)

OUT appears when all of it is there. What is in OUT/custom_generate/ is copied from this package, so it writes the same tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..arguments import CommandParser
from ..decoding.settings import SamplerConfig
from ..files.model_folder import check_named_folders
from ..files.user_text import check_user_file
from ..spec import DTYPE_NAMES
from .settings import FORMATS, ShardSize, check_settings


def main(argv: list[str]) -> None:
    """The `adapt export` command."""
    parser = CommandParser(prog="adapt export", description=__doc__)
    parser.option("checkpoint", type=str, metavar="CKPT", help="folder with a diffusion checkpoint")
    parser.option("out", type=str, metavar="OUT", help="new folder")
    parser.option("--format", type=str, default="hf", help=f"one of {', '.join(FORMATS)}")
    parser.option("--adapter", type=str | None, default=None, help="PEFT folder to merge in")
    parser.option("--dtype", type=str | None, default=None, help=f"{', '.join(DTYPE_NAMES)}; default: as in CKPT")
    parser.option(
        "--max_shard_size", type=ShardSize | None, default=None, help="of one safetensors file; default: as in CKPT"
    )
    parser.option("--report", type=str | None, default=None, help="report.json of `adapt compare`, for the card")
    parser.option("--license", type=str | None, default=None, help="as the Hub spells it; default: the base's")
    parser.settings_of(SamplerConfig, "sampler")
    arguments = parser.instantiate(parser.parse_args(argv))
    check_settings(Path(arguments.out), arguments.format, arguments.dtype, arguments.max_shard_size)
    check_named_folders(arguments.checkpoint, arguments.adapter)
    if arguments.report is not None:
        check_user_file(Path(arguments.report), "report", "the report.json of a comparison")
    # Here, because torch takes seconds, and what is refused above needs none.
    from huggingface_hub import ModelCard

    from .export import export

    out = export(**vars(arguments))
    print(f"{out}: loads with transformers alone; custom_generate/ decodes as this package does", file=sys.stderr)
    if ModelCard.load(out / "README.md").data.to_dict().get("license") is None:
        print(
            f"{out}/README.md: names no licence, the base's is not known here; add it with --license", file=sys.stderr
        )
