"""What works best when a causal LM becomes a diffusion LM: arms at equal tokens and tuned learning rates, several seeds.

    python benchmarks/ablations.py --base ../shared/models/stories260K --out docs/ablations.md
    python benchmarks/ablations.py --base path/to/SmolLM2-135M-Instruct --prompts questions.jsonl --out docs/ablations.md \\
        --arms "block 16; block 4; block 16, shift; block 16, shift, AR loss" --rates 1e-4,3e-4,1e-3 --precision bf16 \\
        --tokens 20000 --tune_tokens 6000 --seeds 1 --heldout 96 --samples 2 --chunks 2 --chunk_rows 104

The training text is what the base itself wrote, so its own NLL is the entropy (but for a constant, ablation_texts.py) and NELBO
minus NLL bounds KL(original || adapted). Without --prompts, --base is a llama2.c model: its end-of-text is its start-of-text. With
them it is any causal LM, whose answers are trained on and scored; they fill a section of --out of their own. A run that is finished
is a line of --runs; the same command, started again, does what is missing and writes its section anew.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from itertools import repeat
from pathlib import Path
from typing import Any

from ablation_plan import Plan, next_task, slug

HELDOUT_SEED = 1_000_000  # of the texts that nothing is trained on


class _Here(Executor):
    """Runs each job at once in this process: for a debugger, and for tests."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _pool(workers: int, log: Path) -> Executor:
    from ablation_runs import start_worker

    if workers == 0:
        return _Here()
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker, initargs=(log,))


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
    from ablation_runs import run

    ends = time.monotonic() + 60 * minutes if minutes else float("inf")
    with _pool(workers, work[1] / "workers.log") as pool:
        running: dict[Future, Any] = {}
        while True:
            while len(running) < max(workers, 1) and time.monotonic() < ends:
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


def _sampled(
    base: Path, work: Path, chunks: int, rows: int, workers: int, prompts: list[list[int]] | None, max_new_tokens: int
) -> tuple[list, Any]:
    """(the training chunks, the held-out one), sampled side by side where they are not in `work` yet; each has prompts of its own."""
    from ablation_texts import saved_chunk

    seeds = [HELDOUT_SEED, *range(chunks)]
    shares: list[list[list[int]] | None] = [None] * len(seeds)
    if prompts is not None:
        if len(prompts) < rows * len(seeds):
            raise ValueError(
                f"--chunks={chunks} --chunk_rows={rows}: need {rows * len(seeds)} prompts, one chunk of them held out; "
                f"--prompts has {len(prompts)} that differ and are short enough; lower them"
            )
        shares = [prompts[rows * i : rows * (i + 1)] for i in range(len(seeds))]
    found = []
    with _pool(workers, work / "workers.log") as pool:
        each = (repeat(base), repeat(work), seeds, repeat(rows), shares, repeat(max_new_tokens))
        for seed, chunk in zip(seeds, pool.map(saved_chunk, *each), strict=True):
            found.append(chunk)
            what = "held-out texts" if seed == HELDOUT_SEED else f"texts {seed + 1} of {chunks}"
            print(
                f"{what}: kept {len(chunk.kept)} of {chunk.sampled}, {chunk.cpu_s} CPU s", file=sys.stderr, flush=True
            )
    return found[1:], found[0]


def _arguments(argv: list[str]) -> Any:
    from adapt.arguments import CommandParser

    parser = CommandParser(prog="ablations.py", description=__doc__)
    parser.add_argument(
        "--base", type=Path, required=True, help="folder of a llama2.c model; any causal LM's with --prompts"
    )
    parser.add_argument("--out", type=Path, required=True, help="the document (.md); its plot is written beside it")
    parser.add_argument(
        "--prompts", type=Path | None, default=None, help="file (json, jsonl, parquet) that the base answers"
    )
    parser.add_argument("--prompt_column", type=str, default="question")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="answers that get longer are cut")
    parser.add_argument(
        "--title", type=str | None, default=None, help="names the section, default: the folder of --base"
    )
    parser.add_argument(
        "--runs",
        type=Path | None,
        default=None,
        help="raw results, default: benchmarks/results/ablations[-TITLE].jsonl",
    )
    parser.add_argument(
        "--work", type=Path | None, default=None, help="folder of texts and of runs, default: build/ablations[-TITLE]"
    )
    parser.add_argument("--arms", type=str, default="all", help="names from ablation_arms.py, with semicolons between")
    parser.add_argument("--tokens", type=int, default=80_000, help="clean tokens of a run, each once; of answers alone")
    parser.add_argument(
        "--tune_tokens", type=int, default=30_000, help="clean tokens of a run that tunes a learning rate"
    )
    parser.add_argument(
        "--rates", type=str, default="", help="learning rates, with commas; default: a walk along a ladder"
    )
    parser.add_argument("--precision", type=str, default="fp32", help="of training: bf16 (autocast) or fp32")
    parser.add_argument("--row_tokens", type=int, default=512, help="clean tokens of an optimizer step: one packed row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=64, help="texts to score")
    parser.add_argument("--tune_heldout", type=int, default=24, help="texts to score when tuning")
    parser.add_argument("--samples", type=int, default=4, help="Monte-Carlo samples of each text's NELBO")
    parser.add_argument("--chunks", type=int, default=9, help="chunks of samples for training; one more is held out")
    parser.add_argument("--chunk_rows", type=int, default=256, help="samples of a chunk")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each; 0: this one"
    )
    parser.add_argument("--minutes", type=float | None, default=None, help="start no run after that long")
    parser.add_argument("--retry", type=bool, default=False, help="run again what failed, instead of taking it as done")
    return parser.parse_args(argv)


