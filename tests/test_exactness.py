"""What a run survives to the bit: kills, damaged checkpoints, a full disk, bad losses, SIGTERM, a dead rank, changed data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import kill_resume
import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import at_step, losses, metrics, recipe_argv, train_ranks, write_base, write_pairs
from transformers import TrainerControl

from adapt import cli
from adapt.training import interruption, train, trainer
from adapt.training.checkpoints.seal import data_files
from adapt.training.engine import arguments as engine
from adapt.training.engine import build_locks
from adapt.training.recipe import parse_recipe

SAVES_ALL = {"training__save_steps": 1, "training__keep_checkpoints": 99}


def bad_at(step: int, factor: str = "math.nan") -> str:
    """In the last rank: the loss of that step is not a number, or that many times itself."""
    return f"""
import math, os
from adapt.training import trainer
real, is_last = trainer.DiffusionTrainer.compute_loss, rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
def broken(self, model, inputs, *args, **kwargs):
    if is_last and self.state.global_step == {step} - 1:
        inputs["loss_weight"] = inputs["loss_weight"] * {factor}
    return real(self, model, inputs, *args, **kwargs)
trainer.DiffusionTrainer.compute_loss = broken
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exactness")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def argv(folder: Path, tmp_path: Path):
    def argv(name: str, **overrides) -> list[str]:
        return recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / name, **overrides)

    return argv


@pytest.fixture
def run(argv, tmp_path: Path):
    """Trains into tmp_path/NAME, here, and returns that folder."""

    def run(name: str = "out", **overrides) -> Path:
        train.train(parse_recipe(argv(name, **overrides)))
        return tmp_path / name

    return run


@pytest.fixture
def launch(argv, tmp_path: Path):
    """Trains into tmp_path/NAME in processes of their own, to the end: (exit codes, what they said)."""

    def launch(name: str, ranks: int = 1, patch: str = "", **overrides) -> tuple[list[int | None], str]:
        log = tmp_path / f"{name}.log"
        codes = kill_resume.finish(kill_resume.start(argv(name, **overrides), ranks, log, patch), log)
        return codes, log.read_text()

    return launch


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- kills


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage, ranks, kills, num_steps",
    [
        (None, 1, 2, 30),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [(None, 1, 4, 60), ("zero2", 2, 2, 60), ("zero3", 2, 2, 60)]
        ),
    ],
)
def test_runs_killed_at_random_moments_have_the_curve_and_weights_of_one_never_killed(
    argv, launch, tmp_path: Path, stage, ranks, kills, num_steps
) -> None:
    settings = {"training__num_steps": num_steps, "training__save_steps": 3, "training__deepspeed": stage}
    settings["training__micro_batch_size"] = 8 // ranks
    codes, said = launch("whole", ranks, **settings)
    assert codes == [0] * ranks, said
    found = kill_resume.kill_and_resume(
        argv("killed", **settings), tmp_path / "killed", tmp_path / "whole", ranks, kills, seed=0
    )
    assert found.kills == kills
    assert found.identical


def test_resuming_with_another_accumulation_split_and_more_workers_gives_the_same_curve(run) -> None:
    settings = {"training__save_steps": 3, "objective__views": 2, "objective__complementary": True, "data__seq_len": 64}
    whole, out = run("whole", **settings), run("cut", **settings)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    run("cut", **settings, training__micro_batch_size=2, data__num_workers=2)
    assert list(losses(out).values()) == pytest.approx(list(losses(whole).values()), rel=1e-6)


