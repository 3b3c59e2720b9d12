"""A run's folder in a stranger's hands: nothing foreign is removed, no wrong weights come out, and every edit is told in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_marks import tree
from training_fixtures import recipe_argv, write_base, write_pairs

from adapt import cli
from adapt.files import marks
from adapt.files.finite import check_folder_finite, first_not_finite_parameter
from adapt.files.provenance import model_files
from adapt.training import train
from adapt.training.checkpoints import resume, run_folder
from adapt.training.recipe import Recipe, parse_recipe

STEPS = {"training__num_steps": 4, "training__save_steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, pairs.jsonl, and run/: four steps with checkpoints 2 and 4, whose model/ was removed."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", rows=16)
    train.train(parse_recipe(argv(folder)))
    shutil.rmtree(folder / "run" / "model")
    return folder


def argv(folder: Path, **overrides: Any) -> list[str]:
    small = {"training__global_batch_size": 2, "training__micro_batch_size": 2, **STEPS, **overrides}
    return recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "run", **small)


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, at the place where the run was: a run's base and data are known by their paths."""
    aside = made.with_name("aside")
    shutil.copytree(made, aside, symlinks=True)
    yield made
    shutil.rmtree(made)
    aside.rename(made)


def recipe(folder: Path, **overrides: Any) -> Recipe:
    return parse_recipe(argv(folder, **overrides))