def _plan(given: Any) -> tuple[Plan, list[str]]:
    """(what the runs have in common, the arms); ValueError for what cannot be run."""
    from ablation_arms import ARMS

    names = list(ARMS) if given.arms == "all" else [name.strip() for name in given.arms.split(";")]
    if unknown := sorted(set(names) - set(ARMS)):
        raise ValueError(f"--arms={'; '.join(unknown)}: choose from {'; '.join(ARMS)}")
    try:
        rates = tuple(float(word) for word in given.rates.split(",") if word.strip())
    except ValueError:
        raise ValueError(
            f"--rates={given.rates}: must be numbers with commas between, such as 1e-4,3e-4,1e-3"
        ) from None
    common = {name: getattr(given, name) for name in Plan.__dataclass_fields__ if name != "rates"}
    return Plan(**common, rates=rates), names


def _run_and_write(given: Any) -> None:
    plan, names = _plan(given)
    title = given.title or given.base.resolve().name
    own = f"-{slug(title)}" if given.prompts else ""
    runs = given.runs or Path(f"benchmarks/results/ablations{own}.jsonl")
    work = (given.work or Path(f"build/ablations{own}")).resolve()
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
    os.environ.setdefault("HF_DATASETS_CACHE", str(work / "cache"))
    runs.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    import ablation_figures  # torch and datasets, which read the environment
    import ablation_page
    from ablation_runs import ar_nll, texts_of
    from ablation_texts import LARGEST_BLOCK, num_parameters, read_prompts, write_base

    from adapt.files.provenance import git_revision

    # 1. Texts.
    base = write_base(given.base, work / "base", end_is_start=not given.prompts)
    prompts, asked, limit = None, None, given.max_new_tokens
    if given.prompts:
        if limit < LARGEST_BLOCK:
            raise ValueError(f"--max_new_tokens={limit}: must be at least {LARGEST_BLOCK}, the largest block of an arm")
        prompts = read_prompts(given.prompts, given.prompt_column, base, plan.row_tokens - limit)
        asked = ablation_page.Asked(title, given.prompts, given.prompt_column, limit, num_parameters(base))
    training, heldout = _sampled(base, work, given.chunks, given.chunk_rows, given.workers, prompts, limit)
    texts = [text for chunk in training for text in chunk.texts]
    scored = heldout.texts[: plan.heldout]
    if len(scored) < plan.heldout:
        raise ValueError(f"--heldout={plan.heldout}: only {len(scored)} of {heldout.sampled} samples are fit; lower it")
    texts_of(texts, max(plan.tokens, plan.tune_tokens))
    # 2. Runs.
    done = ablation_figures.read_runs(runs, without_failed=given.retry)
    about_run = {"revision": git_revision(), "hardware": ablation_figures.hardware()}

    def on_done(task: Any, row: dict[str, Any]) -> None:
        row |= about_run
        ablation_figures.append_run(runs, row)
        outcome = row.get("error") or f"nelbo {ablation_figures.per_token(row, heldout.texts):.3f} nats/token"
        print(
            f"{task.arm}: {task.stage} lr {task.learning_rate:g} seed {task.seed}: {outcome}",
            file=sys.stderr,
            flush=True,
        )

    common = (given.base.resolve(), work, texts, heldout.texts)
    run_all(plan, names, done, common, workers=given.workers, minutes=given.minutes, on_done=on_done)
    # 3. Table and plot.
    base_nats = ar_nll(base, scored)
    longest = limit if asked else max(511, *(len(text.ids) for text in scored))
    rows, about = ablation_figures.results(plan, names, done, texts, scored, base_nats, longest)
    ablation_page.write(given.out, names, rows, plan, training, about, asked)


def main(argv: list[str]) -> None:
    """Samples, trains, scores, and writes table and plot."""
    given = _arguments(argv)
    try:
        _run_and_write(given)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
