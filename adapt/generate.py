"""Writes with a diffusion checkpoint, by refining blanks.

    adapt generate out/model --prompt "Once upon a time" --max_new_tokens 64 --show
    adapt generate out/model --prompts prompts.txt --sampler.threshold 0.8 > written.jsonl
    adapt generate out/model --infill "The [?] sat on the [?3]."          # [?3] is three tokens

`--show` redraws the canvas in the terminal after each round. Text goes to standard output, figures to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import progress
from .arguments import CommandParser
from .decoding.settings import SamplerConfig
from .files.model_folder import check_named_folders, is_untrained
from .files.user_text import user_text
from .settings.bounds import Device, Rows, Seed, Tokens, one_of
from .spec import DTYPE_NAMES

if TYPE_CHECKING:
    from .decoding.rounds import GenerateOutput
    from .tokens import Chat


def main(argv: list[str]) -> None:
    """The `adapt generate` command."""
    arguments, sampler, prompts = _read(argv)
    from .lm import load  # here, because torch takes seconds, and what is refused above needs none

    loading = {name: arguments[name] for name in ("adapter", "dtype", "device", "trust_remote_code")}
    lm = load(arguments.checkpoint, **loading)
    if is_untrained(arguments.checkpoint) and arguments.adapter is None:
        progress.say(
            f"note: {arguments.checkpoint} is converted and not trained yet: it writes filler; `adapt train` comes first"
        )
    started = time.perf_counter()
    how = {"sampler": sampler, "seed": arguments.seed, "show": arguments.show}
    if arguments.infill is not None:
        with progress.handed_over() if arguments.show else progress.doing("writing"):
            texts, output = lm.fill_one(arguments.infill, **how)
        print(texts[0])
        return _figures([output], time.perf_counter() - started)
    asked: list[str | Chat] = [[{"role": "user", "content": p}] if arguments.chat else p for p in prompts]
    how |= {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.batch_size}
    outputs, unwritten = [], iter(prompts)
    with progress.handed_over() if arguments.show else progress.doing("writing", total=len(prompts)) as task:
        for texts, output in lm.write_batches(asked, **how):
            outputs.append(output)
            for text in texts:
                row = {"prompt": next(unwritten), "text": text}
                line = json.dumps(row, ensure_ascii=False) if arguments.prompts else text
                progress.say(line, file=sys.stdout)
            if task is not None:
                task.update(len(texts))
    return _figures(outputs, time.perf_counter() - started)


def _read(argv: list[str]) -> tuple[Any, SamplerConfig, list[str]]:
    """(arguments, sampler, prompts) of a command line; all that can be refused without a model is refused."""
    parser = CommandParser(prog="adapt generate", description=__doc__)
    parser.option("checkpoint", type=str, metavar="CKPT", help="folder with a diffusion checkpoint")
    parser.option("--prompt", type=str | None, default=None, help="text to continue")
    parser.option("--prompts", type=str | None, default=None, help="file with one prompt a line; writes JSON lines")
    parser.option("--infill", type=str | None, default=None, help="text with blanks: [?] one token, [?4] four")
    parser.option("--chat", type=bool, default=False, help="put the prompt into the tokenizer's chat template")
    parser.option("--adapter", type=str | None, default=None, help="PEFT folder to merge in")
    parser.option("--max_new_tokens", type=Tokens, default=64, help="length of the canvas, tokens")
    parser.option("--batch_size", type=Rows, default=8, help="prompts refined together")
    parser.option(
        "--dtype",
        type=str | None,
        default=None,
        help="bfloat16, float16 or float32; default: as saved, or float32 where that is emulated",
    )
    parser.option("--device", type=Device | None, default=None, help="cpu, cuda, ...; default: cuda if there is one")
    parser.option("--trust_remote_code", type=bool, default=False, help="run Python files that come with the model")
    parser.option("--seed", type=Seed, default=0, help="for temperature above 0")
    parser.add_argument("--show", action="store_true", help="redraw the canvas after each round")
    parser.settings_of(SamplerConfig, "sampler")
    arguments = parser.parse_args(argv)
    sampler = parser.instantiate(arguments).sampler
    given = [name for name in ("prompt", "prompts", "infill") if arguments[name] is not None]
    if len(given) != 1:
        raise ValueError(
            "give exactly one of --prompt, --prompts and --infill" + (f", not {' and '.join(given)}" if given else "")
        )
    if arguments.dtype is not None:
        one_of("dtype", arguments.dtype, ("auto", *DTYPE_NAMES))
    prompts = [arguments.prompt or ""] if arguments.prompts is None else _prompts(arguments.prompts)
    check_named_folders(arguments.checkpoint, arguments.adapter)
    return arguments, sampler, prompts


def _prompts(file: str) -> list[str]:
    text = user_text(Path(file), "prompts", "a text file with one prompt a line")
    # By \n alone: splitlines() also cuts at U+2028 and form feeds, which are of a prompt's own.
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={file}: holds no prompt; write one a line")
    return prompts


def _figures(outputs: list[GenerateOutput], seconds: float) -> None:
    tokens = sum(int(output.num_tokens.sum()) for output in outputs)
    nfe = sum(output.nfe for output in outputs)
    tpf = sum(output.tpf for output in outputs) / len(outputs)
    print(
        f"{tokens} tokens, {nfe} forwards, {tpf:.2f} tokens per forward, {tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )
