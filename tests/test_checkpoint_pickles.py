"""A checkpoint is read as data: a pickle that would call anything else is refused before it runs, on any number of ranks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import recipe_argv, train_ranks, write_base, write_pairs

from adapt import cli
from adapt.training.checkpoints.pickles import check_checkpoint
from adapt.training.checkpoints.seal import COMPLETE, seal
from adapt.training.recipe import parse_recipe
from adapt.training.train import train


class Bomb:
    """Makes the file RAN in the current folder when it is unpickled."""

    def __init__(self, call: Callable[..., Any] = os.open, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments or ("RAN", os.O_CREAT)

    def __reduce__(self):
        return self.call, self.arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, pairs.jsonl and a run of one process that was stopped after a checkpoint at step 2."""
    folder = tmp_path_factory.mktemp("pickles")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    train(parse_recipe(argv(folder, "plain", training__num_steps=2)))
    shutil.rmtree(folder / "plain" / "model")
    return folder


def argv(folder: Path, out: str, **settings: Any) -> list[str]:
    settings = {"training__save_steps": 2, "training__num_steps": 3, "training__lr_scheduler": "constant", **settings}
    return recipe_argv(folder / "base", folder / "pairs.jsonl", folder / out, **settings)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That checkpoint, to be damaged; the current folder is the run's."""
    whole, checkpoints = folder / "whole", folder / "plain" / "checkpoints"
    if not whole.exists():
        shutil.copytree(checkpoints, whole)
    shutil.rmtree(checkpoints)
    shutil.copytree(whole, checkpoints)
    shutil.rmtree(folder / "plain" / "model", ignore_errors=True)
    monkeypatch.chdir(folder)
    return checkpoints / "checkpoint-2"


def resealed(checkpoint: Path) -> None:
    """COMPLETE is a plain checksum: whoever can write the checkpoint can write it."""
    facts = json.loads((checkpoint / COMPLETE).read_text())
    (checkpoint / COMPLETE).unlink()
    seal(checkpoint, {name: value for name, value in facts.items() if name != "files"})


def torch_saved(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def named_by_stack(path: Path) -> None:
    torch.save(Bomb(), path, pickle_protocol=4)


def stated(target: bytes) -> Callable[[Path], None]:
    """A pickle whose first act is BUILD on that; the rest is a dict."""

    def plant(path: Path) -> None:
        state = b"N}X\n\0\0\0__module__X\4\0\0\0thiss\x86"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in (("data.pkl", b"\x80\2" + target + state + b"b0}."), ("version", b"3\n")):
                archive.writestr(f"{path.stem}/{name}", content)

    return plant


def script(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", pickle.dumps({}, protocol=2)), ("constants.pkl", b""), ("version", b"3\n")):
            archive.writestr(f"{path.stem}/{name}", content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200] if path.exists() else b"PK\3\4")


LOSS_SCALER = b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (bare_pickle, "is not what torch.save writes"),
    "a pickle in torch's archive": (torch_saved(Bomb()), "would call posix.open"),
    "eval": (torch_saved(Bomb(eval, "open('RAN', 'w')")), "would call __builtin__.eval"),
    "getattr": (torch_saved({"state": [Bomb(getattr, "x", "upper")]}), "would call __builtin__.getattr"),
    "a function of torch": (torch_saved(Bomb(torch.load, "x")), "would call torch.serialization.load"),
    "a class of DeepSpeed that is not in a checkpoint": (
        torch_saved(Bomb(os.system, "touch RAN")),
        "would call posix.system",
    ),
    "deep inside": (torch_saved({"state": {0: {"exp_avg": [{"x": Bomb()}]}}}), "would call posix.open"),
    "named by the stack": (named_by_stack, "would call something by STACK_GLOBAL"),
    "the old format of torch": (
        torch_saved(Bomb(), _use_new_zipfile_serialization=False),
        "is not what torch.save writes",
    ),
    "TorchScript": (script, "is a TorchScript archive"),
    "a state for a class": (stated(LOSS_SCALER), "would call BUILD on deepspeed"),
    "a state for a function": (stated(b"ctorch._utils\n_rebuild_tensor_v2\n"), "would call BUILD on torch._utils"),
    "a state for a class by the memo": (stated(LOSS_SCALER + b"q\0" + b"0h\0"), "would call BUILD on deepspeed"),
    "a state for a class that lies below a mark": (stated(LOSS_SCALER + b"(0"), "would call BUILD on deepspeed"),
    "a state for a class that a call hands on": (
        stated(b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\1\0\0\0O\x85R" + LOSS_SCALER + b"\x86R"),
        "would call BUILD on an instance by numpy",
    ),
    "a stack that does not hold what is taken": (stated(b"("), "is damaged"),
    "empty": (lambda path: void(path.write_bytes(b"")), "is not what torch.save writes"),
    "an archive of nothing": (lambda path: void(path.write_bytes(b"PK\3\4" + b"\0" * 99)), "is damaged"),
    "cut short": (cut, "is damaged"),
}
FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "global_step2/mp_rank_00_model_states.pt",
         "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step2_universal/zero/model.norm.weight/fp32.pt"]  # fmt: skip


