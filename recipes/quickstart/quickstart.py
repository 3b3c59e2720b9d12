"""The whole path once, for real, on a laptop CPU: a causal LM becomes a diffusion LM and is compared with the original.

    adapt quickstart                     # SmolLM2-135M-Instruct, about 20 minutes on 2 cores; a GPU is used if there is one
    adapt quickstart --fast              # the same on a tiny random model, under 2 minutes: proves the path, not the method

The task is structured extraction: a sentence or two in, a JSON object out. Three arms stand in the report: the original with
examples in its prompt; the original fine-tuned autoregressively on the training data (control); and the adapted model, which
is the control converted to a diffusion LM and trained on the same data. Recipes: control.yaml and adapted.yaml.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from adapt import progress
from adapt.arguments import CommandParser
from adapt.conversion.convert import convert
from adapt.conversion.gguf import gguf_to_folder
from adapt.decoding.settings import SamplerConfig

from .extraction import TASK, write_dataset
from .smollm2 import fetch_smollm2


@dataclass(frozen=True)
class Scale:
    """How large the quickstart is."""

    num_train: int
    num_test: int
    base_shots: int
    """examples in the original's prompt"""
    speed_prompts: int
    speed_repeats: int
    overrides: tuple[str, ...] = ()
    """of both recipes"""


SAMPLER = SamplerConfig(threshold=0.95, order="left_to_right", canvas_length=8)
FULL = Scale(num_train=2600, num_test=200, base_shots=4, speed_prompts=8, speed_repeats=3)
FAST = Scale(
    num_train=200,
    num_test=16,
    base_shots=1,
    speed_prompts=4,
    speed_repeats=1,
    overrides=("--training.num_epochs", "1", "--training.num_steps", "null", "--model.torch_compile", "false"),
)


def quickstart(out: Path, *, fast: bool = False, seed: int = 1) -> dict:
    """Runs all steps into the folder `out`, which a later run continues or reuses, and returns the report."""
    scale = FAST if fast else FULL
    started = time.perf_counter()

    def step(number: int, what: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - started), 60)
        progress.say(f"\n== {number}/6 {what}   [{minutes}:{seconds:02d}]")

    out.mkdir(parents=True, exist_ok=True)
    _refuse_other_run(out, {"fast": fast, "seed": seed})
    step(1, "the base model")
    base = out / "base"
    if not base.exists():
        _tiny_base(base, out) if fast else gguf_to_folder(fetch_smollm2(), base)
    step(2, f"the data: {scale.num_train} training and {scale.num_test} test examples of sentence -> JSON")
    data = write_dataset(out / "data", train=scale.num_train, test=scale.num_test, seed=seed)
    step(3, "train the control arm: the original, fine-tuned autoregressively")
    control = _train("control", base, out, scale, seed)
    step(4, "convert the control: prefix attention, a mask token")
    init = out / "adapted-init"
    if not init.exists():
        convert(control, init, attention="prefix", shift_logits=True)
    step(5, "train the adapted arm: masked diffusion on the same data")
    adapted = _train("adapted", init, out, scale, seed)
    step(6, "compare: original, control and adapted, quality and speed")
    # adapt_eval sits beside adapt, and brings lm-eval with it: only this step needs it.
    comparison = importlib.import_module("adapt_eval.compare")
    report = comparison.compare(
        base,
        adapted,
        control=control,
        tasks=[TASK],
        include_path=data,
        out=out / "report",
        base_num_fewshot=scale.base_shots,
        num_fewshot=0,
        sampler=SAMPLER,
        speed_prompts=scale.speed_prompts,
        speed_repeats=scale.speed_repeats,
        seed=seed,
        overwrite=True,
        command="adapt quickstart" + (" --fast" if fast else ""),
    )
    comparison.announce(report, out / "report")
    minutes, seconds = divmod(int(time.perf_counter() - started), 60)
    print(f"everything is in {out}; it took {minutes} min {seconds} s")
    return report


def _refuse_other_run(out: Path, settings: dict) -> None:
    """What `out` holds is reused, so it must come from a run with the same settings."""
    marker = out / "quickstart.json"
    if not marker.exists():
        marker.write_text(json.dumps(settings) + "\n")
    elif (found := json.loads(marker.read_text())) != settings:
        raise ValueError(
            f"out={out}: holds a quickstart with {found}, not {settings}; add --fresh, or choose another --out"
        )


def _tiny_base(base: Path, out: Path) -> None:
    """A random Llama of 0.2 M parameters with a tokenizer trained on the task's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = (write_dataset(out / "data", train=500, test=1, seed=0) / "train.jsonl").read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.token_to_id(special[0]),
            pad_token_id=tokenizer.token_to_id(special[0]),
            bos_token_id=None,
        )
    )
    staged = base.with_name(f".{base.name}.incomplete")
    model.save_pretrained(staged)
    wrapped.save_pretrained(staged)
    staged.rename(base)


def _train(arm: str, init: Path, out: Path, scale: Scale, seed: int) -> Path:
    """Launches recipes/train.py with deepspeed, as a user would; returns the trained model's folder."""
    final = out / arm / "model"
    if final.exists():
        print(f"{final} is there already: reused", file=sys.stderr)
        return final
    folder = Path(__file__).resolve().parent
    num_gpus = torch.cuda.device_count()
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    if num_gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # one rank has all cores
    quiet = [] if progress.debug else ["--log_level", "critical"]  # of the launcher; what its ranks say stays
    command = [
        *(
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            *quiet,
            "--num_gpus",
            "1",
            str(folder.parent / "train.py"),
        ),
        *("--config", str(folder / f"{arm}.yaml")),
        *("--model.base", str(init)),
        *("--data.train", str(out / "data" / "train.jsonl")),
        *("--training.output_dir", str(out / arm)),
        *("--training.seed", str(seed)),
        *scale.overrides,
        *(["--debug"] if progress.debug else []),
    ]
    progress.say(f"$ deepspeed {shlex.join(command[3:])}")
    with progress.starting_process("waiting for deepspeed") as inherited:
        failed = subprocess.run(command, env=inherited | environment).returncode != 0
    if failed:
        raise ValueError(f"quickstart: training the {arm} arm failed; its reason stands above")
    return final


def main(argv: list[str]) -> None:
    """The `adapt quickstart` command."""
    parser = CommandParser(prog="adapt quickstart", description=__doc__)
    parser.add_argument("--out", type=str | None, default=None, help="folder for everything; default quickstart[-fast]")
    parser.add_argument("--fast", action="store_true", help="a tiny random model instead of SmolLM2")
    parser.add_argument("--seed", type=int, default=1, help="keys data, noise and sampling")
    parser.add_argument("--fresh", action="store_true", help="start again instead of reusing what an earlier run left")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out or ("quickstart-fast" if arguments.fast else "quickstart"))
    if arguments.fresh and out.exists():
        if not (out / "data").is_dir():
            raise ValueError(f"out={out}: is not a quickstart's folder, so --fresh does not remove it")
        shutil.rmtree(out)
    quickstart(out, fast=arguments.fast, seed=arguments.seed)
