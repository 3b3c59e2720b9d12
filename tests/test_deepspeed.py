"""Two ranks under the deepspeed launcher, on CPU: the curve of one rank, resume to the bit, folders that load."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_trainer import losses_so_far
from training_fixtures import finish, losses, metrics, recipe_argv, two_ranks, write_base, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.training import train
from adapt.training.interruption import Terminated
from adapt.training.recipe import parse_recipe

pytestmark = pytest.mark.distributed
SETTINGS = {"training__num_steps": 16, "training__save_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def launch(folder: Path, free_port: int):
    """Starts two ranks on recipes/train.py; the launcher's process."""

    def launch(name: str, **overrides) -> subprocess.Popen[str]:
        settings = {**SETTINGS, "training__micro_batch_size": 4, **overrides}
        return two_ranks(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / name, **settings), free_port)

    return launch


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Path:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "one", **SETTINGS)
    return train.train(parse_recipe(argv)).parent


def assert_same_curve(found: Path, want: Path) -> None:
    assert list(losses(found).values()) == pytest.approx(list(losses(want).values()), rel=2e-6)


def kill_at_step(step: int, process: subprocess.Popen[str], out: Path) -> None:
    """SIGKILL to the launcher and its ranks once a run has logged `step`."""
    while process.poll() is None and max(losses_so_far(out), default=0) < step:
        time.sleep(0.002)
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in started:
        one.kill()
    psutil.wait_procs(started)
    process.communicate()
    assert not (out / "model").exists(), "it ended before it could be killed"


def test_zero2_on_two_ranks_has_the_curve_of_one_and_survives_sigkill_to_the_bit(launch, folder, one_rank) -> None:
    output = finish(launch("zero2", training__deepspeed="zero2"))
    assert output.count("16 steps of 8 rows on 2 ranks") == 1  # rank 0 alone speaks
    assert "Warning" not in output
    assert_same_curve(folder / "zero2", one_rank)
    assert len(AutoModelForCausalLM.from_pretrained(folder / "zero2" / "model").state_dict()) > 10

    kill_at_step(8, launch("killed", training__deepspeed="zero2"), folder / "killed")
    assert "from step " in finish(launch("killed", training__deepspeed="zero2"))
    assert losses(folder / "killed") == losses(folder / "zero2")
    found, want = (load_file(folder / name / "model" / "model.safetensors") for name in ("killed", "zero2"))
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("terminated", [False, True], ids=["finished", "terminated"])
def test_the_command_leaves_no_process_group_whose_threads_could_abort_the_exit(
    folder, monkeypatch, terminated
) -> None:
    def stands_for_training(recipe) -> Path:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if terminated:
            raise Terminated("SIGTERM: saved")
        return folder / "model"

    monkeypatch.setattr(train, "train", stands_for_training)
    code = train.main(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "left"))
    assert code == (143 if terminated else 0)
    assert not dist.is_initialized()


def test_zero3_on_two_ranks_has_the_curve_of_one_and_leaves_whole_weights(launch, folder, one_rank) -> None:
    finish(launch("zero3", training__deepspeed="zero3"))
    assert_same_curve(folder / "zero3", one_rank)
    found = AutoModelForCausalLM.from_pretrained(folder / "zero3" / "model").state_dict()
    want = AutoModelForCausalLM.from_pretrained(one_rank / "model").state_dict()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_bf16_under_zero3_ends_in_a_bf16_folder(launch, folder, one_rank) -> None:
    finish(launch("bf16", training__deepspeed="zero3", training__precision="bf16", training__save_steps=0))
    assert list(losses(folder / "bf16").values()) == pytest.approx(list(losses(one_rank).values()), rel=0.05)
    assert AutoModelForCausalLM.from_pretrained(folder / "bf16" / "model").dtype == torch.bfloat16


def test_lora_the_mask_row_and_a_teacher_under_zero3_have_the_curve_of_one_rank(launch, folder) -> None:
    settings = {"model__lora": {"r": 4}, "training__num_steps": 6, "training__learning_rate": 0.02}
    settings |= {"objective__distill_weight": 0.5}
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "lora", **settings)
    one = train.train(parse_recipe(argv)).parent
    finish(launch("lora-zero3", training__deepspeed="zero3", **settings))
    assert_same_curve(folder / "lora-zero3", one)
    taught = ([line["distill_kl"] for line in metrics(out)] for out in (folder / "lora-zero3", one))
    assert next(taught) == pytest.approx(next(taught), rel=2e-6)
    found, want = (load_file(out / "model" / "model.safetensors") for out in (folder / "lora-zero3", one))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    mask = AutoTokenizer.from_pretrained(one / "model").mask_token_id
    before = load_file(one / "converted" / "model.safetensors")["model.embed_tokens.weight"]
    rows = found["model.embed_tokens.weight"] != before
    assert rows.any(1).nonzero().flatten().tolist() == [mask]


def test_lora_with_accumulation_under_zero3_survives_sigkill_to_the_bit(launch, folder) -> None:
    settings = {"model__lora": {"r": 4}, "training__learning_rate": 0.02, "training__deepspeed": "zero3"}
    settings |= {"training__micro_batch_size": 2}  # 2 ranks x 2 rows: accumulates twice
    finish(launch("lora-whole", **settings))
    kill_at_step(8, launch("lora-killed", **settings), folder / "lora-killed")
    assert "from step " in finish(launch("lora-killed", **settings))
    assert losses(folder / "lora-killed") == losses(folder / "lora-whole")
    for part in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        found, want = (load_file(folder / name / part) for name in ("lora-killed", "lora-whole"))
        assert all(torch.equal(found[name], want[name]) for name in want)
    # Accumulation changes nothing but rounding: the curve of one rank with all 8 rows at once.
    one = {**SETTINGS, "model__lora": {"r": 4}, "training__learning_rate": 0.02}
    train.train(parse_recipe(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "lora-one", **one)))
    found, want = losses(folder / "lora-whole"), losses(folder / "lora-one")
    assert list(found.values()) == pytest.approx(list(want.values()), rel=2e-5)


def test_a_mistake_is_told_once_and_not_by_every_rank(launch, folder) -> None:
    process = launch("never", training__deepspeed="zero2", data__train=folder / "none.jsonl")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("adapt train: error: data.train=") == 1
    assert "Traceback" not in output
    assert not (folder / "never").exists()


def test_one_process_without_the_launcher_runs_deepspeed_too(folder: Path, one_rank: Path, monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = {**SETTINGS, "training__deepspeed": "zero0"}
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "alone", **settings)
    subprocess.run([sys.executable, "-m", "adapt.cli", "train", *argv], check=True, capture_output=True)
    assert_same_curve(folder / "alone", one_rank)
    assert len(metrics(folder / "alone")) == 16
