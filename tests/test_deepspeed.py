"""Two ranks under the deepspeed launcher, on CPU: the curve of one rank, resume to the bit, folders that load."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_trainer import losses_so_far
from training_fixtures import losses, metrics, recipe_argv, write_base, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt import trainer
from adapt.config import parse_recipe

pytestmark = pytest.mark.distributed
TRAIN = Path(__file__).resolve().parents[1] / "recipes" / "train.py"
SETTINGS = {"training__num_steps": 16, "training__save_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def launch(folder: Path, free_port: int, monkeypatch: pytest.MonkeyPatch):
    """Starts two ranks on recipes/train.py; the launcher's process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("MASTER_PORT", raising=False)

    def launch(name: str, **overrides) -> subprocess.Popen[str]:
        settings = {**SETTINGS, "training__micro_batch_size": 4, **overrides}
        argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / name, **settings)
        command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port), str(TRAIN)]
        return subprocess.Popen(
            [sys.executable, *command, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return launch


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Path:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "one", **SETTINGS)
    return trainer.train(parse_recipe(argv)).parent


def assert_same_curve(found: Path, want: Path) -> None:
    assert list(losses(found).values()) == pytest.approx(list(losses(want).values()), rel=2e-6)


def test_zero2_on_two_ranks_has_the_curve_of_one_and_survives_sigkill_to_the_bit(launch, folder, one_rank) -> None:
    output = finish(launch("zero2", training__deepspeed="zero2"))
    assert output.count("16 steps of 8 rows on 2 ranks") == 1  # rank 0 alone speaks
    assert "Warning" not in output
    assert_same_curve(folder / "zero2", one_rank)
    assert len(AutoModelForCausalLM.from_pretrained(folder / "zero2" / "model").state_dict()) > 10

    process = launch("killed", training__deepspeed="zero2")
    while process.poll() is None and max(losses_so_far(folder / "killed"), default=0) < 8:
        time.sleep(0.002)
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in started:
        one.kill()
    psutil.wait_procs(started)
    process.communicate()
    assert not (folder / "killed" / "model").exists(), "it ended before it could be killed"
    assert "from step " in finish(launch("killed", training__deepspeed="zero2"))
    assert losses(folder / "killed") == losses(folder / "zero2")
    found, want = (load_file(folder / name / "model" / "model.safetensors") for name in ("killed", "zero2"))
    assert all(torch.equal(found[name], want[name]) for name in want)

    # Its checkpoints are those of two ranks: one rank may not go on from them.
    shutil.rmtree(folder / "killed" / "model")
    argv = recipe_argv(
        folder / "base", folder / "pairs.jsonl", folder / "killed", training__deepspeed="zero2", **SETTINGS
    )
    from adapt.resume import newest_checkpoint

    with pytest.raises(ValueError, match=r"training.deepspeed=zero2: .* was written by 2 ranks and this run has 1"):
        newest_checkpoint(parse_recipe(argv), world_size=1)


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


def test_lora_and_the_mask_row_under_zero3_have_the_curve_of_one_rank(launch, folder) -> None:
    settings = {"model__lora": {"r": 4}, "training__num_steps": 6, "training__learning_rate": 0.02}
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "lora", **settings)
    one = trainer.train(parse_recipe(argv)).parent
    finish(launch("lora-zero3", training__deepspeed="zero3", **settings))
    assert_same_curve(folder / "lora-zero3", one)
    found, want = (load_file(out / "model" / "model.safetensors") for out in (folder / "lora-zero3", one))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    mask = AutoTokenizer.from_pretrained(one / "model").mask_token_id
    before = load_file(one / "converted" / "model.safetensors")["model.embed_tokens.weight"]
    rows = found["model.embed_tokens.weight"] != before
    assert rows.any(1).nonzero().flatten().tolist() == [mask]


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
