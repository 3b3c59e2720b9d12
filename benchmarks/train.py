"""Training speed and memory of our arms beside plain transformers.Trainer AR fine-tuning: same model, documents and machine.

    python benchmarks/train.py --shape Q --workload 4x512,8x64-512 --arms ar,ar_grouped,bidirectional,block32 --rounds 5
    python benchmarks/train.py --model path/to/folder --workload 8x256/prompt --arms ar,prefix --out prefix.json
    python benchmarks/train.py --sweep length          # or vocabulary: JSON and plot into benchmarks/results/
    python benchmarks/train.py --shape Q --profile bidirectional

Each arm is a process that stays alive and does one optimizer step when told. A round is one step of each arm, in rotating
order; ratios are taken inside a round. Clean tokens are those of documents, counted once: a noisy copy is none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import figures
import worker
import yaml
from arms import ARMS, OURS, PLAIN
from machine import machine
from shapes import SHAPES, Workload, write_documents, write_model

from adapt.arguments import CommandParser

RESULTS = Path(__file__).parent / "results"
LENGTHS = (256, 512, 1024, 2048, 4096)
VOCABULARIES = (8192, 32_768, 65_536, 131_072, 262_144)
SWEEP_TOKENS = {"length": 4096, "vocabulary": 1024}  # of a step; AR's logits at 262,144 x 1,024 are 1 GB in float32


def measure(
    shape: dict[str, Any] | Path,
    workload: Workload,
    arm_names: list[str],
    *,
    rounds: int,
    warmup: int,
    overrides: dict[str, Any],
    threads: int | None = None,
    num_documents: int = 512,
    word: str = "step",
) -> dict[str, Any]:
    """{"sizes", "arms": {arm: {"settings", "steps": [raw figures of each round], "peak_memory_bytes"} or {..., "error": line}}}."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        base = Path(scratch) / "base"
        sizes = write_model(base, shape)
        documents = write_documents(Path(scratch) / "documents.jsonl", workload, num_documents, sizes["words"])
        jobs = {
            name: worker.Job(
                name,
                {**OURS[name], **overrides} if name in OURS else PLAIN[name],
                base,
                documents,
                workload,
                Path(scratch) / name,
                warmup + rounds + 1,  # the loader reads one batch ahead
                threads,
            )
            for name in arm_names
        }
        with _processes(jobs) as (pipes, processes):
            arms = _interleave(pipes, processes, rounds, warmup, word)
        # What an arm's name stands for, so that a reader of the report need not know the names; null: plain transformers.
        settings = {name: job.overrides if name in OURS else None for name, job in jobs.items()}
        return {"sizes": sizes, "arms": {name: {"settings": settings[name], **arm} for name, arm in arms.items()}}


