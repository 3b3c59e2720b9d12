"""Holds `adapt plan` against the memory that real training steps take on a CPU, at three model sizes.

    python benchmarks/plan_check.py                              # all cases; writes results/plan-cpu.json
    python benchmarks/plan_check.py --only 30M,135M --out /tmp/check.json

Each case is a run of `adapt.training.train.train` in a process of its own, with conversion, data and DeepSpeed as ever; random weights,
because memory depends on shapes alone. Measured is the peak resident size of steps 2 to the last (the kernel's VmHWM, reset
when a step begins: loading and saving are not part of it), less a baseline: the same of a model of a few thousand parameters
under the same settings, which is Python, libraries, data and what they allocate once. Planned is `adapt plan --device cpu`.

glibc keeps what is freed in pieces of up to 32 MB, so that a process may hold a third more than its tensors. So the runs have
MALLOC_MMAP_THRESHOLD_ set, which hands it back at once; with `--default_allocator true` they have not, and no tolerance is held.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import shapes
from machine import machine
from shapes import Workload, write_documents, write_model
from train import RESULTS

from adapt.arguments import CommandParser
from adapt.files.provenance import git_revision

TOLERANCE = 0.15
STEPS = 3
HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's own default, no longer growing with what is freed
_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": True}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**shapes.SHAPES["tiny"]},
    "30M": {
        **_LLAMA,
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "135M": shapes.SHAPES["S"],
    "350M": {
        **_LLAMA,
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
BIDIRECTIONAL = {"model.attention": "bidirectional", "objective.weight": "uniform"}
BLOCK = {"model.attention": "block", "model.block_size": 32, "objective.weight": "uniform", "objective.ar_weight": 1.0}
LORA = {**BIDIRECTIONAL, "model.lora.r": 16}
# case -> (size, documents of a row each, settings); what is added to a size changes what fills the memory
CASES: dict[str, tuple[str, Workload, dict[str, Any]]] = {
    "30M bidirectional": ("30M", Workload(8, 512, 512), BIDIRECTIONAL),
    "30M block, ZeRO-2": ("30M", Workload(4, 512, 512), {**BLOCK, "training.deepspeed": "zero2"}),
    "135M bidirectional": ("135M", Workload(4, 512, 512), BIDIRECTIONAL),
    "135M block, checkpointing": ("135M", Workload(8, 512, 512), {**BLOCK, "model.gradient_checkpointing": True}),
    "135M block, ZeRO-3": ("135M", Workload(2, 512, 512), {**BLOCK, "training.deepspeed": "zero3"}),
    "135M LoRA": ("135M", Workload(4, 512, 512), LORA),
    "350M bidirectional": ("350M", Workload(2, 512, 512), BIDIRECTIONAL),
    "350M LoRA, fp32": ("350M", Workload(2, 512, 512), {**LORA, "training.precision": "fp32"}),
    "350M block, ZeRO-2, checkpointing": (
        "350M",
        Workload(2, 512, 512),
        {**BLOCK, "model.gradient_checkpointing": True, "training.deepspeed": "zero2"},
    ),
}


def argv_of(base: Path, documents: Path, out: Path, workload: Workload, settings: dict[str, Any]) -> list[str]:
    """The arguments of `adapt train` for one case."""
    copies = 2 if settings["model.attention"] == "block" else 1
    merged = {
        "model.base": base,
        "data.train": documents,
        "data.seq_len": copies * workload.longest,
        "training.output_dir": out,
        "training.num_steps": STEPS,
        "training.global_batch_size": workload.batch,
        "training.micro_batch_size": workload.batch,
        **settings,
    }
    argv = []
    for setting, value in merged.items():
        argv += [f"--{setting}", value if isinstance(value, str) else json.dumps(value, default=str).strip('"')]
    return argv


def measured(
    size: str, workload: Workload, settings: dict[str, Any], scratch: Path, allocator: dict[str, str]
) -> tuple[int, list[str]]:
    """(peak resident bytes of a step; the arguments that ran) of a real run in a process of its own."""
    base = scratch / size.replace(" ", "-")
    if not base.exists():
        write_model(base, SIZES[size])
    words = SIZES[size]["vocab_size"] - shapes.SPARE_ROWS
    documents = write_documents(scratch / "documents.jsonl", workload, 64, words)
    out = Path(tempfile.mkdtemp(dir=scratch))
    argv = argv_of(base, documents, out, workload, settings)
    env = os.environ | {"DS_ACCELERATOR": "cpu"} | allocator
    command = [sys.executable, __file__, "--run", json.dumps([str(out / "peak.json"), argv])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{size} {settings}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return max(json.loads((out / "peak.json").read_text())[1:]), argv


def run(path: str, argv: list[str]) -> None:
    """Trains, and writes the peak resident bytes of each step to `path`; then ends without saving a model."""
    import transformers.trainer
    from transformers import TrainerCallback

    from adapt.training.recipe import parse_recipe
    from adapt.training.train import train

    class Stop(Exception):
        """Enough steps."""

    class Peaks(TrainerCallback):
        """Resets the kernel's high-water mark when a step begins, and reads it at its end."""

        def __init__(self) -> None:
            self.peaks: list[int] = []

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            Path("/proc/self/clear_refs").write_text("5")

        def on_step_end(self, args, state, control, **kwargs) -> None:
            status = Path("/proc/self/status").read_text()
            self.peaks.append(int(status.split("VmHWM:")[1].split()[0]) * 1024)
            Path(path).write_text(json.dumps(self.peaks))
            if len(self.peaks) == STEPS - 1:
                raise Stop

    transformers.trainer.DEFAULT_CALLBACKS.append(Peaks)
    try:
        train(parse_recipe(argv))
    except Stop:
        os._exit(0)  # DeepSpeed would wait for the rest of the step


