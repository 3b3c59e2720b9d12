"""Two ranks on CPU, under the deepspeed launcher and forked: the curve of one rank, resume to the bit, folders that load."""

from __future__ import annotations

import multiprocessing.connection
import signal
import time
from collections.abc import Callable
from pathlib import Path

import kill_resume
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from training_fixtures import (
    DIES,
    at_step,
    finish,
    losses,
    metrics,
    recipe_argv,
    stored,
    train_ranks,
    two_ranks,
    write_base,
    write_pairs,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.training import command, train
from adapt.training.interruption import Interrupted
from adapt.training.recipe import parse_recipe

pytestmark = pytest.mark.distributed
SETTINGS = {"training__num_steps": 16, "training__save_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def argv(folder: Path) -> Callable[..., list[str]]:
    def argv(name: str, **overrides) -> list[str]:
        settings = {**SETTINGS, "training__micro_batch_size": 4, **overrides}
        return recipe_argv(folder / "base", folder / "pairs.jsonl", folder / name, **settings)

    return argv


@pytest.fixture(scope="module")
def train_two(folder: Path, argv) -> Callable[..., str]:
    """Trains on two forked ranks to the end; what they said."""
    return lambda name, **overrides: train_ranks(argv(name, **overrides), folder / f"{name}.log")


@pytest.fixture(scope="module")
def kill_ranks(folder: Path, argv) -> Callable[..., str]:
    """Trains on two forked ranks until those of `dying` are killed in step 9; what they said."""

    def kill_ranks(name: str, *dying: int, **overrides) -> str:
        log = folder / f"{name}.log"
        codes = kill_resume.finish(kill_resume.start(argv(name, **overrides), 2, log, at_step(8, dying, DIES)), log)
        assert [code == -signal.SIGKILL for code in codes] == [rank in dying for rank in range(2)], log.read_text()
        assert None not in codes
        assert 0 not in codes
        assert max(losses(folder / name)) == 8
        return log.read_text()

    return kill_ranks


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Path:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "one", **SETTINGS)
    return train.train(parse_recipe(argv)).parent


def assert_same_curve(found: Path, want: Path) -> None:
    assert list(losses(found).values()) == pytest.approx(list(losses(want).values()), rel=2e-6)


def test_zero2_on_two_ranks_has_the_curve_of_one_and_survives_a_rank_that_dies_to_the_bit(
    train_two, kill_ranks, folder, one_rank
) -> None:
    output = train_two("zero2", training__deepspeed="zero2")
    assert output.count("16 steps of 8 rows on 2 ranks") == 1  # rank 0 alone speaks
    assert output.count("train: 100% 16/16 ") == 1
    assert_same_curve(folder / "zero2", one_rank)
    assert len(AutoModelForCausalLM.from_pretrained(folder / "zero2" / "model").state_dict()) > 10

    assert stored(folder / "zero2" / "model") == stored(folder / "zero2" / "converted")

    said = kill_ranks("killed", 1, training__deepspeed="zero2")
    assert said.count("another rank has died, look for what it said") == 1
    assert "from step 6 " in train_two("killed", training__deepspeed="zero2")
    assert losses(folder / "killed") == losses(folder / "zero2")
    found, want = (load_file(folder / name / "model" / "model.safetensors") for name in ("killed", "zero2"))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_the_launcher_ends_with_the_rank_that_dies_and_a_restart_goes_on(argv, train_two, folder, free_port) -> None:
    settings = {"training__save_steps": 5, "training__deepspeed": "zero2"}
    process = two_ranks(argv("launched", **settings, training__num_steps=300), free_port)
    while process.poll() is None and not (folder / "launched" / "checkpoints" / "checkpoint-5" / "COMPLETE").exists():
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in started if "train.py" in " ".join(p.cmdline()[1:3])]
    assert len(ranks) == 2
    ranks[-1].kill()
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert said.count("300 steps of 8 rows on 2 ranks") == 1  # rank 0 alone speaks
    assert "Warning" not in said
    assert "built successfully" not in said
    assert "exits with return code = -9" in said
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    more = max(kill_resume.losses(folder / "launched")) + 2
    assert "from step " in train_two("launched", **settings, training__num_steps=more)


@pytest.mark.exhaustive
def test_the_launcher_ends_well_and_its_run_has_the_curve_of_one_rank(argv, folder, one_rank, free_port) -> None:
    output = finish(two_ranks(argv("to-the-end", training__deepspeed="zero2"), free_port))
    assert output.count("16 steps of 8 rows on 2 ranks") == 1
    assert "Warning" not in output
    assert_same_curve(folder / "to-the-end", one_rank)


@pytest.mark.parametrize("terminated", [False, True], ids=["finished", "terminated"])
def test_the_command_leaves_no_process_group_whose_threads_could_abort_the_exit(
    folder, monkeypatch, terminated
) -> None:
    def stands_for_training(recipe) -> Path:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if terminated:
            raise Interrupted(signal.SIGTERM, step=3)
        return folder / "model"

    monkeypatch.setattr(train, "train", stands_for_training)
    code = command.main(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "left"))
    assert code == (143 if terminated else 0)
    assert not dist.is_initialized()


