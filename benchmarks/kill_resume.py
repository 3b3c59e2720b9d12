"""Kills a training run at random moments, starts it again each time, and holds its loss curve against one never killed.

    python benchmarks/kill_resume.py --kills 20 --stages plain,0,1,2,3 --ranks 2

Every kill is a SIGKILL of all ranks. They are forked from a server that has torch and DeepSpeed imported already, so a restart
costs seconds. `plain` is one process without DeepSpeed. A kill fell into a save if it left a checkpoint without COMPLETE.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

# Before torch is imported, here and in what is started.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["adapt.training.train", "deepspeed", "kill_resume"])


class Killed(NamedTuple):
    kills: int
    in_save: int
    steps_lost: int
    identical: bool
    seconds: float


def start(argv: list[str], ranks: int, log: Path, patch: str = "") -> list[BaseProcess]:
    """One process a rank on `adapt train ARGV`; their output goes to the end of `log`. `patch` is Python run in each first."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [SERVER.Process(target=_rank, args=(argv, rank, ranks, port, str(log), patch)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def _rank(argv: list[str], rank: int, ranks: int, port: int, log: str, patch: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from adapt.cli import main

    multiprocessing.set_start_method("fork", force=True)  # as a run has it: loader processes in milliseconds
    gc.freeze()  # accelerate collects garbage after a run: 0.3 s in what the server imported
    exec(patch, {"rank": rank, "argv": argv})
    code = main(["train", *argv])
    sys.stderr.flush()
    os._exit(code)  # without the interpreter's farewell, in which a process group of ranks that are gone may hang


def kill(processes: list[BaseProcess]) -> None:
    """SIGKILL to all of them at once; one that has ended is left."""
    for process in processes:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def finish(processes: list[BaseProcess], log: Path, timeout: float = 600) -> list[int | None]:
    """The exit codes; whoever has not ended after `timeout` s is killed and has none."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    if None in codes:
        kill([process for process in processes if process.exitcode is None])
    return codes


def losses(out: Path) -> dict[int, float]:
    """Loss of each step that has a whole line in metrics.jsonl."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def kill_and_resume(argv: list[str], out: Path, want: Path, ranks: int, kills: int, seed: int) -> Killed:
    """Kills the run that many times, lets it end, and compares it with the run `want`, which was never killed.

    One kill in ten falls before the first step. The others fall after a random number of steps, so that together they take the
    run two thirds of the way however busy the machine is: four of them at a random moment of the next six steps' time, five at
    a random moment of the next save.
    """
    generator, log, began = random.Random(seed), out.with_suffix(".log"), time.monotonic()
    in_save = steps_lost = done = 0
    num_steps = max(losses(want))
    for _ in range(kills):
        written, processes = _written(out), start(argv, ranks, log)
        # 1. The moment.
        kind = generator.random()
        if kind < 0.1:
            _wait_while(processes, seconds=generator.uniform(0, 3))
        else:
            _wait_while(processes, until=lambda written=written: _written(out) != written)
            first, loop_began = max(losses(out), default=0), time.monotonic()
            last = min(first + generator.uniform(1, 4 / 3 * num_steps / kills), num_steps - 6)
            _wait_while(processes, until=functools.partial(_has_losses_from, out, last))
            steps_time = (time.monotonic() - loop_began) / max(max(losses(out), default=0) - first, 1)
            if kind < 0.5:
                ends = functools.partial(_has_losses_from, out, num_steps - 3)
                _wait_while(processes, seconds=generator.uniform(0, 6) * steps_time, until=ends)
            else:
                _wait_while(processes, until=lambda: len(_unfinished(out)) > 0)
                _wait_while(processes, seconds=generator.uniform(0, 0.05), until=lambda: not _unfinished(out))
        if not all(p.is_alive() for p in processes):
            finish(processes, log, 10)
            raise RuntimeError(f"a run ended by itself, before it was killed; see {log}")
        kill(processes)
        # 2. What the kill left.
        done += 1
        unfinished = _unfinished(out)
        saved = [path for path in out.glob("checkpoints/checkpoint-*") if path not in unfinished]
        in_save += len(unfinished) > 0
        steps_lost += max(losses(out), default=0) - max((int(path.name.split("-")[1]) for path in saved), default=0)
    codes = finish(start(argv, ranks, log), log)
    if any(codes):
        raise RuntimeError(f"the run did not end well after its kills: exit codes {codes}; see {log}")
    identical = losses(out) == losses(want) and _same_weights(out, want)
    return Killed(done, in_save, steps_lost, identical, time.monotonic() - began)


