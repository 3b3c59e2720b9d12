"""Writes with a diffusion checkpoint, by refining blanks.

    adapt generate out/model --prompt "Once upon a time" --max_new_tokens 64 --show
    adapt generate out/model --prompts prompts.txt --sampler.threshold 0.8 > written.jsonl
    adapt generate out/model --infill "The [?] sat on the [?3]."          # [?3] is three tokens

`--show` redraws the canvas in the terminal after each round. Text goes to standard output, figures to standard error.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import progress
from .arguments import CommandParser
from .decoding.rounds import GenerateOutput
from .decoding.settings import SamplerConfig
from .decoding.show import CanvasView
from .lm import DiffusionLM, load
from .tokens import left_padded, text_ids

BLANK = re.compile(r" *\[\?(\d*)\]")  # a blank takes the place of " word": the space before it is part of its token

_BLANK_MARK = "\ue000[?]\ue001"  # in private characters, so that a text may quote the mask token


def write(
    lm: DiffusionLM, prompts: list[str], max_new_tokens: int, sampler: SamplerConfig, seed: int, show: bool
) -> tuple[list[str], GenerateOutput]:
    """The continuations of the prompts, without special tokens, and the sampler's output."""
    tokenizer: Any = lm.tokenizer
    input_ids, attention_mask = left_padded(tokenizer, [text_ids(tokenizer, prompt) for prompt in prompts])
    num_prompt = input_ids.shape[1]
    output = lm.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        generator=torch.Generator(lm.device).manual_seed(seed),
        streamer=CanvasView(lm.tokenizer, lm.spec.mask_token_id, num_prompt) if show else None,
    )
    return lm.tokenizer.batch_decode(output.sequences[:, num_prompt:], skip_special_tokens=True), output


def fill(lm: DiffusionLM, text: str, sampler: SamplerConfig, seed: int, show: bool) -> tuple[str, GenerateOutput]:
    """The text with its blanks ([?] one token, [?n] n tokens) written."""
    if not BLANK.search(text):
        raise ValueError(f"infill={text!r}: has no blank; write [?] for one token, [?4] for four")
    if _BLANK_MARK in text:
        raise ValueError(f"infill={text!r}: holds {_BLANK_MARK!r}, which stands for a blank here; write [?]")
    masked = BLANK.sub(lambda blank: _BLANK_MARK * int(blank.group(1) or 1), text)
    ids = text_ids(lm.tokenizer, masked, blank=_BLANK_MARK)
    if lm.spec.shift_logits and ids[0] == lm.spec.mask_token_id:
        ids = [lm.start_token_id, *ids]
    output = lm.infill(
        torch.tensor([ids]),
        sampler=sampler,
        generator=torch.Generator(lm.device).manual_seed(seed),
        streamer=CanvasView(lm.tokenizer, lm.spec.mask_token_id, 0) if show else None,
    )
    return str(lm.tokenizer.decode(output.sequences[0], skip_special_tokens=True)), output


def main(argv: list[str]) -> None:
    """The `adapt generate` command."""
    parser = CommandParser(prog="adapt generate", description=__doc__)
    parser.add_argument("checkpoint", type=str, metavar="CKPT", help="folder with a diffusion checkpoint")
    parser.add_argument("--prompt", type=str | None, default=None, help="text to continue")
    parser.add_argument(
        "--prompts", type=str | None, default=None, help="file with one prompt a line; writes JSON lines"
    )
    parser.add_argument("--infill", type=str | None, default=None, help="text with blanks: [?] one token, [?4] four")
    parser.add_argument("--chat", type=bool, default=False, help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--adapter", type=str | None, default=None, help="PEFT folder to merge in")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of the canvas, tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts refined together")
    parser.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help="bfloat16, float16 or float32; default: as saved, or float32 where that is emulated",
    )
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ...; default: cuda if there is one")
    parser.add_argument(
        "--trust_remote_code", type=bool, default=False, help="run Python files that come with the model"
    )
    parser.add_argument("--seed", type=int, default=0, help="for temperature above 0")
    parser.add_argument("--show", action="store_true", help="redraw the canvas after each round")
    parser.add_class_arguments(SamplerConfig, "sampler")
    arguments = parser.parse_args(argv)
    sampler = parser.instantiate(arguments).sampler
    given = [name for name in ("prompt", "prompts", "infill") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError(
            "give exactly one of --prompt, --prompts and --infill" + (f", not {' and '.join(given)}" if given else "")
        )
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size={arguments.batch_size}: must be at least 1")
    if arguments.prompt == "":
        raise ValueError("prompt='': is empty; write at least one word to continue")
    prompts = [arguments.prompt] if arguments.prompts is None else _prompts(arguments.prompts)
    how = {name: getattr(arguments, name) for name in ("adapter", "dtype", "device", "trust_remote_code")}
    lm = load(arguments.checkpoint, **how)
    started = time.perf_counter()
    if arguments.infill is not None:
        with progress.handed_over() if arguments.show else progress.doing("writing"):
            text, output = fill(lm, arguments.infill, sampler, arguments.seed, arguments.show)
        print(text)
        return _figures([output], time.perf_counter() - started)
    if arguments.chat:
        render: Any = lm.tokenizer.apply_chat_template
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [render(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    outputs = []
    with progress.handed_over() if arguments.show else progress.doing("writing", total=len(prompts)) as task:
        for start in range(0, len(prompts), arguments.batch_size):
            chunk = prompts[start : start + arguments.batch_size]
            texts, output = write(lm, chunk, arguments.max_new_tokens, sampler, arguments.seed + start, arguments.show)
            outputs.append(output)
            for prompt, text in zip(chunk, texts, strict=True):
                line = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if arguments.prompts else text
                progress.say(line, file=sys.stdout)
            if task is not None:
                task.update(len(chunk))
    return _figures(outputs, time.perf_counter() - started)


def _prompts(file: str) -> list[str]:
    if not Path(file).is_file():
        raise ValueError(f"prompts={file}: no such file; give a text file with one prompt a line")
    prompts = [line for line in Path(file).read_text().splitlines() if line.strip()]
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
