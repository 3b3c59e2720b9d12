"""Held-out rows: scored with the same noise every time, never trained on, and without a trace in the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import losses, metrics, recipe_argv, train_ranks, write_base, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.training import train
from adapt.training.data.held_out import load_split
from adapt.training.recipe import parse_recipe

CLOCK = {"tokens_per_s", "useful_tokens_per_s", "clean_tokens_per_s", "elapsed_s", "peak_memory_gb"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "held-out.jsonl", 40, seed=1)
    return folder


@pytest.fixture
def argv(folder: Path, tmp_path: Path):
    def argv(name: str, **overrides) -> list[str]:
        return recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / name, **overrides)

    return argv


@pytest.fixture
def run(argv, tmp_path: Path):
    def run(name: str = "out", **overrides) -> Path:
        train.train(parse_recipe(argv(name, **overrides)))
        return tmp_path / name

    return run


def scores(out: Path, key: str = "eval_nelbo") -> dict[int, float]:
    return {line["step"]: line[key] for line in metrics(out) if key in line}


def without_scores(out: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if not key.startswith("eval_") and key not in CLOCK}
        for line in metrics(out)
    ]


def nll_of_transformers(folder: Path) -> float:
    """Nats per token of the held-out completions and their end, from the base itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    nats, num_tokens = 0.0, 0
    for line in (folder / "held-out.jsonl").read_text().splitlines():
        prompt, target = (tokenizer(text)["input_ids"] for text in json.loads(line).values())
        target = [*target, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
        num_tokens += len(target)
    return nats / num_tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"model__lora": {"r": 4, "dropout": 0.3}},
        {"data__num_workers": 2, "training__logging_steps": 3},
        {"objective__name": "ar"},
        {
            "objective__distill_weight": 0.5,
            "objective__views": 2,
            "objective__complementary": True,
            "data__seq_len": 64,
        },
        {"noise__kind": "hybrid", "model__attention": "bidirectional"},
    ],
    ids=str,
)
def test_an_evaluation_leaves_no_trace_in_the_run(run, folder: Path, settings) -> None:
    plain = run("plain", **settings)
    scored = run("scored", data__eval=folder / "held-out.jsonl", training__eval_steps=1, **settings)
    assert without_scores(scored) == without_scores(plain)
    assert len(scores(scored)) == len(metrics(plain))
    found, want = (load_file(out / "model" / "model.safetensors") for out in (scored, plain))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_scores_compare_between_runs_batches_and_restarts(run, folder: Path) -> None:
    settings = {"data__eval": folder / "held-out.jsonl", "training__eval_steps": 2, "training__save_steps": 3}
    whole = run("whole", **settings)
    assert list(scores(whole)) == [2, 4, 6]
    assert len(set(scores(whole).values())) == 3
    split = run("split", **settings, training__micro_batch_size=2, training__seed=0)
    assert scores(split) == pytest.approx(scores(whole), rel=1e-5)
    shutil.rmtree(whole / "model")
    shutil.rmtree(whole / "checkpoints" / "checkpoint-6")
    before = scores(whole)
    run("whole", **settings)
    assert scores(whole) == before
    # Weights that stay as they are score the same, whatever seed and band of times training draws from.
    still = {**settings, "training__learning_rate": 1e-30, "training__weight_decay": 0, "training__save_steps": None}
    band = {"training__seed": 3, "noise__t_min": 0.3, "objective__weight": "uniform"}
    one, other = scores(run("still", **still)), scores(run("band", **still, **band))
    assert len({round(value, 6) for value in [*one.values(), *other.values()]}) == 1


def test_a_share_is_kept_out_of_training(run, folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / "never", data__eval=0.25))
    split = load_split(recipe.data)
    assert split.held_out is not None
    kept, held = (["\n".join(row.values()) for row in rows.to_list()] for rows in split)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert sorted(kept + held) == sorted("\n".join(row.values()) for row in rows)
    assert (len(kept), len(held)) == (48, 16)
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split.train.to_list()))
    out = run("share", data__eval=0.25)
    assert losses(out) == losses(run("file", data__train=tmp_path / "kept.jsonl"))
    assert list(scores(out)) == [1, 2, 3, 4, 5, 6]  # a tenth of six steps is one


def test_the_ar_objective_is_scored_by_its_nll(run, folder: Path) -> None:
    settings = {"objective__name": "ar", "data__eval": folder / "held-out.jsonl", "training__num_steps": 1}
    out = run("ar", training__learning_rate=1e-30, **settings)
    assert scores(out) == scores(out, "eval_ar_nll")
    assert scores(out)[1] == pytest.approx(nll_of_transformers(folder), rel=1e-5)
    both = run(
        "both",
        data__eval=folder / "held-out.jsonl",
        **{"objective__ar_weight": 0.5, "data__canvas_start": "anywhere", "data__canvas_length": 4},
    )
    assert scores(both).keys() == scores(both, "eval_ar_nll").keys()
    assert scores(both)[6] != pytest.approx(scores(both, "eval_ar_nll")[6], rel=1e-3)


@pytest.mark.distributed
def test_ranks_share_the_rows_out_and_agree_on_the_score(run, argv, folder: Path, tmp_path: Path) -> None:
    settings = {"data__eval": folder / "held-out.jsonl", "training__num_steps": 2, "training__micro_batch_size": 4}
    one = run("one", **settings)
    train_ranks(argv("two", **settings, training__deepspeed="zero3"), tmp_path / "two.log")
    assert scores(tmp_path / "two") == pytest.approx(scores(one), rel=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data__eval": 0.001}, "data.eval=0.001: of 64 rows this keeps 0 out of training; give a share"),
        ({"data__eval": 1.5}, "data.eval=1.5: must be above 0 and below 1"),
        ({"data__eval": "./none.jsonl"}, "data.eval=./none.jsonl: no such file; give json"),
        ({"training__eval_steps": 3}, "training.eval_steps=3: nothing to score; set data.eval, such as 0.05"),
    ],
)
def test_held_out_rows_that_cannot_be_are_refused_by_name(run, settings, message: str) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        run(**settings)
    assert message in str(refused.value)


def test_a_run_goes_on_with_other_held_out_files_but_not_with_another_share(run, folder: Path) -> None:
    out = run(training__save_steps=3, data__eval=folder / "held-out.jsonl")
    shutil.rmtree(out / "model")
    run(training__save_steps=3)
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=r"data.eval=0.5: the run in .* was started with None|no such setting"):
        run(training__save_steps=3, data__eval=0.5)


def test_the_progress_line_keeps_the_last_score(run, folder: Path, capsys) -> None:
    out = run(data__eval=folder / "held-out.jsonl", training__eval_steps=4)
    said = capsys.readouterr().err
    assert f" eval_nelbo={scores(out)[6]:.3f} " in said
    assert said.count("eval_nelbo = of the held-out rows") == 1