def _wait_while(processes: list[BaseProcess], seconds: float = math.inf, until=lambda: False) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(p.is_alive() for p in processes) and not until():
        time.sleep(0.002)


def _has_losses_from(out: Path, step: float) -> bool:
    return max(losses(out), default=0) >= step


def _unfinished(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoints/checkpoint-*") if not (path / "COMPLETE").exists()]


def _written(out: Path) -> int:
    """When metrics.jsonl was last written, in ns. The loop of a resumed run begins by cutting it to the checkpoint's step."""
    path = out / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def _same_weights(out: Path, want: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    found, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (out, want))
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def write_base(folder: Path, data: Path, rows: int = 256) -> None:
    """A random Llama of about 260k parameters as a Hugging Face folder, and pairs of random words as its data."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(500)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=4, eos_token_id=1, pad_token_id=1, **sizes)
    config.initializer_range = 0.1
    LlamaForCausalLM(config).save_pretrained(folder)
    generator = random.Random(0)
    pairs = [{key: " ".join(generator.choices(words, k=8)) for key in ("prompt", "completion")} for _ in range(rows)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def recipe_argv(folder: Path, out: Path, stage: str, ranks: int, num_steps: int) -> list[str]:
    """Arguments of `adapt train`: float32, a checkpoint every third step."""
    settings = {
        "model.base": folder / "base",
        "data.train": folder / "pairs.jsonl",
        "data.seq_len": 32,
        "training.output_dir": out,
        "training.num_steps": num_steps,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 4 // ranks,
        "training.learning_rate": 1e-3,
        "training.precision": "fp32",
        "training.save_steps": 3,
        **({} if stage == "plain" else {"training.deepspeed": f"zero{stage}"}),
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def main(argv: list[str] | None = None) -> None:
    from adapt.arguments import CommandParser

    parser = CommandParser(prog="kill_resume.py", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="per setting")
    parser.add_argument("--stages", type=str, default="plain,0,1,2,3", help="plain or a ZeRO stage, with commas")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a DeepSpeed setting")
    parser.add_argument("--num_steps", type=int, default=150, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=str, default=None, help="folder; default: a temporary one, removed at the end")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_base(folder / "base", folder / "pairs.jsonl")
        print("| setting | kills | in a save | steps lost per kill | curve and weights bit-identical | s per restart |")
        print("|---|---|---|---|---|---|", flush=True)
        for stage in args.stages.split(","):
            ranks = 1 if stage == "plain" else args.ranks
            want, out = folder / f"{stage}-whole", folder / f"{stage}-killed"
            log = folder / f"{stage}-whole.log"
            codes = finish(start(recipe_argv(folder, want, stage, ranks, args.num_steps), ranks, log), log)
            if any(codes):
                raise SystemExit(
                    f"the run without kills failed: exit codes {codes}; see {log}:\n{log.read_text()[-2000:]}"
                )
            argv = recipe_argv(folder, out, stage, ranks, args.num_steps)
            found = kill_and_resume(argv, out, want, ranks, args.kills, args.seed)
            name = "plain, 1 rank" if stage == "plain" else f"ZeRO {stage}, {ranks} ranks"
            print(
                f"| {name} | {found.kills} | {found.in_save} | {found.steps_lost / max(found.kills, 1):.1f} | "
                f"{'yes' if found.identical else 'NO'} | {found.seconds / (found.kills + 1):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
