"""The ablation samples what the model would write, scores exactly what it says, and its one command resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

import ablation_figures  # noqa: E402
import ablation_texts  # noqa: E402
from ablation_arms import ARMS, LADDER, recipe_arguments  # noqa: E402
from ablation_runs import ar_nll, run, score  # noqa: E402
from ablations import Plan, best_rate, next_task  # noqa: E402

PLAN = Plan(tokens=300, tune_tokens=200, row_tokens=32, seeds=2, heldout=4, tune_heldout=2, samples=2)


def test_sampling_is_the_models_own_chain_though_finished_texts_leave_the_batch(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ablation_texts.write_base(base_folder("llama"), tmp_path / "base")
    drawn = []

    def multinomial(probability: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        """The first token by the row, so that some end at once; then the likeliest."""
        drawn.append(len(probability))
        return torch.arange(len(probability))[:, None] if len(drawn) == 1 else probability.argmax(-1, keepdim=True)

    written = []
    monkeypatch.setattr(ablation_texts.torch, "multinomial", multinomial)
    monkeypatch.setattr(ablation_texts, "_tokenises_back", lambda _, ids: written.append(ids) or True)
    chunk = ablation_texts.sample(base, seed=0, rows=12)
    monkeypatch.undo()
    model, bos = AutoModelForCausalLM.from_pretrained(base), 0
    expected = []
    for first in range(12):
        prompt = torch.tensor([[bos, first]])
        text = [first]
        if first != bos:
            text = model.generate(prompt, do_sample=False, max_new_tokens=126, eos_token_id=bos)[0, 1:].tolist()
        if text[-1] == bos:
            expected.append(text)
    assert drawn[0] == 12
    assert drawn[1] == 11  # the row that began with end-of-text is done
    assert chunk.kept == expected
    assert (chunk.sampled, chunk.ended) == (12, len(expected))


def test_a_block_of_one_token_with_shift_is_the_base_so_its_bound_is_the_nll(
    base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_folder("llama")
    texts = [np.random.default_rng(i).integers(1, 300, 5 + 7 * i).tolist() + [0] for i in range(4)]
    nll = ar_nll(base, texts, 0)
    blocks = adapt.convert(base, tmp_path / "one", attention="block", block_size=1, shift_logits=True)
    scores = score(blocks, texts, num_samples=3)
    assert scores["nelbo"] == pytest.approx(scores["ar_nll"], abs=2e-3)
    assert scores["nelbo"] == pytest.approx(nll, rel=1e-3)  # but for the mask token's own row of the head
    assert scores["mc_stderr"] == [0.0] * 4
    # and by transformers' own loss, one text at a time
    model = AutoModelForCausalLM.from_pretrained(base)
    for text, nats in zip(texts, nll, strict=True):
        ids = torch.tensor([[0, *text]])
        assert model(ids, labels=ids).loss.item() * len(text) == pytest.approx(nats, rel=1e-5)


def test_probabilities_of_lengths_sum_to_one() -> None:
    nats = ablation_texts.length_nats([3, 40, 41, 100], list(range(1, 101)), 100)
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-9)
    assert nats[39] < nats[69]


@pytest.mark.parametrize("best", [LADDER[0], 3e-4, 1e-3, 1e-2, LADDER[-1]])
def test_tuning_walks_until_the_best_rate_has_a_worse_one_on_either_side(best: float) -> None:
    done: dict[str, dict] = {}
    while (task := next_task(PLAN, ["block 16"], done, set())).stage == "tune":
        distance = abs(np.log(task.learning_rate / best))
        done[task.key] = {"nelbo": [distance]}
    assert task.learning_rate == best
    at, tried = LADDER.index(best), {json.loads(key)["learning_rate"] for key in done}
    assert {LADDER[max(at - 1, 0)], best, LADDER[min(at + 1, len(LADDER) - 1)]} <= tried


def test_an_arm_that_fails_at_every_rate_is_left_and_the_next_one_begins() -> None:
    done: dict[str, dict] = {}
    while (task := next_task(PLAN, ["block 16", "block 4"], done, set())).arm == "block 16":
        done[task.key] = {"error": "ValueError: no"}
    assert best_rate(PLAN, "block 16", done) == (None, [])
    assert task.arm == "block 4"


def test_a_run_that_fails_is_a_row_with_its_reason(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    row = run(PLAN.tuning("block 16", 1e-3), base_folder("llama"), tmp_path, [[5, 0]], [[5, 0]])
    assert row["error"].startswith("ValueError: --tokens=200: only 2 tokens")
    assert list(tmp_path.glob("run-*")) == []


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe(name: str, tmp_path: Path) -> None:
    from adapt.config import parse_recipe

    common = {"model.base": "b", "data.train": "d", "training.output_dir": tmp_path, "training.num_steps": 100}
    recipe = parse_recipe(recipe_arguments(ARMS[name], common, 100))
    assert recipe.model.attention == ARMS[name].settings["model.attention"]
    if "curriculum" in name:
        assert recipe.objective.block_sizes == {0: 1, 20: 4, 50: 16}


@pytest.fixture(scope="module")
def command(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):
    """Runs the command on texts that are there already; (process, folder)."""
    folder = tmp_path_factory.mktemp("ablations")
    base = base_folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [tokenizer("the cat sat on the mat, and the dog ran " * (1 + i % 2))["input_ids"] + [0] for i in range(32)]
    for seed in (0, 1_000_000):
        (folder / f"texts-{seed}.json").write_text(json.dumps([40, 36, texts]))
    plan = [item for name in PLAN.__dataclass_fields__ for item in (f"--{name}", str(getattr(PLAN, name)))]
    arms = "block 16; bidirectional, shift, annealed"
    argv = [sys.executable, BENCHMARKS / "ablations.py", "--base", base, "--out", folder / "found.md", "--work", folder]
    argv += ["--runs", folder / "runs.jsonl", "--arms", arms, "--chunks", "1", "--workers", "2", *plan]

    def launch(*more: object) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            list(map(str, [*argv, *more])), capture_output=True, text=True, timeout=240, env=environment
        )

    return launch, folder


@pytest.mark.slow
def test_one_command_tunes_trains_scores_and_writes_and_a_second_one_only_writes(command) -> None:
    launch, folder = command
    first = launch()
    assert first.returncode == 0, first.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [row for row in rows if "error" in row] == []
    finals = [row for row in rows if row["stage"] == "final"]
    assert sorted((row["arm"], row["seed"]) for row in finals) == [
        *(("bidirectional, shift, annealed", seed) for seed in range(2)),
        *(("block 16", seed) for seed in range(2)),
    ]
    assert all(len(row["nelbo"]) == 4 and row["clean_tokens"] >= 250 for row in finals)
    blocks, canvas = (row for row in finals if row["seed"] == 0)
    assert (blocks["arm"] == "block 16") == (blocks["ar_nll"] is not None) == (canvas["ar_nll"] is None)
    document = (folder / "found.md").read_text()
    assert (folder / "found.png").stat().st_size > 10_000
    table = [line for line in document.splitlines() if line.startswith("| b") and "[" in line]
    assert len(table) == 2
    # What is written by hand stays, and nothing is trained again.
    (folder / "found.md").write_text(document + "\n## What follows\n\nBlocks.\n")
    assert launch().returncode == 0
    assert len((folder / "runs.jsonl").read_text().splitlines()) == len(rows)
    assert (folder / "found.md").read_text().endswith("## What follows\n\nBlocks.\n")
    assert ablation_figures.read_runs(folder / "runs.jsonl").keys() >= {PLAN.tuning("block 16", 1e-3).key}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--arms", "block 5"], "--arms=block 5: choose from block 16;"),
        (["--tokens", "9000"], "--tokens=9000: only 672 tokens were sampled; lower it, or raise --chunks"),
        (["--heldout", "33"], "--heldout=33: only 32 of 40 samples are fit; lower it"),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_runs(command, arguments: list[str], said: str) -> None:
    launch, folder = command
    done = launch(*arguments, "--runs", folder / "none.jsonl")
    assert done.returncode == 1
    assert said in done.stderr
    assert not (folder / "none.jsonl").exists()