def reseal(checkpoint: Path) -> None:
    """What an attacker can do as well as we: COMPLETE made to agree with the files."""
    manifest = json.loads((checkpoint / "COMPLETE").read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "COMPLETE").write_text(json.dumps(manifest))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused `adapt train` says."""
    capsys.readouterr()
    assert cli.main(["train", *arguments]) == 1
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


# -- theirs


def foreign_checkpoint(run: Path) -> str:
    (run / "checkpoints" / "checkpoint-1000").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-1000" / "pytorch_model.bin").write_text("weights")
    return "checkpoints/checkpoint-1000 was not written by this run"


def config_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("# mine\nmodel: {}\n")
    return "config.yaml there is not of this run"


def metrics_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    (run / "metrics.jsonl").symlink_to(run.parent / "pairs.jsonl")
    return "metrics.jsonl there is not of this run"


def versions_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / "versions.json").write_text("{}")
    return "versions.json there is not of this run"


def staged_of_ones_own(run: Path) -> str:
    (run / ".model.incomplete").mkdir(parents=True)
    (run / ".model.incomplete" / "thesis.txt").write_text("mine")
    return ".model.incomplete/ there holds what this run did not write"


def adapter_of_ones_own(run: Path) -> str:
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "thesis.txt").write_text("mine")
    return "adapter/ there holds what this run did not write"


def checkpoints_that_are_a_file(run: Path) -> str:
    if (run / "checkpoints").exists():
        shutil.rmtree(run / "checkpoints")
    run.mkdir(exist_ok=True)
    (run / "checkpoints").write_text("mine")
    return "checkpoints there is no folder"


def lock_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / ".lock").write_text("mine")
    return "is no lock of ours"


def mark_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / marks.MARK).write_text("{}")
    return "there is not of this run"


def model_of_ones_own(run: Path) -> str:
    (run / "model").mkdir(parents=True)
    (run / "model" / "thesis.txt").write_text("mine")
    return "model"


def samples_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / "samples.jsonl").write_text("mine\n")  # where a run that goes on has written none
    return "samples.jsonl there is not of this run"


def bad_steps_of_ones_own(run: Path) -> str:
    run.mkdir(exist_ok=True)
    (run / "bad_steps.jsonl").write_text("mine\n")
    return "bad_steps.jsonl there is not of this run"


THEIRS = [
    samples_of_ones_own, bad_steps_of_ones_own,
    foreign_checkpoint, config_of_ones_own, metrics_of_ones_own, versions_of_ones_own, staged_of_ones_own,
    adapter_of_ones_own, checkpoints_that_are_a_file, lock_of_ones_own, mark_of_ones_own, model_of_ones_own,
]  # fmt: skip


@pytest.mark.parametrize("begun", [False, True], ids=["a folder", "a run that goes on"])
@pytest.mark.parametrize("put", THEIRS, ids=lambda put: put.__name__)
def test_what_is_in_the_way_is_refused_and_nothing_is_touched(folder: Path, capsys, put, begun: bool) -> None:
    run = folder / "run"
    if not begun:
        shutil.rmtree(run)
    message = put(run)
    before = tree(run)
    assert message in refused(argv(folder), capsys)
    assert tree(run) == before


@pytest.mark.parametrize("rest", [[], [f".{marks.MARK}.123.incomplete"]], ids=["empty", "half a mark"])
@pytest.mark.parametrize("name", ["checkpoints/checkpoint-6", ".model.incomplete", "adapter"])
def test_a_kill_between_a_folder_and_its_mark_is_gone_on_from(folder: Path, name: str, rest: list[str]) -> None:
    (folder / "run" / name).mkdir()
    for half in rest:
        (folder / "run" / name / half).write_text("{")
    assert cli.main(["train", *argv(folder)]) == 0
    assert name == "adapter" or not (folder / "run" / name).exists()
    assert (folder / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("where", range(4))
def test_a_kill_while_the_model_gets_its_mark_is_gone_on_from(folder: Path, monkeypatch, where: int) -> None:
    """The kill comes before the where-th write or rename of the publishing."""
    calls = iter(range(99))
    real = marks.publish_marked

    def killed(*arguments: Any) -> None:
        def dies(of: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == where:
                    raise KeyboardInterrupt
                return of(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("_identities", "_write", "publish", "_names"):
                patch.setattr(marks, name, dies(getattr(marks, name)))
            real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(marks, "publish_marked", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe(folder))
    assert cli.main(["train", *argv(folder)]) == 0
    assert (folder / "run" / "model" / "config.json").is_file()


def changed_data(folder: Path) -> str:
    rows = (folder / "pairs.jsonl").read_bytes()
    (folder / "pairs.jsonl").write_bytes(rows.replace(b"a", b"b"))
    return "data.train="


def changed_base(folder: Path) -> str:
    weights = load_file(folder / "base" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "base" / "model.safetensors")
    return "model.base="


def emptied_model(folder: Path) -> str:
    shutil.rmtree(folder / "run" / "model")
    (folder / "run" / "model").mkdir()
    return "model/ there is not the whole model of a run, it has no config.json"


def model_without_weights(folder: Path) -> str:
    (folder / "run" / "model" / "model.safetensors").unlink()
    return "model/ there is not the whole model of a run, it has no model.safetensors"


@pytest.mark.parametrize("change", [changed_data, changed_base, emptied_model, model_without_weights])
def test_a_run_is_finished_of_what_it_was_trained_on_alone(folder: Path, capsys, change) -> None:
    assert cli.main(["train", *argv(folder)]) == 0
    assert cli.main(["train", *argv(folder)]) == 0
    message = change(folder)
    assert message in refused(argv(folder), capsys)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("spelling", ["{}", "./{}", "{}/../{}", "link"])
def test_another_spelling_of_a_path_is_the_same_run(folder: Path, monkeypatch, spelling: str, finished: bool) -> None:
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to("base")
    base = "link" if spelling == "link" else spelling.format("base", "base")
    data = f"../{folder.name}/pairs.jsonl" if spelling != "{}" else "pairs.jsonl"
    if finished:
        assert cli.main(["train", *argv(folder)]) == 0
    assert cli.main(["train", *argv(folder, model__base=base, data__train=data)]) == 0


def test_changed_data_under_another_spelling_is_noticed(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    changed_data(folder)
    assert "has changed since the run in" in refused(argv(folder, data__train="./pairs.jsonl"), capsys)


@pytest.mark.parametrize("edit", ["key", "value", "aliases"])
def test_a_recipe_edited_to_much_is_one_short_line(folder: Path, capsys, edit: str) -> None:
    path = folder / "run" / "checkpoints" / "checkpoint-4" / "recipe.yaml"
    content = yaml.safe_load(path.read_text())
    if edit == "aliases":
        lists = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]\n" for i in range(30))
        path.write_text(lists + path.read_text())
    else:
        content["data"] |= {"x\n" * 20_000: 1} if edit == "key" else {"train": "y\n" * 20_000}
        path.write_text(yaml.safe_dump(content))
    reseal(path.parent)
    assert len(refused(argv(folder), capsys)) < 600


def test_a_recipe_that_is_the_config_file_is_not_overwritten(folder: Path, capsys, monkeypatch) -> None:
    shutil.rmtree(folder / "run")
    (folder / "run").mkdir()
    monkeypatch.chdir(folder / "run")
    text = "# mine\n" + recipe(folder, training__output_dir=".").as_yaml()
    Path("config.yaml").write_text(text)
    assert "config.yaml there is not of this run" in refused(["--config", "config.yaml"], capsys)
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]
    assert Path("config.yaml").read_text() == text


def test_copies_and_notes_survive_pruning_and_the_run_goes_on(folder: Path) -> None:
    run, checkpoints = folder / "run", folder / "run" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-2-best")
    (checkpoints / "checkpoint-2" / "notes.md").write_text("mine")
    (checkpoints / "checkpoint-best").mkdir()
    (run / "notes.md").write_text("mine")
    before = tree(run)
    train.train(recipe(folder, training__num_steps=6, training__keep_checkpoints=1))
    after = tree(run)
    kept = {name for name in before if "-best" in name or name.endswith("notes.md")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert {path.name for path in (checkpoints / "checkpoint-2").iterdir()} == {"notes.md", marks.MARK}
    assert {path.name for path in checkpoints.iterdir() if (path / "COMPLETE").exists()} == {
        "checkpoint-2-best", "checkpoint-6"
    }  # fmt: skip


def test_a_copy_under_another_step_is_not_gone_on_from(folder: Path, capsys) -> None:
    checkpoints = folder / "run" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-1000")
    line = refused(argv(folder, training__num_steps=2000), capsys)
    assert "checkpoint-1000" in line
    assert (checkpoints / "checkpoint-1000" / "COMPLETE").exists()


# -- finite


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_of_no_numbers_is_damaged_and_the_one_before_is_taken(folder: Path, capsys, name, value) -> None:
    checkpoint = folder / "run" / "checkpoints" / "checkpoint-4"
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    reseal(checkpoint)
    assert resume.newest_checkpoint(recipe(folder)) == folder / "run" / "checkpoints" / "checkpoint-2"
    assert (
        f"{name} in model.safetensors has NaN or infinity in it; goes on from checkpoint-2" in capsys.readouterr().err
    )


@pytest.mark.parametrize("save_steps", [1, 0])
def test_weights_that_the_optimizer_made_no_numbers_are_not_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys, save_steps: int
) -> None:
    shutil.rmtree(folder / "run")
    real = train.DiffusionTrainer._get_grad_norm

    def poisoned(self, model, grad_norm=None):
        norm = real(self, model, grad_norm)
        if self.state.global_step >= 2:  # in the third step
            for group in self.optimizer.param_groups:
                group["weight_decay"] = float("nan")
        return norm

    monkeypatch.setattr(train.DiffusionTrainer, "_get_grad_norm", poisoned)
    arguments = argv(folder, training__num_steps=3, training__save_steps=save_steps)
    line = refused(arguments, capsys)
    assert "the weights of step 3 are not finite" in line
    assert not (folder / "run" / "model").exists()
    found = {path.name for path in (folder / "run").glob("checkpoints/checkpoint-*")}
    assert found == ({"checkpoint-1", "checkpoint-2"} if save_steps else set())
    monkeypatch.undo()
    assert cli.main(["train", *arguments]) == 0
    check_folder_finite(folder / "run" / "model", "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_in_a_million_is_found(tmp_path: Path, dtype, value) -> None:
    weights = {name: torch.zeros(1000, 1000, dtype=dtype) for name in "abc"} | {"ids": torch.arange(9)}
    save_file(weights, tmp_path / "model.safetensors")
    check_folder_finite(tmp_path, "model")
    weights["b"][-1, -1] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model: b \(model.safetensors\) has NaN or infinity in it"):
        check_folder_finite(tmp_path, "model")
    assert first_not_finite_parameter(weights.items()) == "b"


# -- what was trained on what


def test_a_base_that_changed_is_not_gone_on_with(folder: Path, capsys) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors has changed since" in refused(argv(folder), capsys)
    shutil.rmtree(folder / "run" / "converted")
    (folder / "run" / "converted_from.json").unlink()
    assert "has changed since the run in" in refused(argv(folder), capsys)


def test_a_conversion_that_was_changed_is_not_trained(folder: Path, capsys) -> None:
    config = folder / "run" / "converted" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert "converted was converted earlier, and its config.json has changed since" in refused(argv(folder), capsys)


@pytest.mark.parametrize("edit", ["base", "adapter"])
def test_an_adapter_is_not_merged_into_other_weights(folder: Path, capsys, edit: str, tmp_path: Path) -> None:
    shutil.rmtree(folder / "run")
    out = train.train(recipe(folder, model__lora={"r": 2})).parent
    arguments = ["export", str(out / "converted"), str(tmp_path / "out"), "--adapter", str(out / "adapter")]
    assert cli.main(arguments) == 0
    shutil.rmtree(tmp_path / "out")
    weights = load_file(out / "converted" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, out / "converted" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert cli.main(arguments) == 1
    assert "was trained on other weights than those in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the base's tokenizer and generation config


def test_a_tokenizer_that_cannot_be_saved_ends_the_run_before_it_begins(folder: Path, capsys) -> None:
    shutil.rmtree(folder / "run")
    path = folder / "base" / "tokenizer_config.json"
    templates = [{"name": "../../x", "template": "a"}, {"name": "default", "template": "b"}]
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    assert "template" in refused(argv(folder, objective__name="ar"), capsys)
    assert not (folder / "run" / "checkpoints").exists()
    assert not (folder.parent / "x").exists()


def test_a_generation_config_that_is_none_costs_no_model_and_is_not_copied(folder: Path, capsys) -> None:
    content = "not JSON"
    checkpoint = folder / "diffusion"
    shutil.copytree(folder / "run" / "converted", checkpoint)
    (checkpoint / "generation_config.json").write_text(content)
    shutil.rmtree(folder / "run")
    assert cli.main(["train", *argv(folder, model__base=checkpoint)]) == 0
    assert (folder / "run" / "model" / "generation_config.json").read_text() != content


def test_what_another_run_finishes_while_this_one_starts_is_not_lost(folder: Path) -> None:
    before = run_folder.results_in(folder / "run")
    assert before == ["checkpoint-2", "checkpoint-4"]
    run_folder.check_no_others_results(folder / "run", before)
    (folder / "run" / "model").mkdir()
    with pytest.raises(ValueError, match="another run has written to it while this one was starting"):
        run_folder.check_no_others_results(folder / "run", before)


# -- kept where the last write fails


def test_a_model_that_cannot_be_written_is_kept_where_the_message_says(folder: Path, capsys, monkeypatch) -> None:
    shutil.rmtree(folder / "run")
    real = marks.publish_marked

    def full(staged: Path, out: Path, run: str | None = None) -> None:
        if out.name == "model":
            raise OSError(28, "No space left on device")
        real(staged, out, run)

    monkeypatch.setattr(marks, "publish_marked", full)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    line = refused(argv(folder), capsys)
    (kept,) = folder.glob("adapt-model-*")
    assert f"model/ could not be written ([Errno 28] No space left on device); it is in {kept} instead" in line
    check_folder_finite(kept / "model", "model")
    assert (kept / "model" / "tokenizer.json").is_file()


# -- metadata, edited by hand

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FILES = ("COMPLETE", "trainer_state.json", "recipe.yaml")


def _edit(content: Any, data: st.DataObject) -> Any:
    """The content with one value of it, at any depth, replaced or removed."""
    if isinstance(content, dict) and content and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(content, key=str)))
        if data.draw(st.integers(0, 9)) == 0:
            return {name: value for name, value in content.items() if name != key}
        return content | {key: _edit(content[key], data)}
    if isinstance(content, list) and content and data.draw(st.integers(0, 4)):
        place = data.draw(st.integers(0, len(content) - 1))
        return [*content[:place], _edit(content[place], data), *content[place + 1 :]]
    return data.draw(JSON)


def _one_line_or_a_step(folder: Path) -> None:
    """All that a start reads of a run's folder ends with what to go on from, or with one line."""
    ours, line = recipe(folder), "training."
    try:
        run_folder.check_run_folder(ours.training.output_dir)
        resume.begun_precision(ours)
        resume.finished_run(ours)
        run_folder.check_nothing_in_the_way(folder / "run")
        found = resume.newest_checkpoint(ours)
        resume.check_not_past(found, 4)
        resume.check_same_model(ours, found, folder / "run" / "converted", model_files(folder / "run" / "converted"))
        assert found is not None
    except ValueError as refusal:
        line = str(refusal)
    assert "\n" not in line
    assert line.startswith(("training.", "data.", "model.", "noise.", "objective."))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_metadata_edited_to_anything_is_one_line_or_an_older_step(made: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    path = made / "run" / "checkpoints" / "checkpoint-4" / name
    before = {file: file.read_bytes() for file in (path, path.with_name("COMPLETE"))}
    load, dump = (yaml.safe_load, yaml.safe_dump) if name.endswith("yaml") else (json.loads, json.dumps)
    try:
        path.write_text(dump(_edit(load(path.read_text()), data)), encoding="utf-8", errors="surrogatepass")
        if name != "COMPLETE" and data.draw(st.booleans()):
            reseal(path.parent)
        _one_line_or_a_step(made)
    finally:
        for file, content in before.items():
            file.write_bytes(content)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_config_edited_to_anything_is_one_line(made: Path, data: st.DataObject) -> None:
    """Also where the mark agrees with it."""
    path = made / "run" / "config.yaml"
    before, mark = path.read_bytes(), (made / "run" / marks.MARK).read_bytes()
    try:
        text = yaml.safe_dump(_edit(yaml.safe_load(before), data))
        path.write_text(text)
        if data.draw(st.booleans()):
            marks.write(made / "run", "config.yaml", text)
        _one_line_or_a_step(made)
    finally:
        path.write_bytes(before)
        (made / "run" / marks.MARK).write_bytes(mark)


BROKEN: list[bytes | str] = [
    b"", b"\xff\xfe", b"[" * 100_000, b"{" * 100_000, b"null", b"[]", b"1e999", b'{"files": {}}', b"\0", "link", "folder", "pipe",
    b'{"step": 4, "files": {"../../../base/config.json": {"bytes": 1, "sha256": ""}}}',
    b'{"step": 4, "files": {"/dev/zero": {"bytes": 1, "sha256": ""}}}',
    b'{"step": true, "files": {}}', b'{"step": 4, "files": {}, "data": {"a": 1}}', b'{"step": 4, "files": {}, "versions": [1]}',
    b"a: &a [1, 2]\nb: *a\n", b"model: &m {base: x}\ndata: *m\n",
    b"x0: &x0 {a: 1, b: 2}\n" + b"".join(b"x%d: &x%d {a: *x%d, b: *x%d}\n" % (k, k, k - 1, k - 1) for k in range(1, 60)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["COMPLETE", "trainer_state.json", "recipe.yaml", "../../config.yaml", "../../metrics.jsonl",
                                  "../../versions.json", "../../converted_from.json", "../../.adapt.json", ".adapt.json"])  # fmt: skip
@pytest.mark.parametrize("content", BROKEN, ids=lambda content: str(content)[:24])
def test_a_broken_file_is_one_line_or_an_older_step(made: Path, name: str, content: bytes | str) -> None:
    path = made / "run" / "checkpoints" / "checkpoint-4" / name
    before = path.read_bytes()
    path.unlink()
    try:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "link":
            path.symlink_to(made / "pairs.jsonl")
        elif content == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        _one_line_or_a_step(made)
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(before)
