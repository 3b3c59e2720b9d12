"""The parts of `gpu.py`, most valuable first, and the process that each of them runs in.

A part is a function that yields what it has found so far. What it has yielded is in its result file when it fails, or is ended.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import figures
import gpu_checks
import train
from gpu_checks import ROOT, Found, NotPossible, Setting
from shapes import SHAPES, Workload, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt.files.staging import write_whole
from adapt.model.precision import compute_dtype_of
from adapt_eval.measure import speed, writers


class Part(NamedTuple):
    seconds: float
    """its share of the time, and what it gets of 10 minutes"""
    shows: str
    run: Callable[[Setting], Iterator[Found]]


def suites(setting: Setting) -> Iterator[Found]:
    """The tests marked gpu."""
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    assert marked, "pytest would run everything"
    junit = setting.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--junitxml={junit}", *marked], cwd=ROOT, capture_output=True, text=True)
    if not junit.exists():
        raise ValueError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
    rows = [_row_of_test(case) for case in ElementTree.parse(junit).iter("testcase")]
    yield {"rows": rows, "output": done.stdout[-20_000:]}
    if rows and all(row["outcome"] == "skipped" for row in rows):
        raise NotPossible(rows[0]["reason"])
    failed = [row["test"] for row in rows if row["outcome"] == "failed"]
    if failed or not rows:
        raise ValueError(f"{len(failed)} of {len(rows)} tests failed: {', '.join(failed)}")


def _row_of_test(case: ElementTree.Element) -> dict[str, str]:
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    what = next((child for child in case if child.tag in kinds), None)
    reason = "" if what is None else (what.get("message") or "").strip().splitlines()[:1]
    return {
        "test": case.get("name", ""),
        "outcome": "passed" if what is None else kinds[what.tag],
        "seconds": case.get("time", ""),
        "reason": " ".join(reason)[:200],
    }


def training(setting: Setting, shape: str, arms: list[str], rounds: int = 10) -> Iterator[Found]:
    """Tokens/s, MFU and peak memory of our arms beside transformers' AR training."""
    workload, shape = (Workload(2, 32, 32), "tiny") if setting.tiny else (Workload(8, 1024, 1024), shape)
    rounds, warmup = (2, 1) if setting.tiny else (rounds, 3)
    measured = train.measure(SHAPES[shape], workload, arms, rounds=rounds, warmup=warmup, overrides={})
    summary = train.summarise(measured, workload, setting.peak_tflops)
    errors = {name: arm["error"] for name, arm in measured["arms"].items() if "error" in arm}
    yield {
        "table": figures.table(summary),
        "shape": shape,
        "workload": asdict(workload),
        **measured,
        "summary": summary,
    }
    if errors:
        raise ValueError("; ".join(f"{name}: {error}" for name, error in errors.items()))


def training_compiled(setting: Setting) -> Iterator[Found]:
    """What torch.compile does to losses and to tokens/s."""
    yield from gpu_checks.compiled(setting)
    yield from training(setting, "S", ["bidirectional", "bidirectional_compiled"])


def decoding(setting: Setting) -> Iterator[Found]:
    """Tokens/s of cached decoding beside transformers' generate; random weights, so tokens per forward are a setting."""
    shape, num_new, per_forward = ("tiny", 8, (4,)) if setting.tiny else ("S", 64, (1, 4))
    base, dtype = setting.scratch / "base", compute_dtype_of(setting.device)
    words = write_model(base, SHAPES[shape])["words"]
    draw = random.Random(0)
    prompts = [draw.choices(range(1, words), k=64) for _ in range(8)]
    how: dict[str, Any] = {"until": (), "eos_ids": (), "max_new_tokens": num_new}
    ar: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    arms = [writers.ar_arm("AR", ar.to(setting.device).eval(), tokenizer, prompts, **how)]
    for name, options in (("prefix", {}), ("block 32", {"block_size": 32})):
        folder = adapt.convert(base, setting.scratch / name, attention=name.split()[0], **options)
        lm = adapt.load(folder, dtype=dtype, device=setting.device)
        for count in per_forward:
            sampler = adapt.SamplerConfig(tokens_per_step=count)
            arms.append(writers.diffusion_arm(name, lm, prompts, sampler=sampler, **how))
    rows = speed.measure(
        arms, tokenizer=tokenizer, batch_sizes=(1, 8), repeats=1 if setting.tiny else 2, progress=False
    )
    of_ar = {row["batch_size"]: row["tokens_per_s"] for row in rows if row["arm"] == "AR"}
    shown = ("arm", "sampler", "batch_size", "tokens_per_s", "nfe", "tpf", "ttft_s", "peak_memory_bytes")
    table = [{k: row[k] for k in shown} | {"beside AR": row["tokens_per_s"] / of_ar[row["batch_size"]]} for row in rows]
    yield {"rows": table, "shape": shape, "dtype": str(dtype), "measured": rows}


PARTS: dict[str, Part] = {
    "suites": Part(110, "the tests marked gpu", suites),
    "kernels": Part(90, "loss and gradients of each attention kernel beside eager", gpu_checks.kernels),
    "zero": Part(80, "losses under DeepSpeed ZeRO 0 to 3 beside a run without it", gpu_checks.zero),
    "training 135M": Part(
        80,
        "training beside transformers' AR training, SmolLM2-135M's shape, 8 x 1024 tokens",
        lambda setting: training(setting, "S", ["ar", "bidirectional", "block32"]),
    ),
    "decoding 135M": Part(60, "cached decoding beside transformers' generate, SmolLM2-135M's shape", decoding),
    "compile": Part(60, "losses and speed with torch.compile and without", training_compiled),
    "bf16": Part(40, "the loss curve of a small run in bf16 beside fp32", gpu_checks.bf16),
    "training 0.6B": Part(
        80,
        "training beside transformers' AR training, Qwen3-0.6B's shape, 8 x 1024 tokens",
        lambda setting: training(setting, "Q600M", ["ar", "bidirectional", "block32"], rounds=6),
    ),
}


def run_part(run: Callable[[Setting], Iterator[Found]], setting: Setting, result: Path) -> dict[str, Any]:
    """Status, reason, traceback and figures of a part; in the file `result` after each thing that it yields."""
    found: Found = {}
    outcome: dict[str, Any] = {"status": "unfinished", "reason": "", "figures": found}
    try:
        for more in run(setting):
            found |= more
            write_json(result, outcome)
        outcome["status"] = "ok"
    except NotPossible as error:
        outcome |= {"status": "not possible here", "reason": str(error)}
    except (Exception, SystemExit) as error:  # SystemExit: a recipe's parser has printed why
        line = " ".join(str(error).split())[:300]
        outcome |= {
            "status": "failed",
            "reason": f"{type(error).__name__}: {line}",
            "traceback": traceback.format_exc(),
        }
    write_json(result, outcome)
    return outcome


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, so that a kill leaves what stood there before."""
    write_whole(path, json.dumps(content, indent=1, default=str) + "\n")


def main(argv: list[str]) -> None:
    """One part in this process: its name, and the setting as JSON; its result is scratch/result.json."""
    name, given = argv[0], json.loads(argv[1])
    setting = Setting(**{**given, "scratch": Path(given["scratch"])})
    run_part(PARTS[name].run, setting, setting.scratch / "result.json")


if __name__ == "__main__":
    main(sys.argv[1:])