# --- damaged checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file, harm, problem",
    [
        ("optimizer.pt", truncate, "optimizer.pt has [0-9,]+ bytes of [0-9,]+"),
        ("model.safetensors", flip_a_bit, "model.safetensors has another checksum than when it was saved"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
        ("COMPLETE", truncate, "COMPLETE is not the list of its files"),
        ("COMPLETE", lambda path: path.write_bytes(b""), "COMPLETE is not the list of its files"),
    ],
    ids=["truncated", "bit-flipped", "missing", "list-truncated", "list-empty"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, capsys, file, harm, problem) -> None:
    whole, out = run("whole", training__save_steps=2), run("cut", training__save_steps=2)
    shutil.rmtree(out / "model")
    harm(out / "checkpoints" / "checkpoint-6" / file)
    capsys.readouterr()
    run("cut", training__save_steps=2)
    said = [line for line in capsys.readouterr().err.splitlines() if " is damaged: " in line]
    assert len(said) == 1
    assert re.search(f"checkpoint-6 is damaged: {problem}; goes on from checkpoint-4", said[0])
    assert losses(out) == losses(whole)
    assert (out / "checkpoints" / "damaged-checkpoint-6").is_dir()
    assert equal(weights(out / "model"), weights(whole / "model"))


def test_a_damaged_shard_of_another_rank_is_found_too(run, launch, tmp_path: Path) -> None:
    settings = {"training__save_steps": 3, "training__deepspeed": "zero2", "training__micro_batch_size": 4}
    assert launch("out", 2, **settings)[0] == [0, 0]
    shutil.rmtree(tmp_path / "out" / "model")
    newest = tmp_path / "out" / "checkpoints" / "checkpoint-6"
    flip_a_bit(newest / "global_step6" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    codes, said = launch("out", 2, **settings)
    assert codes == [0, 0], said
    assert said.count("checkpoint-6 is damaged: global_step6/zero_pp_rank_1") == 1
    assert "from step 3" in said


def test_when_no_checkpoint_is_whole_one_error_says_so_and_nothing_is_removed(run) -> None:
    out = run(training__save_steps=3)
    shutil.rmtree(out / "model")
    for step in (3, 6):
        truncate(out / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"no checkpoint is left that is whole: .*checkpoint-6 is.*checkpoint-3 is.*remove"
    ):
        run(training__save_steps=3)
    assert len(list((out / "checkpoints").iterdir())) == 2


# --- a full disk


def fill_at(step: int) -> str:
    """In rank 0: from the save of that step on, no file may grow above 100 kB, as if the disk were full."""
    return f"""
import resource
from adapt.training import train, trainer
real = trainer.DiffusionTrainer._save_checkpoint
def full(self, *args):
    if rank == 0 and self.state.global_step == {step}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    real(self, *args)
trainer.DiffusionTrainer._save_checkpoint = full
"""


def test_a_full_disk_costs_the_new_checkpoint_and_the_next_start_goes_on_from_the_old(
    run, launch, tmp_path: Path
) -> None:
    settings = {"training__save_steps": 2, "training__keep_checkpoints": 1}
    whole = run("whole", **settings)
    codes, said = launch("full", patch=fill_at(4), **settings)
    assert codes == [1]
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "cannot be written" in line
    assert "go on from checkpoint-2, which is whole" in line
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["checkpoint-2"]
    codes, said = launch("full", **settings)
    assert codes == [0], said
    assert "from step 2" in said
    assert losses(tmp_path / "full") == losses(whole)


@pytest.mark.distributed
def test_a_full_disk_under_one_rank_ends_both_and_is_said_once(launch, tmp_path: Path) -> None:
    settings = {"training__save_steps": 2, "training__deepspeed": "zero2", "training__micro_batch_size": 4}
    codes, said = launch("full", 2, fill_at(4), **settings)
    assert codes == [1, 1]
    assert len([line for line in said.splitlines() if "cannot be written" in line]) == 1
    codes, said = launch("full", 2, **settings)
    assert codes == [0, 0], said
    assert "from step 2" in said


def test_a_filesystem_without_room_is_told_in_one_line(argv, launch, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path / "small"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small tmpfs here")
    try:
        codes, said = launch("small/out", **SAVES_ALL, training__num_steps=20)
        whole = sorted((tmp_path / "small" / "out" / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)
    assert codes == [1]
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert f"go on from {whole[-1].name}, which is whole" in line
    assert "Traceback" not in said


# --- bad losses


def test_a_loss_that_is_no_number_stops_the_run_with_the_batch_and_before_a_checkpoint_holds_it(
    launch, tmp_path
) -> None:
    codes, said = launch("out", patch=bad_at(5), training__save_steps=2)
    assert codes == [1]
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "training.on_bad_loss=stop: step 5: loss nan, grad_norm nan; rows 32-39, examples " in line
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    (told,) = [json.loads(line) for line in (tmp_path / "out" / "bad_steps.jsonl").read_text().splitlines()]
    assert told["rows"] == list(range(32, 40))
    texts = {json.dumps(example["target"]) for example in told["examples"]}
    assert len(texts) > 8
    assert all(example["target"].endswith("</s>") for example in told["examples"])


def test_a_bad_step_between_logs_reaches_no_checkpoint_either(launch, tmp_path: Path) -> None:
    codes, said = launch("out", patch=bad_at(4), training__save_steps=6, training__logging_steps=6)
    assert codes == [1]
    assert "step 4: loss nan" in said
    assert not list(tmp_path.glob("out/checkpoints/checkpoint-*"))
    codes, said = launch("late", patch=bad_at(5), training__logging_steps=4)  # the run ends before its next log
    assert codes == [1]
    assert "step 5: loss nan" in said
    assert not (tmp_path / "late" / "model").exists()


@pytest.fixture(scope="module")
def skipped_plainly(folder: Path) -> list[dict]:
    """Metrics of one process without DeepSpeed that skips step 5."""
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "plain", training__on_bad_loss="skip")
    train_ranks(argv, folder / "plain.log", ranks=1, patch=bad_at(5))
    return metrics(folder / "plain")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage, ranks, precision",
    [
        (None, 1, "fp32"),
        (None, 1, "bf16"),
        ("zero2", 2, "fp32"),
        ("zero3", 1, "bf16"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                ("zero0", 2, "fp32"),
                ("zero0", 1, "bf16"),
                ("zero1", 2, "fp32"),
                ("zero1", 1, "bf16"),
                ("zero2", 1, "bf16"),
                ("zero3", 2, "fp32"),
            ]
        ),
    ],
)
def test_a_skipped_step_leaves_the_weights_and_is_counted(
    launch, skipped_plainly, tmp_path: Path, stage, ranks, precision
) -> None:
    settings = {**SAVES_ALL, "training__deepspeed": stage, "training__precision": precision}
    settings |= {"training__on_bad_loss": "skip", "training__micro_batch_size": 4 // ranks}
    codes, said = launch("out", ranks, bad_at(5), **settings)
    assert codes == [0] * ranks, said
    before, after, later = (weights(tmp_path / "out" / "checkpoints" / f"checkpoint-{k}") for k in (4, 5, 6))
    assert equal(before, after)
    assert not equal(after, later)
    assert all(torch.isfinite(weight).all() for weight in later.values())
    lines = metrics(tmp_path / "out")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 1]
    assert [math.isfinite(line["loss"]) for line in lines] == [True] * 4 + [False, True]
    assert said.count("step 5: loss nan") == 1
    rates = [line["learning_rate"] for line in lines]
    assert len(set(rates)) == 6  # the schedule goes on
    if precision == "fp32":  # and what follows is the same under every engine
        assert lines[5]["loss"] == pytest.approx(skipped_plainly[5]["loss"], rel=2e-6)
        assert rates == pytest.approx([line["learning_rate"] for line in skipped_plainly])


def test_a_deepspeed_config_that_lets_bad_gradients_through_is_refused(argv, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"bf16": {"enabled": "auto", "check_grad_overflow": False}}))
    recipe = parse_recipe(argv("out", training__deepspeed=str(config)))
    with pytest.raises(
        ValueError, match=r"training.on_bad_loss=stop: deepspeed.bf16.check_grad_overflow=false in .*remove"
    ):
        engine.training_arguments(recipe)