def test_zero3_on_two_ranks_has_the_curve_of_one_and_leaves_whole_weights(train_two, folder, one_rank) -> None:
    train_two("zero3", training__deepspeed="zero3")
    assert_same_curve(folder / "zero3", one_rank)
    assert stored(folder / "zero3" / "model") == stored(folder / "zero3" / "converted")
    found = AutoModelForCausalLM.from_pretrained(folder / "zero3" / "model").state_dict()
    want = AutoModelForCausalLM.from_pretrained(one_rank / "model").state_dict()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_bf16_under_zero3_ends_in_a_bf16_folder(train_two, folder, one_rank) -> None:
    train_two("bf16", training__deepspeed="zero3", training__precision="bf16", training__save_steps=0)
    assert list(losses(folder / "bf16").values()) == pytest.approx(list(losses(one_rank).values()), rel=0.05)
    assert AutoModelForCausalLM.from_pretrained(folder / "bf16" / "model").dtype == torch.bfloat16


def test_lora_the_mask_row_and_a_teacher_under_zero3_have_the_curve_of_one_rank(train_two, folder) -> None:
    settings = {"model__lora": {"r": 4}, "training__num_steps": 6, "training__learning_rate": 0.02}
    settings |= {"objective__distill_weight": 0.5}
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "lora", **settings)
    one = train.train(parse_recipe(argv)).parent
    train_two("lora-zero3", training__deepspeed="zero3", **settings)
    assert_same_curve(folder / "lora-zero3", one)
    taught = ([line["distill_kl"] for line in metrics(out)] for out in (folder / "lora-zero3", one))
    assert next(taught) == pytest.approx(next(taught), rel=2e-6)
    assert stored(folder / "lora-zero3" / "model") == stored(one / "converted")
    found, want = (load_file(out / "model" / "model.safetensors") for out in (folder / "lora-zero3", one))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    mask = AutoTokenizer.from_pretrained(one / "model").mask_token_id
    before = load_file(one / "converted" / "model.safetensors")["model.embed_tokens.weight"]
    rows = found["model.embed_tokens.weight"] != before
    assert rows.any(1).nonzero().flatten().tolist() == [mask]


@pytest.mark.exhaustive
def test_lora_with_accumulation_under_zero3_survives_sigkill_to_the_bit(train_two, kill_ranks, folder) -> None:
    settings = {"model__lora": {"r": 4}, "training__learning_rate": 0.02, "training__deepspeed": "zero3"}
    settings |= {"training__micro_batch_size": 2}  # 2 ranks x 2 rows: accumulates twice
    train_two("lora-whole", **settings)
    kill_ranks("lora-killed", 0, 1, **settings)
    assert "from step 6 " in train_two("lora-killed", **settings)
    assert losses(folder / "lora-killed") == losses(folder / "lora-whole")
    for part in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        found, want = (load_file(folder / name / part) for name in ("lora-killed", "lora-whole"))
        assert all(torch.equal(found[name], want[name]) for name in want)
    # Accumulation changes nothing but rounding: the curve of one rank with all 8 rows at once.
    one = {**SETTINGS, "model__lora": {"r": 4}, "training__learning_rate": 0.02}
    train.train(parse_recipe(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "lora-one", **one)))
    found, want = losses(folder / "lora-whole"), losses(folder / "lora-one")
    assert list(found.values()) == pytest.approx(list(want.values()), rel=2e-5)


def test_a_mistake_is_told_once_and_not_by_every_rank(argv, folder) -> None:
    log = folder / "never.log"
    processes = kill_resume.start(argv("never", training__deepspeed="zero2", data__train=folder / "none.jsonl"), 2, log)
    multiprocessing.connection.wait([process.sentinel for process in processes])
    kill_resume.kill(processes)  # as the launcher ends all when one has ended badly
    assert log.read_text().count("adapt train: error: data.train=") == 1
    assert "Traceback" not in log.read_text()
    assert not (folder / "never").exists()


@pytest.mark.exhaustive
def test_a_mistake_under_the_launcher_ends_all_without_a_traceback(argv, folder, free_port) -> None:
    process = two_ranks(argv("never", training__deepspeed="zero2", data__train=folder / "none.jsonl"), free_port)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    # Once, unless the machine is so busy that rank 0 begins ten seconds after rank 1.
    assert output.count("adapt train: error: data.train=") in (1, 2)
    assert "Traceback" not in output
    assert not (folder / "never").exists()


def test_one_process_without_the_launcher_runs_deepspeed_too(folder: Path, argv, one_rank: Path) -> None:
    settings = {"training__deepspeed": "zero0", "training__micro_batch_size": 8}
    train_ranks(argv("alone", **settings), folder / "alone.log", ranks=1)
    assert_same_curve(folder / "alone", one_rank)
    assert stored(folder / "alone" / "model") == stored(one_rank / "converted")
    assert len(metrics(folder / "alone")) == 16