@contextmanager
def _processes(jobs: dict[str, worker.Job]):
    """(arm -> pipe to its process, arm -> process); the processes are gone afterwards."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    try:
        for name, job in jobs.items():
            pipes[name], theirs = spawn.Pipe()
            processes[name] = spawn.Process(target=worker.main, args=(theirs, job))
            processes[name].start()
            theirs.close()  # so that the end of the process ends the pipe
        yield pipes, processes
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes.values():
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()


def _interleave(pipes: dict, processes: dict, rounds: int, warmup: int, word: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"steps": []} for name in pipes}

    def answer_of(name: str, word: str | None) -> dict | None:
        try:
            if word is not None:
                pipes[name].send(word)
            answer = pipes[name].recv()
        except (EOFError, OSError):  # OSError: it died while others had their turn
            processes[name].join(5)
            answer = {"error": f"its process died, exit code {processes[name].exitcode} (-9: killed; out of memory?)"}
        if "error" not in answer:
            return answer
        found[name] = answer
        print(f"{name}: left out: {answer['error']}", file=sys.stderr, flush=True)
        return None

    alive = [name for name in pipes if answer_of(name, None) is not None]
    for turn in range(-warmup, rounds):
        order = alive[turn % len(alive) :] + alive[: turn % len(alive)] if alive else []
        for name in order:
            figures_of_step = answer_of(name, "step" if turn < 0 else word)
            if figures_of_step is None:
                alive.remove(name)
            elif turn >= 0:
                found[name]["steps"].append({"round": turn, **figures_of_step})
        print(f"{'warm-up' if turn < 0 else f'round {turn + 1}/{rounds}'} done", file=sys.stderr, flush=True)
    for name in alive:
        found[name]["peak_memory_bytes"] = found[name]["steps"][-1]["peak_memory_bytes"]
        pipes[name].send("stop")
    return found


def summarise(measured: dict[str, Any], workload: Workload, peak_tflops: float | None = None) -> dict[str, Any]:
    """Arm -> medians over the rounds, lowest and highest, and ratios to the first plain arm inside each round."""
    arms = {name: arm for name, arm in measured["arms"].items() if "steps" in arm}
    reference = next((name for name in PLAIN if name in arms), None)
    rates = {name: [s["clean_tokens"] / s["seconds"] for s in arm["steps"]] for name, arm in arms.items()}
    cpu_rates = {name: [s["clean_tokens"] / s["cpu_seconds"] for s in arm["steps"]] for name, arm in arms.items()}
    found = {}
    for name, arm in arms.items():
        steps = arm["steps"]
        total = {key: sum(s[key] for s in steps) for key in ("seconds", "clean_tokens", "useful_tokens", "positions")}
        found[name] = {
            "seconds": spread([s["seconds"] for s in steps]),
            "clean_tokens_per_s": spread(rates[name]),
            "useful_tokens_per_s": spread([s["useful_tokens"] / s["seconds"] for s in steps]),
            "useful_share": total["useful_tokens"] / total["positions"],
            "ms_per_clean_token": spread([1e3 / rate for rate in rates[name]]),
            "peak_memory_bytes": arm["peak_memory_bytes"],
        }
        if reference is not None:
            of = arms[reference]
            of_rate = sum(s["clean_tokens"] for s in of["steps"]) / sum(s["seconds"] for s in of["steps"])
            found[name] |= {
                "reference": reference,
                "ratio": spread([a / b for a, b in zip(rates[name], rates[reference], strict=True)]),
                "ratio_of_totals": total["clean_tokens"] / total["seconds"] / of_rate,
                "cpu_time_ratio": spread([a / b for a, b in zip(cpu_rates[name], cpu_rates[reference], strict=True)]),
                "memory_ratio": arm["peak_memory_bytes"] / of["peak_memory_bytes"],
            }
        if peak_tflops is not None:
            flops = ar_flops_per_token(measured["sizes"], workload) * found[name]["clean_tokens_per_s"]["median"]
            found[name]["mfu"] = flops / (peak_tflops * 1e12)
    return found


def ar_flops_per_token(sizes: dict[str, int], workload: Workload) -> float:
    """Floating-point operations that plain AR training needs for a clean token: 6 N + 12 layers x width x length.

    PaLM, arXiv:2204.02311, appendix B. The same for every arm, so that an MFU compares what was trained on, not what was
    computed.
    """
    length = (workload.shortest + workload.longest) / 2
    return 6 * sizes["matmul_parameters"] + 12 * sizes["layers"] * sizes["attention_width"] * length


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def sweep(kind: str, arm_names: list[str], *, out: Path, options: dict[str, Any], peak_tflops: float | None) -> dict:
    """Cost of a clean token and peak memory of each arm over lengths or vocabularies, at a fixed number of tokens a step."""
    points = []
    for size in LENGTHS if kind == "length" else VOCABULARIES:
        length = size if kind == "length" else 512
        workload = Workload(SWEEP_TOKENS[kind] // length, length, length)
        shape = dict(SHAPES["small"]) if kind == "length" else {**SHAPES["small"], "vocab_size": size}
        print(f"{kind} {size:,}", file=sys.stderr, flush=True)
        measured = measure(shape, workload, arm_names, num_documents=64, **options)
        points.append({kind: size, **_result("small", workload, measured, peak_tflops)})
        figures.draw_sweep(kind, points, out.with_suffix(".svg"))
    return {"sweep": kind, "tokens_per_step": SWEEP_TOKENS[kind], "results": points}


def _result(name: str, workload: Workload, measured: dict[str, Any], peak_tflops: float | None) -> dict[str, Any]:
    return {
        "shape": name,
        "workload": asdict(workload),
        **measured,
        "summary": summarise(measured, workload, peak_tflops),
    }


def main(argv: list[str]) -> None:
    """The command line; see the top of this file."""
    parser = CommandParser(prog="benchmarks/train.py", description=__doc__)
    parser.add_argument("--shape", type=str, default="Q", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--model", type=Path | None, default=None, help="a causal LM's folder, instead of --shape")
    parser.add_argument("--workload", type=str, default="4x512", help="comma-separated: 4x512, 8x64-512, 8x256/prompt")
    parser.add_argument("--arms", type=str, default="ar,bidirectional", help=f"comma-separated: {', '.join(ARMS)}")
    parser.add_argument("--set", type=str, default="", help="recipe settings of our arms: section.key=value,...")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each arm")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each arm before the first timed one")
    parser.add_argument("--threads", type=int | None, default=None, help="of torch; default: its own choice")
    parser.add_argument("--sweep", type=str | None, default=None, help="length or vocabulary")
    parser.add_argument("--profile", type=str | None, default=None, help="arm to profile for one step")
    parser.add_argument("--peak_tflops", type=float | None, default=None, help="of the device, for an MFU")
    parser.add_argument("--out", type=Path | None, default=None, help="JSON with every raw timing")
    given = parser.parse_args(argv)
    try:
        report = _run(given)
    except ValueError as error:
        raise SystemExit(f"benchmarks/train.py: {error}") from None
    out = given.out or (RESULTS / f"{given.sweep}.json" if given.sweep else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{out}", file=sys.stderr)


def _run(given: Any) -> dict[str, Any]:
    arm_names = [given.profile] if given.profile else given.arms.split(",")
    for name in arm_names:
        if name not in ARMS:
            raise ValueError(f"arms={name}: choose of {', '.join(sorted(ARMS))}")
    if given.sweep not in (None, "length", "vocabulary"):
        raise ValueError(f"sweep={given.sweep}: choose one of length, vocabulary")
    for name in given.shape.split(","):
        if name not in SHAPES:
            raise ValueError(f"shape={name}: choose of {', '.join(sorted(SHAPES))}")
    if given.rounds < 1 or given.warmup < 0:
        raise ValueError(f"rounds={given.rounds}, warmup={given.warmup}: at least 1 round, and no less than 0 warm-up")
    settings = [pair.split("=", 1) for pair in given.set.split(",") if pair]
    if not all(len(pair) == 2 for pair in settings):
        raise ValueError(f"set={given.set}: give section.key=value pairs, comma-separated")
    options = {
        "rounds": 1 if given.profile else given.rounds,
        "warmup": given.warmup,
        "overrides": {key: yaml.safe_load(value) for key, value in settings},
        "threads": given.threads,
    }
    report: dict[str, Any] = {"provenance": machine("train.py", given.threads), "options": options}
    if given.sweep:
        out = given.out or RESULTS / f"{given.sweep}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        return report | sweep(given.sweep, arm_names, out=out, options=options, peak_tflops=given.peak_tflops)
    report["results"] = results = []
    shapes = [(str(given.model), given.model)] if given.model else [(n, SHAPES[n]) for n in given.shape.split(",")]
    word = "profile" if given.profile else "step"
    for name, shape in shapes:
        for text in given.workload.split(","):
            workload = Workload.parse(text)
            measured = measure(shape, workload, arm_names, word=word, **options)
            results.append(_result(name, workload, measured, given.peak_tflops))
            print(f"\n{name}, {text}, {report['provenance']['threads']} threads, load {os.getloadavg()[0]:.1f}")
            print(figures.profile_table(measured) if given.profile else figures.table(results[-1]["summary"]))
    report["provenance"]["load_at_end"] = os.getloadavg()
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
