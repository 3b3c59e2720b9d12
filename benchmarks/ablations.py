"""What works best when a causal LM becomes a diffusion LM: arms at equal tokens and tuned learning rates, several seeds.

    python benchmarks/ablations.py --base ../shared/models/stories260K --out docs/ablations.md

The training text is what the base itself wrote, so its own NLL is the entropy (but for a constant, ablation_texts.py) and NELBO
minus NLL bounds KL(original || adapted). --base is a llama2.c model: its end-of-text is its start-of-text. A run that is finished is a
line of --runs; the same command, started again, does what is missing and writes --out anew.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELDOUT_SEED = 1_000_000  # of the texts that nothing is trained on


@dataclass(frozen=True)
class Plan:
    """What the runs of all arms have in common."""

    tokens: int
    tune_tokens: int
    row_tokens: int
    seeds: int
    heldout: int
    tune_heldout: int
    samples: int

    def tuning(self, arm: str, rate: float) -> Any:
        from ablation_runs import Task

        return Task(arm, "tune", rate, 0, self.tune_tokens, self.tune_heldout, self.samples, self.row_tokens)

    def final(self, arm: str, rate: float) -> list:
        from ablation_runs import Task

        common = (self.tokens, self.heldout, self.samples, self.row_tokens)
        return [Task(arm, "final", rate, seed, *common) for seed in range(self.seeds)]


def next_task(plan: Plan, names: list[str], done: dict[str, dict], running: set[str]) -> Any:
    """The first task that may start: arm by arm, learning rates before seeds; None if there is none now."""
    for arm in names:
        best, wanted = best_rate(plan, arm, done)
        tasks = [plan.tuning(arm, rate) for rate in wanted] if best is None else plan.final(arm, best)
        for task in tasks:
            if task.key not in done and task.key not in running:
                return task
    return None


def tuned(plan: Plan, arm: str, done: dict[str, dict]) -> dict[float, float]:
    """Learning rate -> summed bound of what was tried, infinite where training failed."""
    from ablation_arms import LADDER

    rows = {rate: done.get(plan.tuning(arm, rate).key) for rate in LADDER}
    return {rate: sum(row.get("nelbo", [float("inf")])) for rate, row in rows.items() if row is not None}


def best_rate(plan: Plan, arm: str, done: dict[str, dict]) -> tuple[float | None, list[float]]:
    """(the learning rate of the lowest bound, None while a neighbour of it in LADDER is untried; what is to be tried)."""
    from ablation_arms import ARMS, LADDER

    bounds = tuned(plan, arm, done)
    wanted = [rate for rate in ARMS[arm].first_rates if rate not in bounds]
    if not wanted:
        at = LADDER.index(min(bounds, key=lambda rate: bounds[rate]))
        wanted = [rate for rate in LADDER[max(at - 1, 0) : at + 2] if rate not in bounds]
        if not wanted:
            return (LADDER[at] if bounds[LADDER[at]] < float("inf") else None), []
    return None, wanted


def run_all(
    plan: Plan,
    names: list[str],
    done: dict[str, dict],
    work: tuple,
    *,
    workers: int,
    minutes: float | None,
    on_done,
) -> None:
    """Runs what `done` lacks, `workers` at a time, and starts nothing after that many minutes. work: what `run` takes besides."""
    from ablation_runs import run, start_worker

    ends = time.monotonic() + 60 * minutes if minutes else float("inf")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=start_worker, initargs=(work[1] / "workers.log",)
    ) as pool:
        running: dict[Future, Any] = {}
        while True:
            while len(running) < workers and time.monotonic() < ends:
                task = next_task(plan, names, done, {task.key for task in running.values()})
                if task is None:
                    break
                running[pool.submit(run, task, *work)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                done[task.key] = future.result()
                on_done(task, done[task.key])


def _sampled(base: Path, work: Path, chunks: int, workers: int) -> tuple[list, Any]:
    """(the training chunks, the held-out one), sampled side by side where they are not in `work` yet."""
    from ablation_runs import start_worker
    from ablation_texts import saved_chunk

    seeds = [HELDOUT_SEED, *range(chunks)]
    spawn = multiprocessing.get_context("spawn")
    log = (work / "workers.log",)
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker, initargs=log) as pool:
        heldout, *training = pool.map(saved_chunk, [base] * len(seeds), [work] * len(seeds), seeds)
    return training, heldout


def main(argv: list[str]) -> None:
    """Samples, trains, scores, and writes table and plot."""
    import ablation_figures
    from ablation_arms import ARMS
    from ablation_runs import ar_nll, texts_of
    from ablation_texts import write_base

    from adapt.arguments import CommandParser
    from adapt_eval import provenance

    parser = CommandParser(prog="ablations.py", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of a llama2.c model")
    parser.add_argument("--out", type=Path, required=True, help="the document (.md); its plot is written beside it")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/results/ablations.jsonl"), help="raw results")
    parser.add_argument(
        "--work", type=Path, default=Path("build/ablations"), help="folder of texts and of what runs leave"
    )
    parser.add_argument("--arms", type=str, default="all", help="names from ablation_arms.py, with semicolons between")
    parser.add_argument("--tokens", type=int, default=80_000, help="clean tokens of a run, each once")
    parser.add_argument(
        "--tune_tokens", type=int, default=30_000, help="clean tokens of a run that tunes a learning rate"
    )
    parser.add_argument("--row_tokens", type=int, default=512, help="clean tokens of an optimizer step: one packed row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=64, help="texts to score")
    parser.add_argument("--tune_heldout", type=int, default=24, help="texts to score when tuning")
    parser.add_argument("--samples", type=int, default=4, help="Monte-Carlo samples of each text's NELBO")
    parser.add_argument("--chunks", type=int, default=9, help="chunks of 256 samples for training")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float | None, default=None, help="start no run after that long")
    parser.add_argument("--retry", type=bool, default=False, help="run again what failed, instead of taking it as done")
    given = parser.parse_args(argv)
    names = list(ARMS) if given.arms == "all" else [name.strip() for name in given.arms.split(";")]
    unknown = sorted(set(names) - set(ARMS))
    if unknown:
        sys.exit(f"--arms={'; '.join(unknown)}: choose from {'; '.join(ARMS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
    work = given.work.resolve()
    os.environ.setdefault("HF_DATASETS_CACHE", str(work / "cache"))
    given.runs.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    # 1. Texts.
    base = write_base(given.base, work / "base")
    training, heldout = _sampled(base, work, given.chunks, given.workers)
    texts = [ids for chunk in training for ids in chunk.kept]
    scored = heldout.kept[: given.heldout]
    if len(scored) < given.heldout:
        sys.exit(f"--heldout={given.heldout}: only {len(scored)} of {heldout.sampled} samples are fit; lower it")
    try:
        texts_of(texts, max(given.tokens, given.tune_tokens))
    except ValueError as error:
        sys.exit(str(error))
    # 2. Runs.
    plan = Plan(*(getattr(given, name) for name in Plan.__dataclass_fields__))
    done = ablation_figures.read_runs(given.runs, without_failed=given.retry)
    revision = provenance.git_revision()
    hardware = ablation_figures.hardware()

    def on_done(task: Any, row: dict[str, Any]) -> None:
        row |= {"revision": revision, "hardware": hardware}
        ablation_figures.append_run(given.runs, row)
        outcome = row.get("error") or f"nelbo {ablation_figures.per_token(row, heldout.kept):.3f} nats/token"
        print(
            f"{task.arm}: {task.stage} lr {task.learning_rate:g} seed {task.seed}: {outcome}",
            file=sys.stderr,
            flush=True,
        )

    run_all(
        plan,
        names,
        done,
        (given.base.resolve(), work, texts, heldout.kept),
        workers=given.workers,
        minutes=given.minutes,
        on_done=on_done,
    )
    # 3. Table and plot.
    base_nats = ar_nll(base, scored, scored[0][-1])
    rows, about = ablation_figures.results(plan, names, done, texts, scored, base_nats)
    ablation_figures.write(given.out, rows, plan, training, about)


if __name__ == "__main__":
    main(sys.argv[1:])
