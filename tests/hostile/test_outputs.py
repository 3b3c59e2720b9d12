"""Where verbs write: every kind of place that is taken, or that nothing can be written in, is refused before work begins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attack import attack, contents, run
from safetensors.torch import load_file, save_file

# A call of each verb that writes: what stands for the place, and the setting that names it.
WRITERS: dict[str, tuple[list[str], str]] = {
    "convert": (["convert", "base", "{}"], "out="),
    "train": (["train", "--config", "recipe.yaml", "--training.output_dir", "{}"], "training.output_dir="),
    "export": (["export", "checkpoint", "{}"], "out="),
    "compare": (["compare", "--base", "base", "--adapted", "checkpoint", "--tasks", "pairs", "--include_path", "tasks",
                 "--out", "{}"], "out="),
    "lm_eval": (["lm_eval", "--model", "adapt", "--model_args", "pretrained=checkpoint", "--tasks", "pairs", "--include_path", "tasks",
                 "--output_path", "{}"], "output_path="),
    "quickstart": (["quickstart", "--fast", "--out", "{}"], "out="),
    "plot": (["plot", "run", "--out", "{}"], "out="),
}  # fmt: skip
NEW = ("convert", "export", "compare")  # verbs that make a folder of their own


def call(verb: str, place: object) -> list[str]:
    return [argument.format(place) for argument in WRITERS[verb][0]]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _file(path: Path) -> None:
    path.write_text("mine")


def _link_to_a_file(path: Path) -> None:
    path.with_name("linked").write_text("mine")
    path.symlink_to("linked")


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/full")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


TAKEN = [_pipe, _file, _link_to_a_file, _link_to_nothing, _link_to_a_device, _circle]


@pytest.mark.parametrize("put", TAKEN, ids=lambda put: put.__name__.strip("_"))
@pytest.mark.parametrize("verb", WRITERS)
def test_what_is_no_folder_is_no_place(yard: Path, verb: str, put: Callable[[Path], None]) -> None:
    name = "place.png" if verb == "plot" else "place"
    put(yard / name)
    attack(yard, call(verb, name), WRITERS[verb][1])


PLACES = [
    "", " ", "pairs.jsonl/x", "pairs.jsonl/x/y", "pairs.jsonl/../pairs.jsonl/x", "/proc/place", "/proc/1/x/y", "/sys/place",
    "/dev/null/x", "/dev/stdout/x", 300 * "x", 250 * "x", "a\0b", "x/" + 300 * "y",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ascii(place)[:20])
@pytest.mark.parametrize("verb", WRITERS)
def test_a_place_where_nothing_can_be_written_is_refused_first(yard: Path, verb: str, place: str) -> None:
    place = f"{place}.png" if verb == "plot" and place.strip() else place
    attack(yard, call(verb, place), "" if "\0" in place else WRITERS[verb][1])


@pytest.mark.parametrize("place", [".", "tasks", "yard", "base"])
@pytest.mark.parametrize("verb", NEW)
def test_a_folder_that_is_there_is_not_written_into(yard: Path, verb: str, place: str) -> None:
    (yard / "yard").mkdir()
    attack(yard, call(verb, place), WRITERS[verb][1])


@pytest.mark.parametrize("place", [".", "tasks", "yard", "base"])
def test_overwrite_replaces_no_folder_that_is_no_report(yard: Path, place: str) -> None:
    (yard / "yard").mkdir()
    (yard / "yard" / "report.json").write_text("{}")
    attack(yard, [*call("compare", place), "--overwrite"], "is no report that we wrote")


MADE = ("base", "data", "control", "adapted-init", "adapted", "report", "quickstart.json")


@pytest.mark.parametrize("options", [[], ["--fresh"], ["--fresh", "--seed", "2"]], ids=" ".join)
@pytest.mark.parametrize("name", MADE)
def test_a_quickstart_takes_no_folder_for_its_own(yard: Path, name: str, options: list[str]) -> None:
    (yard / "project").mkdir()
    if name.endswith(".json"):
        (yard / "project" / name).write_text("{}")
    else:
        (yard / "project" / name).mkdir()
        (yard / "project" / name / "thesis.txt").write_text("mine")
    (yard / "project" / "thesis.txt").write_text("mine")
    attack(yard, [*call("quickstart", "project"), *options], "out=project")


TRAINED = [
    "config.yaml",
    "versions.json",
    "metrics.jsonl",
    "samples.jsonl",
    "bad_steps.jsonl",
    ".lock",
    ".adapt.json",
    "checkpoints",
]


@pytest.mark.parametrize(
    "put", [_file, _link_to_a_file, _link_to_nothing, _pipe], ids=lambda put: put.__name__.strip("_")
)
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_replaces_no_file_of_a_user(yard: Path, name: str, put: Callable[[Path], None]) -> None:
    (yard / "run").mkdir()
    put(yard / "run" / name)
    attack(yard, call("train", "run"), "training.output_dir=run")


@pytest.mark.parametrize(
    "name",
    ["model", "adapter", "converted", ".model.incomplete", "checkpoints/checkpoint-2", "checkpoints/checkpoint-1000"],
)
def test_a_run_takes_no_folder_of_a_user_for_its_own(yard: Path, name: str) -> None:
    (yard / "run" / name).mkdir(parents=True)
    (yard / "run" / name / "thesis.txt").write_text("mine")
    model = [] if name != "converted" else ["--model.base", "base"]
    attack(yard, [*call("train", "run"), *model], may_write=())


def test_a_figure_replaces_a_figure_alone(yard: Path) -> None:
    assert run(yard, call("train", "run")).code == 0
    assert run(yard, call("plot", "mine.png")).code == 0
    assert run(yard, call("plot", "mine.png")).code == 0
    (yard / "mine.svg").write_text("<svg>mine</svg>")
    attack(yard, call("plot", "mine.svg"), "is no figure of `adapt plot`")
    (yard / "run" / "nelbo.png").write_text("mine")
    attack(yard, ["plot", "run"], "is no figure of `adapt plot`")


# -- weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("verb", ["convert", "export"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_no_numbers_are_not_passed_on(yard: Path, verb: str, name: str, value: float) -> None:
    path = yard / ("base" if verb == "convert" else "checkpoint") / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    attack(yard, call(verb, "out"))


# -- results that are kept


def test_lm_eval_saves_what_it_measured_and_keeps_it_where_it_cannot(yard: Path, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert run(yard, [*call("lm_eval", "results"), "--limit", "2"]).code == 0
    (saved,) = (yard / "results").rglob("results_*.json")
    assert json.loads(saved.read_text())["results"]["pairs"]
    assert list((tmp_path / "temporary").iterdir()) == []
    # The name of a file, as lm-eval takes it.
    assert run(yard, [*call("lm_eval", "results.json"), "--limit", "2"]).code == 0
    assert [path.is_file() for path in yard.glob("results_*.json")] == [True]
    assert not (yard / "results.json").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapt_eval.lm_eval_command.write_whole", full)
    before = contents(yard)
    answer = run(yard, [*call("lm_eval", "results"), "--limit", "2"])
    (kept,) = (tmp_path / "temporary").rglob("results_*.json")
    assert answer.code == 1
    assert (
        "output_path=results: could not be written ([Errno 28] No space left on device); the results are in"
        in answer.line
    )
    assert str(kept.parents[1]) in answer.line
    assert contents(yard) == before


def test_answers_of_one_model_are_not_another_ones(yard: Path) -> None:
    ours = [*call("lm_eval", "results"), "--limit", "2", "--use_cache", "cache/answers"]
    (yard / "cache").mkdir()
    assert run(yard, ours).code == 0
    assert run(yard, ours).code == 0
    attack(
        yard,
        [*ours, "--model_args", "pretrained=checkpoint,seed=2"],
        "holds the answers of another model (model_args differs)",
    )
    weights = load_file(yard / "checkpoint" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, yard / "checkpoint" / "model.safetensors")
    attack(yard, ours, "holds the answers of another model (checkpoint/model.safetensors differs)")
    (yard / "cache" / "answers.model.json").unlink()
    attack(yard, ours, "no answers.model.json says of which model")


def test_a_finished_run_is_the_same_whatever_stands_beside_it(yard: Path) -> None:
    assert run(yard, call("train", "run")).code == 0
    shutil.copytree(yard / "run" / "model", yard / "run" / "mine")
    (yard / "run" / "notes.md").write_text("mine")
    before = contents(yard)
    assert run(yard, call("train", "run")).code == 0
    assert contents(yard) == before