def test_losses_of_good_steps_are_averaged_without_the_skipped_one(launch, tmp_path: Path) -> None:
    settings = {"training__on_bad_loss": "skip"}
    assert launch("each", patch=bad_at(5), **settings)[0] == [0]
    assert launch("third", patch=bad_at(5), training__logging_steps=3, **settings)[0] == [0]
    each, third = losses(tmp_path / "each"), metrics(tmp_path / "third")[-1]
    assert third["step"] == 6
    assert third["loss"] == pytest.approx((each[4] + each[6]) / 2, rel=1e-6)
    assert third["nelbo"] == pytest.approx(third["loss"], rel=0.2)
    assert third["skipped_steps"] == 1


def test_other_optimizers_skip_too(launch, tmp_path: Path) -> None:
    settings = {**SAVES_ALL, "training__on_bad_loss": "skip", "training__optimizer": "adafactor"}
    codes, said = launch("out", patch=bad_at(5), **settings)
    assert codes == [0], said
    before, after, later = (weights(tmp_path / "out" / "checkpoints" / f"checkpoint-{k}") for k in (4, 5, 6))
    assert equal(before, after)
    assert not equal(after, later)


@pytest.mark.parametrize("micro", [8, 2])
def test_an_exploding_loss_is_skipped_and_a_resumed_run_has_the_same_limit(launch, tmp_path: Path, micro: int) -> None:
    settings = {"training__on_bad_loss": "skip", "training__max_loss_ratio": 3.0, "training__num_steps": 14}
    settings |= {**SAVES_ALL, "training__micro_batch_size": micro}
    codes, said = launch("out", patch=bad_at(12, "100"), **settings)
    assert codes == [0], said
    (line,) = [line for line in said.splitlines() if "step 12" in line]
    assert "is above training.max_loss_ratio=3.0 x median = " in line
    assert [line["skipped_steps"] for line in metrics(tmp_path / "out")] == [0] * 11 + [1] * 3
    before, after = (weights(tmp_path / "out" / "checkpoints" / f"checkpoint-{k}") for k in (11, 12))
    assert equal(before, after)
    whole = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    for step in (11, 12, 13, 14):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"checkpoint-{step}")
    assert launch("out", patch=bad_at(12, "100"), **settings)[0] == [0]
    assert losses(tmp_path / "out") == whole