def void(_: object) -> None:
    return None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", BAD)
def test_a_planted_pickle_is_refused_and_does_not_run(name: str, file: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, (plant, said) = tmp_path / "checkpoint-2", BAD[name]
    (checkpoint / file).parent.mkdir(parents=True)
    plant(checkpoint / file)
    with pytest.raises(ValueError) as refused:
        check_checkpoint(checkpoint)
    assert f"{file} {said}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("RAN").exists()


@pytest.mark.parametrize("bomb_first", [True, False])
def test_of_two_pickles_of_one_name_the_one_is_checked_that_torch_reads(
    tmp_path, monkeypatch, bomb_first: bool
) -> None:
    """What one reader of an archive takes and what another takes may be two things."""
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb() if bomb_first else {}, tmp_path / "optimizer.pt")
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    with zipfile.ZipFile(tmp_path / "optimizer.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(name, pickle.dumps({} if bomb_first else Bomb(), protocol=2))
    with suppress(ValueError):
        check_checkpoint(tmp_path)
        torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert not Path("RAN").exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    "content",
    [[], {}, {"state": 1, "param_groups": 2}, {"python": (1,), "numpy": None, "cpu": [1]}, torch.ones(2)],
    ids=str,
)
def test_a_checkpoint_of_other_types_is_one_line(run: Path, file: str, content: Any, capsys) -> None:
    torch.save(content, run / file)
    resealed(run)
    code = cli.main(["train", *argv(run.parents[2], "plain")])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert code == 1, said
    assert said.splitlines()[-1].startswith("adapt train: error: training.output_dir: ")


@pytest.mark.parametrize("name", ["a pickle", "a pickle in torch's archive", "cut short"])
def test_a_run_does_not_go_on_from_a_planted_pickle(run: Path, name: str, capsys) -> None:
    plant, said = BAD[name]
    plant(run / "optimizer.pt")
    resealed(run)
    assert cli.main(["train", *argv(run.parents[2], "plain")]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not Path("RAN").exists()


@pytest.mark.parametrize(
    "file, to",
    [("optimizer.pt", "../../elsewhere.pt"), ("global_step2", "/tmp"), ("trainer_state.json", "/etc/passwd")],
)
def test_a_link_in_a_checkpoint_is_not_followed(run: Path, file: str, to: str) -> None:
    (run / file).unlink(missing_ok=True)
    (run / file).symlink_to(to)
    with pytest.raises(ValueError, match=f"{file} is a link"):
        check_checkpoint(run)


@pytest.mark.parametrize(
    "tag", ["../../evil", "/tmp/evil", "", "global_step2/../../x", "a\nb", "global_step2\nx", f"global_step{0:089}/../../x"]
)  # fmt: skip
@pytest.mark.parametrize("file", ["latest", "latest_universal"])
def test_the_name_of_deepspeeds_folder_does_not_lead_out_of_the_checkpoint(run: Path, file: str, tag: str) -> None:
    (run / file).write_text(tag)
    with pytest.raises(ValueError, match=f"{file} does not name a folder"):
        check_checkpoint(run)


def test_what_a_run_writes_is_taken(run: Path) -> None:
    check_checkpoint(run)
    check_checkpoint(None)
    assert (run / "optimizer.pt").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["zero2", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("zero0", "zero1", "zero3"))]
)
def test_what_deepspeed_writes_is_taken_and_a_pickle_among_it_runs_on_no_number_of_ranks(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    settings = {"training__deepspeed": name, "training__micro_batch_size": 4}
    log = folder / f"{name}.log"
    train_ranks(argv(folder, name, **settings, training__num_steps=2), log)
    shutil.rmtree(folder / name / "model")
    checkpoint = folder / name / "checkpoints" / "checkpoint-2"
    check_checkpoint(checkpoint)
    planted = min(checkpoint.glob("global_step2/*.pt"))
    torch.save({"module": Bomb()}, planted)
    resealed(checkpoint)
    for ranks in (2, 1):
        with pytest.raises(AssertionError, match=r"would call posix\.open, which no checkpoint of ours does"):
            train_ranks(argv(folder, name, **settings), log, ranks=ranks)
    assert not Path("RAN").exists()