def planned(size: str, argv: list[str]) -> dict[str, float]:
    """Bytes by kind, from the architecture alone."""
    from transformers import AutoConfig

    from adapt.planning.planner import Planner
    from adapt.planning.table import COLUMNS
    from adapt.planning.zero import zero_of
    from adapt.training.recipe import parse_recipe

    recipe = parse_recipe(argv)
    config = AutoConfig.for_model(**SIZES[size])
    peak = Planner(recipe, config, gpus=1, device="cpu").peak(zero_of(recipe))
    return {name: float(getattr(peak, name)) for name in COLUMNS} | {"moment": peak.moment}


def check(names: list[str], allocator: dict[str, str]) -> list[dict[str, Any]]:
    """One result a case: measured, baseline, planned, and the error of the plan against measured less baseline."""
    results = []
    with tempfile.TemporaryDirectory(prefix="plan-check-") as folder:
        scratch, baselines = Path(folder), {}
        for name in names:
            size, workload, settings = CASES[name]
            key = json.dumps(settings)
            if key not in baselines:
                small = Workload(1, 64, 64)
                peak, argv = measured("tiny", small, settings, scratch, allocator)
                baselines[key] = peak - planned("tiny", argv)["total"]
            peak, argv = measured(size, workload, settings, scratch, allocator)
            plan = planned(size, argv)
            taken = peak - baselines[key]
            results.append(
                {
                    "case": name,
                    "measured_peak_bytes": peak,
                    "baseline_bytes": baselines[key],
                    "taken_bytes": taken,
                    "planned": plan,
                    "error": plan["total"] / taken - 1,
                    "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "revision": git_revision(),
                    "settings": settings,
                    "rows": workload.batch,
                    "seq_len": argv[argv.index("--data.seq_len") + 1],
                }
            )
            print(line(results[-1]), flush=True)
    return results


def planned_again(result: dict[str, Any]) -> dict[str, Any]:
    """An earlier measurement beside what the plan says now."""
    size, workload, settings = CASES[result["case"]]
    plan = planned(size, argv_of(Path("base"), Path("x.jsonl"), Path("out"), workload, settings))
    result = {**result, "planned": plan, "error": plan["total"] / result["taken_bytes"] - 1}
    print(line(result), flush=True)
    return result


def line(result: dict[str, Any]) -> str:
    """One case for a reader."""
    plan = result["planned"]
    parts = ", ".join(
        f"{name} {plan[name] / 1e9:.2f}" for name in plan if name not in ("moment", "total") and plan[name]
    )
    return (
        f"{result['case']:<36} measured {result['taken_bytes'] / 1e9:.2f} GB (and {result['baseline_bytes'] / 1e9:.2f} before), "
        f"planned {plan['total'] / 1e9:.2f} GB ({parts}; {plan['moment']}): {result['error']:+.1%}"
    )


def main(argv: list[str]) -> int:
    """0 if every case is within TOLERANCE, else 1."""
    if argv[:1] == ["--run"]:
        run(*json.loads(argv[1]))
        return 0
    parser = CommandParser(prog="benchmarks/plan_check.py", description=__doc__)
    parser.add_argument("--only", type=str, default="", help=f"comma-separated beginnings of cases: {'; '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan-cpu.json", help="JSON")
    parser.add_argument("--measure", type=bool, default=True, help="false: plan again beside the measurements in --out")
    parser.add_argument("--default_allocator", type=bool, default=False, help="leave glibc as it is")
    given = parser.parse_args(argv)
    allocator = {} if given.default_allocator else HANDS_BACK
    beginnings = tuple(given.only.split(",")) if given.only else ("",)
    names = [name for name in CASES if name.startswith(beginnings)] if given.measure else []
    kept = json.loads(given.out.read_text())["results"] if given.out.exists() else []
    results = [planned_again(result) for result in kept if result["case"] not in names] + check(names, allocator)
    report = {
        "provenance": machine("plan_check.py"),
        "environment": allocator,
        "tolerance": TOLERANCE,
        "results": results,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    worst = max(results, key=lambda result: abs(result["error"]))
    print(f"{len(results)} cases, worst {worst['error']:+.1%} ({worst['case']}), allowed {TOLERANCE:.0%}: {given.out}")
    return int(abs(worst["error"]) > TOLERANCE and bool(allocator))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