# --- SIGTERM


TERMINATED = (
    "[child.terminate() for child in psutil.Process().children(recursive=True)]; signal.raise_signal(signal.SIGTERM)"
)


@pytest.mark.distributed
@pytest.mark.parametrize("stage, ranks", [(None, 1), ("zero2", 2)])
def test_sigterm_saves_on_all_ranks_alike_and_a_restart_goes_on(
    argv, run, launch, tmp_path: Path, stage, ranks
) -> None:
    settings = {"training__num_steps": 14, "training__deepspeed": stage, "training__micro_batch_size": 8 // ranks}
    settings |= {"data__num_workers": 2}  # no training.save_steps: a checkpoint all the same
    assert launch("whole", ranks, **settings)[0] == [0] * ranks
    # One rank and the loader processes that it started.
    codes, said = launch("out", ranks, at_step(5, (ranks - 1,), TERMINATED), **settings)
    assert codes == [143] * ranks, said
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert said.count(f"adapt train: SIGTERM: saved step {checkpoint.name[11:]}; the same command goes on\n") == 1
    assert "Traceback" not in said
    codes, said = launch("out", ranks, **settings)
    assert codes == [0] * ranks, said
    assert f"from step {checkpoint.name.split('-')[1]} " in said
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert equal(weights(tmp_path / "out" / "model"), weights(tmp_path / "whole" / "model"))


def ctrl_c_in_step(step: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    real = trainer.DiffusionTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.DiffusionTrainer, "compute_loss", interrupted)


def test_ctrl_c_saves_the_step_in_one_line_and_the_same_command_goes_on(
    argv, run, tmp_path, monkeypatch, capsys
) -> None:
    whole = run("whole")
    with monkeypatch.context() as patch:
        ctrl_c_in_step(3, patch)
        assert cli.main(["train", *argv("out")]) == 130
    assert capsys.readouterr().err.endswith("\nadapt train: saved step 3; the same command goes on\n")
    assert cli.main(["train", *argv("out")]) == 0
    assert "from step 3 " in capsys.readouterr().err
    assert losses(tmp_path / "out") == losses(whole)
    assert equal(weights(tmp_path / "out" / "model"), weights(whole / "model"))


def test_a_second_ctrl_c_ends_at_once(argv, tmp_path, monkeypatch, capfd) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where this runs in the background of a script
    ctrl_c_in_step(3, monkeypatch, times=2)
    assert cli.main(["train", *argv("out")]) == 130
    said = capfd.readouterr().err
    assert "adapt train: ends after this step; Ctrl-C again ends at once\n" in said
    assert said.endswith("\nadapt train: error: interrupted\n")
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is before


# --- checkpoints by time


class Clock:
    """Four minutes pass whenever it is looked at: as training begins, once a step, and after a checkpoint."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 240
        return self.now


def test_a_run_of_ones_own_recipe_saves_every_ten_minutes_and_goes_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "time", Clock())
    whole, out = run("whole"), run("out")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    run("out")
    assert losses(out) == losses(whole)
    assert equal(weights(out / "model"), weights(whole / "model"))
    for name, off in {"never": {"save_minutes": None}, "none": {"save_minutes": 0}, "also": {"save_steps": 0}}.items():
        found = run(
            name, training__num_steps=4, **{f"training__{key}": json.dumps(value) for key, value in off.items()}
        )
        assert not (found / "checkpoints").exists()


def test_rank_zero_alone_says_when_and_an_optimizer_on_nvme_is_never_saved() -> None:
    def arguments(rank: int, device: str | None) -> SimpleNamespace:
        config = {"zero_optimization": {"offload_optimizer": {"device": device}}} if device else {}
        engine = {"deepspeed": device, "hf_deepspeed_config": SimpleNamespace(config=config)}
        return SimpleNamespace(device=torch.device("cpu"), world_size=2, should_save=rank == 0, **engine)

    for rank, device, asked in ((0, None, [0, 1]), (1, None, [0, 0]), (0, "cpu", [0, 1]), (0, "nvme", [0, 0])):
        requests = interruption.Requests(arguments(rank, device), save_minutes=1e-9)
        assert requests.of_this_rank().tolist() == asked
    requests.signum = signal.SIGTERM  # of the last one, whose checkpoint would be no good
    requests.share(requests.of_this_rank())
    control = TrainerControl()
    requests.on_step_end(None, None, control)
    assert (control.should_training_stop, control.should_save) == (True, False)
    with pytest.raises(interruption.Interrupted, match="SIGTERM: ended at step 7; nothing is saved, as DeepSpeed"):
        requests.raise_if_stopped(7)


# --- what ran


def test_a_checkpoint_holds_the_recipe_the_versions_and_the_data_it_came_from(run, folder: Path) -> None:
    out = run(training__save_steps=3)
    for path in (out / "checkpoints" / "checkpoint-3" / "COMPLETE", out / "versions.json"):
        about = json.loads(path.read_text())
        assert about["versions"]["torch"] == torch.__version__
        assert about["versions"].keys() >= {"python", "git", "transformers", "deepspeed", "peft", "adapt-dlm"}
        assert about["data"] == data_files(str(folder / "pairs.jsonl"))
    recipe = parse_recipe(["--config", str(out / "checkpoints" / "checkpoint-3" / "recipe.yaml")])
    assert recipe.training.save_steps == 3


def test_data_that_changed_is_noticed_and_a_copy_with_another_date_is_not(
    run, folder: Path, tmp_path: Path, capsys
) -> None:
    data = shutil.copyfile(folder / "pairs.jsonl", tmp_path / "pairs.jsonl")
    settings = {"data__train": data, "training__save_steps": 3}
    out = run(**settings)
    shutil.rmtree(out / "model")
    os.utime(data, (0, 0))
    run(**settings)
    shutil.rmtree(out / "model")
    text = data.read_text()
    data.write_text(text.replace("dog", "cat"))  # as many bytes
    with pytest.raises(ValueError, match=r"data.train=.*pairs.jsonl: has changed since the run in .*put it back"):
        run(**settings)
    data.write_text(text)
    manifest = out / "checkpoints" / "checkpoint-6" / "COMPLETE"
    about = json.loads(manifest.read_text())
    about["versions"]["torch"] = "2.0.0"
    manifest.write_text(json.dumps(about))
    run(**settings)
    assert f"checkpoint-6 was written with torch 2.0.0, now {torch.__version__}" in capsys.readouterr().err


def test_samples_of_a_large_file_see_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(bytes(6 << 20))
    before = data_files(str(path))
    for place in (0, (6 << 20) - 1):
        content = bytearray(6 << 20)
        content[place] = 1
        path.write_bytes(content)
        assert data_files(str(path)) != before


# --- a build that was killed


def test_a_lock_left_by_a_killed_build_is_told_of_before_deepspeed_waits_for_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    build_locks.check_build_locks()
    with lock.open("w"):
        build_locks.check_build_locks()
    assert capsys.readouterr().err == ""
    build_locks.check_build_locks()
    assert f"{lock} was left 0 minutes ago" in capsys.readouterr().err
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(ValueError, match=rf"training.deepspeed: {lock} was left 60 minutes ago .*remove that file"):
        build_locks.check_build_locks()
