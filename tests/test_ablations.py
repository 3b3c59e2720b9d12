"""The ablation samples what the model would write, scores exactly what it says, and its one command resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablation_figures
import ablation_texts
import ablations
import numpy as np
import pytest
import torch
from ablation_arms import ARMS, LADDER, recipe_arguments
from ablation_page import put
from ablation_plan import Plan, best_rate, next_task
from ablation_runs import Task, ar_nll, run, score
from ablation_texts import LARGEST_BLOCK, Text
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt

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
    texts = [Text(np.random.default_rng(i).integers(1, 300, 5 + 7 * i).tolist() + [0]) for i in range(3)]
    texts += [Text(texts[2].ids, [7, 8, 9]), Text(texts[1].ids[:-1], [0, 4, 5, 6, 7])]  # answers; one of them cut
    nll = ar_nll(base, texts)
    blocks = adapt.convert(base, tmp_path / "one", attention="block", block_size=1, shift_logits=True)
    scores = score(blocks, texts, num_samples=3)
    assert scores["nelbo"] == pytest.approx(scores["ar_nll"], abs=2e-3)
    assert scores["nelbo"] == pytest.approx(nll, rel=1e-3)  # but for the mask token's own row of the head
    assert scores["mc_stderr"] == [0.0] * 5
    # and by transformers' own loss, one text at a time
    model = AutoModelForCausalLM.from_pretrained(base)
    for text, nats in zip(texts, nll, strict=True):
        context = text.context or [0]
        ids = torch.tensor([[*context, *text.ids]])
        labels = torch.tensor([[-100] * len(context) + text.ids])
        assert model(ids, labels=labels).loss.item() * len(text.ids) == pytest.approx(nats, rel=1e-5)


def test_answers_to_prompts_of_any_length_are_the_models_own_chain_cut_where_a_block_ends(
    base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_folder("llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer("the cat sat " * n)["input_ids"] for n in (1, 4, 2, 7)]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = None
    whole = []
    for prompt in prompts:
        found = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)
        whole.append(found[0, len(prompt) :].tolist())
    end = next(token for token in whole[1] if not all(token in text for text in whole))  # ends some of them
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)

    def greedy(probability: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        return probability.argmax(-1, keepdim=True)

    monkeypatch.setattr(ablation_texts.torch, "multinomial", greedy)
    monkeypatch.setattr(ablation_texts, "AFTER_PROMPTS", 3)
    monkeypatch.setattr(ablation_texts, "_loaded", lambda _: (model, tokenizer))
    chunk = ablation_texts.answer(base, 0, prompts, 64)
    for prompt, text, answer in zip(prompts, whole, chunk.kept, strict=True):
        expected = text[: text.index(end) + 1] if end in text else text
        assert answer == expected[: len(answer)]
        assert (answer[-1] == end) or (len(prompt) + len(answer)) % LARGEST_BLOCK == 0
        assert len(answer) == len(expected) or len(expected) > 64 - LARGEST_BLOCK
    assert 0 < chunk.ended == sum(answer[-1] == end for answer in chunk.kept) < len(prompts)
    assert [text.context for text in chunk.texts] == prompts


def test_a_question_is_asked_in_the_chat_template_and_the_same_prompts_come_in_the_same_order(
    base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_folder("llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    words = ["cat", "dog", "the cat sat on the mat and ran away", "cat"]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"asked": word}) + "\n" for word in words))
    short = {
        word: tokenizer.apply_chat_template(
            [{"role": "user", "content": word}], add_generation_prompt=True, return_dict=False
        )
        for word in words
    }
    longest = max(len(short["cat"]), len(short["dog"]))
    assert len(short[words[2]]) > longest
    prompts = ablation_texts.read_prompts(file, "asked", base, longest)
    assert sorted(prompts) == sorted([short["cat"], short["dog"]])
    assert prompts == ablation_texts.read_prompts(file, "asked", base, longest)


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


def test_given_rates_are_all_tried_and_no_others() -> None:
    plan, done = dataclasses.replace(PLAN, rates=(2e-4, 5e-4, 7e-4)), {}
    while (task := next_task(plan, ["block 16"], done, set())).stage == "tune":
        done[task.key] = {"nelbo": [task.learning_rate]}  # the lowest is best: a walk would not go on to the highest
    assert [json.loads(key)["learning_rate"] for key in done] == list(plan.rates)
    assert task.learning_rate == 2e-4


def test_rows_that_are_older_than_a_field_count_as_its_default(tmp_path: Path) -> None:
    task = PLAN.tuning("block 16", 1e-3)
    row = {name: value for name, value in vars(task).items() if name != "precision"}
    (tmp_path / "runs.jsonl").write_text(json.dumps({**row, "nelbo": [1.0]}) + "\n")
    assert list(ablation_figures.read_runs(tmp_path / "runs.jsonl")) == [task.key]
    with pytest.raises(TypeError):
        Task(**{name: value for name, value in row.items() if name != "seed"})


def test_a_section_takes_the_place_of_its_older_self_and_what_follows_stays_last() -> None:
    page = put("# First\n\nold\n", "")
    page = put("## SmolLM2: answers\n\nold\n", page)
    page += "\n## What follows\n\nBy hand.\n\n### Of it\n\nMore.\n"
    page = put("## Other: answers\n\nother\n", page)
    page = put("## SmolLM2: answers\n\nnew\n", page)
    page = put("# First, with another title\n\nnew\n", page)
    assert page == (
        "# First, with another title\n\nnew\n\n## SmolLM2: answers\n\nnew\n\n## Other: answers\n\nother\n\n"
        "## What follows\n\nBy hand.\n\n### Of it\n\nMore.\n"
    )
    assert put("## Other: answers\n\nother\n", page) == page


def test_an_arm_that_fails_at_every_rate_is_left_and_the_next_one_begins() -> None:
    done: dict[str, dict] = {}
    while (task := next_task(PLAN, ["block 16", "block 4"], done, set())).arm == "block 16":
        done[task.key] = {"error": "ValueError: no"}
    assert best_rate(PLAN, "block 16", done) == (None, [])
    assert task.arm == "block 4"


def test_a_run_that_fails_is_a_row_with_its_reason(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    row = run(PLAN.tuning("block 16", 1e-3), base_folder("llama"), tmp_path, [Text([5, 0])], [Text([5, 0])])
    assert row["error"].startswith("ValueError: --tokens=200: only 2 tokens")
    assert list(tmp_path.glob("run-*")) == []


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe(name: str, tmp_path: Path) -> None:
    from adapt.training.recipe import parse_recipe

    common = {"model.base": "b", "data.train": "d", "training.output_dir": tmp_path, "training.num_steps": 100}
    recipe = parse_recipe(recipe_arguments(ARMS[name], common, 100))
    assert recipe.model.attention == ARMS[name].settings["model.attention"]
    if "curriculum" in name:
        assert recipe.objective.block_sizes == {0: 1, 20: 4, 50: 16}


@pytest.fixture(scope="module")
def command(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):
    """Runs the command here, on texts that are there already; (what runs it, folder)."""
    folder = tmp_path_factory.mktemp("ablations")
    base = base_folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [tokenizer("the cat sat on the mat, and the dog ran " * (1 + i % 2))["input_ids"] + [0] for i in range(32)]
    for seed in (0, 1_000_000):
        (folder / f"texts-{seed}.json").write_text(json.dumps([40, 36, texts]))
    argv = ["--base", base, "--out", folder / "found.md", "--work", folder, "--runs", folder / "runs.jsonl"]
    argv += ["--arms", "block 16; bidirectional, shift, annealed", "--chunks", "1", *PLAN.arguments()]

    def launch(*more: object, workers: int = 0) -> None:
        ablations.main([str(word) for word in (*argv, "--workers", workers, *more)])

    with pytest.MonkeyPatch.context() as environment:  # which the command sets for its workers
        environment.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield launch, folder


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_one_command_tunes_trains_scores_and_writes_and_a_second_one_only_writes(command, workers: int) -> None:
    launch, folder = command
    (folder / "runs.jsonl").unlink(missing_ok=True)
    launch(workers=workers)
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
    launch()
    assert len((folder / "runs.jsonl").read_text().splitlines()) == len(rows)
    assert (folder / "found.md").read_text().endswith("## What follows\n\nBlocks.\n")
    assert ablation_figures.read_runs(folder / "runs.jsonl").keys() >= {PLAN.tuning("block 16", 1e-3).key}


def test_answers_of_any_model_fill_a_section_of_their_own_and_a_second_command_only_writes(
    command, tmp_path: Path
) -> None:
    launch, _ = command
    asked, out, runs = tmp_path / "asked.jsonl", tmp_path / "found.md", tmp_path / "runs.jsonl"
    asked.write_text("".join(json.dumps({"question": f"the cat sat on {n} mats?"}) + "\n" for n in range(20)))
    out.write_text("# First\n\nkept\n\n## What follows\n\nBlocks.\n")
    options = ["--prompts", asked, "--title", "Tiny", "--rates", "0.001", "--precision", "bf16", "--arms", "block 4"]
    options += ["--max_new_tokens", "64", "--chunk_rows", "10", "--row_tokens", "128", "--seeds", "1"]
    options += ["--out", out, "--runs", runs, "--work", tmp_path / "work"]
    launch(*options)
    rows = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [(row["stage"], row["precision"], row.get("error")) for row in rows] == [
        ("tune", "bf16", None),
        ("final", "bf16", None),
    ]
    assert rows[1]["clean_tokens"] > PLAN.tokens  # prompts are read besides
    page = out.read_text()
    assert page.startswith("# First\n\nkept\n\n## Tiny: answers to prompts\n")
    assert page.endswith("## What follows\n\nBlocks.\n")
    assert "| block 4 | 0.001! |" in page
    assert (tmp_path / "found-tiny.png").exists()
    launch(*options)
    assert out.read_text() == page
    assert len(runs.read_text().splitlines()) == 2
    asked.write_text(asked.read_text().replace("mats", "hats"))
    with pytest.raises(SystemExit, match="its texts were sampled after other prompts; give another folder"):
        launch(*options)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rates", "fast"], "--rates=fast: must be numbers with commas between"),
        (["--rates", "1e-3,1e-4"], "--rates=0.001,0.0001: must be above 0, each once, in rising order"),
        (["--precision", "fp8"], "--precision=fp8: choose bf16 or fp32"),
        (["--arms", "block 5"], "--arms=block 5: choose from block 16;"),
        (["--tokens", "9000"], "--tokens=9000: only 672 tokens were sampled; lower it, or raise --chunks"),
        (["--heldout", "33"], "--heldout=33: only 32 of 40 samples are fit; lower it"),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_runs(command, arguments: list[str], said: str) -> None:
    launch, folder = command
    with pytest.raises(SystemExit) as refused:
        launch(*arguments, "--runs", folder / "none.jsonl")
    assert said in str(refused.value)
    assert not (folder / "none.jsonl").exists()
