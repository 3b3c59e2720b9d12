"""Compare an adapted model with its original: quality by lm-eval, speed measured side by side, one report.

examples:
  adapt compare --base HuggingFaceTB/SmolLM2-135M-Instruct --adapted out/adapted --tasks gsm8k --out out/report
  adapt compare --base base --adapted out/adapted --control out/control --tasks my_task --include_path tasks \\
      --limit 200 --base_num_fewshot 5 --sampler.threshold 0.8 --sweep 0.5,0.7,0.9 --out out/report
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from adapt.arguments import CommandParser
from adapt.decoding.settings import SamplerConfig
from adapt.files.outputs import claimed
from adapt.settings.bounds import Device, MayBeEmpty, one_of
from adapt.spec import DTYPE_NAMES

from .checks import SETTINGS, check_folder, check_settings
from .measure.corpus import texts_of
from .report.page import refuse_existing


def _split(text: str, setting: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{setting}={text}: give numbers with commas between them, such as 1,8") from None


def main(argv: list[str]) -> int:
    """The `adapt compare` command: progress to stderr, then the table and the report's path."""
    parser = CommandParser(prog="adapt compare", description=__doc__)
    add = parser.option
    add("--base", type=str, required=True, help="the original: Hub id or folder of a causal LM")
    add("--adapted", type=str, required=True, help="the diffusion checkpoint")
    add(
        "--control", type=str | None, default=None, help="the original trained further left to right on the same tokens"
    )
    add("--tasks", type=str, required=True, help="lm-eval tasks, with commas between them")
    add("--out", type=str, required=True, help="new folder for the report")
    add("--include_path", type=str | None, default=None, help="folder with own lm-eval task YAMLs")
    add("--limit", type=SETTINGS["limit"], default=None, help="first items of each task only")
    add("--num_fewshot", type=SETTINGS["num_fewshot"], default=None, help="examples in the prompt, for all arms")
    add(
        "--base_num_fewshot",
        type=SETTINGS["base_num_fewshot"],
        default=None,
        help="examples in the original's prompt alone",
    )
    add(
        "--apply_chat_template",
        type=SETTINGS["apply_chat_template"],
        default=False,
        help="prompts as chats, by each tokenizer's template",
    )
    add("--batch_size", type=SETTINGS["batch_size"], default=8, help="rows per batch when scoring quality")
    parser.settings_of(SamplerConfig, "sampler")
    add("--sweep", type=MayBeEmpty, default="", help="more confidence thresholds for the quality-speed curve: 0.5,0.7")
    add("--mc_samples", type=SETTINGS["mc_samples"], default=32, help="Monte-Carlo samples per likelihood")
    add("--corpus", type=str | None, default=None, help="held-out text (.txt, .jsonl, .gz) for the likelihood section")
    add("--corpus_tokens", type=SETTINGS["corpus_tokens"], default=4096, help="tokens of it")
    add("--speed_prompts", type=SETTINGS["speed_prompts"], default=16, help="prompts that speed is measured on")
    add("--speed_batch_sizes", type=str, default="1,8", help="with commas between them")
    add("--speed_repeats", type=SETTINGS["speed_repeats"], default=3, help="rounds; 0 = do not measure speed")
    add("--dtype", type=str | None, default=None, help="of all arms: bfloat16, float16, float32 (default by device)")
    add("--device", type=Device | None, default=None, help="cpu, cuda or cuda:N (default: CUDA if there is one)")
    add("--attn_implementation", type=str, default="sdpa", help="attention kernel of all arms")
    add("--seed", type=SETTINGS["seed"], default=1234, help="of examples, sampling, Monte Carlo and bootstrap")
    parser.add_argument("--overwrite", action="store_true", help="replace the report in --out")
    options = vars(parser.instantiate(parser.parse_args(argv)))
    options["tasks"] = [t.strip() for t in options["tasks"].split(",") if t.strip()]
    options["sweep"] = _split(options["sweep"], "sweep", float)
    options["speed_batch_sizes"] = _split(options["speed_batch_sizes"], "speed_batch_sizes", int)
    _check(options)
    from .compare import announce, compare  # here, because torch takes seconds, and what is refused above needs none

    with claimed(Path(options["out"])):
        report = compare(**options, command=shlex.join(["adapt", "compare", *argv]))
    announce(report, options["out"])
    return 0


def _check(options: dict[str, Any]) -> None:
    """ValueError for what can be refused without torch and lm-eval."""
    check_settings({name: value for name, value in options.items() if name in SETTINGS})
    if not options["tasks"]:
        raise ValueError("tasks=: names none; give lm-eval's tasks with commas between them, such as gsm8k")
    if options["dtype"] is not None:
        one_of("dtype", options["dtype"], DTYPE_NAMES)
    refuse_existing(options["out"], options["overwrite"])
    for arm in ("base", "control", "adapted"):
        if options[arm] is not None:
            check_folder(arm, options[arm])
    if options["corpus"] is not None:
        next(texts_of(options["corpus"]), None)  # refuses what cannot be read now, not after an hour
    if options["include_path"] is not None and not Path(options["include_path"]).is_dir():
        raise ValueError(
            f"include_path={options['include_path']}: no such folder; give the folder of your tasks' YAMLs"
        )
