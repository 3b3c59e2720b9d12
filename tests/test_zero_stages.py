"""Every ZeRO stage and offload on two CPU ranks has the curve of one rank; a checkpoint goes on on another number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import kill_resume
import pytest
from training_fixtures import losses, recipe_argv, train_ranks, write_base, write_pairs

from adapt.files import marks
from adapt.training import train
from adapt.training.engine import arguments as engine
from adapt.training.engine import nvme
from adapt.training.recipe import parse_recipe

# A rank's share of a weight goes to NVMe from 1 MiB on: 512 x 1024 / 2 float32.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    write_base(folder / "base", **WIDE)
    write_base(folder / "small")
    write_pairs(folder / "pairs.jsonl")
    return folder


def argv(folder: Path, out: str, **settings) -> list[str]:
    settings = {"training__num_steps": 4, "training__adam_beta2": 0.95, "training__weight_decay": 0.1, **settings}
    return recipe_argv(folder / settings.pop("base", "base"), folder / "pairs.jsonl", folder / out, **settings)


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[int, float]:
    train.train(parse_recipe(argv(folder, "one")))
    return losses(folder / "one")


@pytest.fixture(scope="module")
def operators() -> None:
    """Compiled before a launch that needs them: three minutes on two free cores, more than a launch may take on busy ones."""
    builders = ["CPUAdamBuilder", *([] if nvme.missing_for_nvme() else ["AsyncIOBuilder"])]
    build = "; ".join(f"op_builder.{name}().load()" for name in builders)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", f"from deepspeed.ops import op_builder; {build}"]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert built.returncode == 0, built.stdout + built.stderr


EXHAUSTIVE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("zero0", "zero2_offload", "zero3_offload")]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero1", *EXHAUSTIVE])
def test_two_ranks_have_the_curve_of_one_process_without_deepspeed(
    name: str, folder: Path, one_rank: dict[int, float], request: pytest.FixtureRequest
) -> None:
    if "offload" in name:
        request.getfixturevalue("operators")
    settings = {"training__deepspeed": name, "training__micro_batch_size": 4}
    train_ranks(argv(folder, name, **settings), folder / f"{name}.log")
    assert losses(folder / name) == pytest.approx(one_rank, rel=1e-5)


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.usefixtures("operators")
def test_nvme_offload_has_that_curve_too_writes_the_weights_to_the_folder_and_cleans_up(
    folder: Path, one_rank: dict[int, float]
) -> None:
    if missing := nvme.missing_for_nvme():
        pytest.skip(missing)
    swap = folder / "swap"
    settings = {"training__deepspeed": "zero3_nvme", "training__nvme_path": swap, "training__micro_batch_size": 4}
    log, seen = folder / "nvme.log", set()
    processes = kill_resume.start(argv(folder, "nvme", **settings), 2, log)
    while any(process.is_alive() for process in processes):
        for file in swap.glob("adapt-*-rank?/swap/zero_stage_3/*/rank?/*"):
            seen.add(f"{file.parent.name} {file.parent.parent.name}")
        time.sleep(0.1)
    assert kill_resume.finish(processes, log) == [0, 0], log.read_text()
    assert losses(folder / "nvme") == pytest.approx(one_rank, rel=1e-5)
    assert {"rank0 float32params", "rank1 float32params", "rank0 optimizer", "rank1 optimizer"} <= seen
    assert list(swap.iterdir()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"deepspeed": "zero3_nvme"},
            "training.deepspeed=zero3_nvme: needs training.nvme_path, a folder on a fast local",
        ),
        ({"deepspeed": "zero3", "nvme_path": "x"}, "training.nvme_path=x: training.deepspeed=zero3 puts nothing there"),
        (
            {"deepspeed": "zero3_nvme", "nvme_path": "x", "save_steps": "5"},
            "training.save_steps=5: DeepSpeed does not read an optimizer on NVMe back rightly, so a run cannot resume",
        ),
        (
            {"deepspeed": "zero2_offload", "optimizer": "adamw_8bit"},
            "training.optimizer=adamw_8bit: training.deepspeed=zero2_offload offloads the optimizer, which DeepSpeed does for",
        ),
    ],
)
def test_offload_that_cannot_work_is_refused_by_name(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    settings = {f"training__{name}": value for name, value in settings.items()}
    recipe = parse_recipe(recipe_argv(tmp_path, tmp_path / "d.jsonl", tmp_path / "out", **settings))
    with pytest.raises(ValueError) as refused:
        engine.training_arguments(recipe)
    assert str(refused.value).startswith(message)


def test_nvme_without_libaio_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    settings = {"training__deepspeed": "zero3_nvme", "training__nvme_path": tmp_path / "swap"}
    recipe = parse_recipe(recipe_argv(tmp_path, tmp_path / "d.jsonl", tmp_path / "out", **settings))
    with pytest.raises(
        ValueError, match=r"async_io needs libaio, which is not here; apt-get install libaio-dev .*, or use"
    ):
        engine.training_arguments(recipe)
    assert not (tmp_path / "swap").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["zero2", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("zero1", "zero3"))]
)
def test_a_run_of_two_ranks_goes_on_on_one_and_then_on_two_as_if_it_had_never_stopped(name: str, folder: Path) -> None:
    schedule = {"base": "small", "training__lr_scheduler": "constant", "training__learning_rate": 0.01}
    whole = argv(folder, f"whole-{name}", **schedule, training__num_steps=12)
    train.train(parse_recipe(whole))

    out, log = f"moved-{name}", folder / f"moved-{name}.log"
    schedule |= {"training__save_steps": 4, "training__deepspeed": name, "training__micro_batch_size": 4}
    train_ranks(argv(folder, out, **schedule, training__num_steps=4), log)
    shutil.rmtree(folder / out / "model")
    said = train_ranks(argv(folder, out, **schedule, training__num_steps=8), log, ranks=1)
    assert "checkpoint-4: written by 2 ranks, read by 1; converting it once" in said
    shutil.rmtree(folder / out / "model")
    said = train_ranks(argv(folder, out, **schedule, training__num_steps=12), log)
    assert "checkpoint-8: written by 1 rank, read by 2; converting it once" in said
    assert losses(folder / out) == pytest.approx(losses(folder / f"whole-{name}"), rel=1e-5)


def test_a_second_start_does_not_take_the_disk_from_a_run_that_lives(tmp_path: Path) -> None:
    marks.begin(tmp_path / "adapt-x-rank0", marks.new_run())
    (tmp_path / "adapt-x-rank0" / "weights").write_text("in use")
    hold = "import sys; from pathlib import Path; from adapt.files.outputs import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".adapt-x-rank0.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"training.nvme_path=.*: another run writes to it"):
            nvme._swap_folder(tmp_path, "adapt-x-rank0")
        assert (tmp_path / "adapt-x-rank0" / "weights").read_text() == "in use"
        other.communicate()
