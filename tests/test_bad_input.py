"""What a user can get wrong in `adapt train`: one line with setting, value and remedy, and nothing on disk lost."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from datasets import disable_progress_bars, enable_progress_bars
from training_fixtures import recipe_argv, write_base, write_pairs

from adapt import cli


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bad") / "base")


@pytest.fixture
def folder(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data of many kinds, and a run that is finished."""
    write_pairs(tmp_path / "pairs.jsonl", 16)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "cat", "completion": "dog " * 99}) + "\n")
    (tmp_path / "hollow.jsonl").write_text(json.dumps({"prompt": "cat", "completion": ""}) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "cat"}) + "\n")
    (tmp_path / "not-a-model").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "finished" / "model").mkdir(parents=True)
    (tmp_path / "finished" / "model" / "weights").write_text("precious")
    (tmp_path / "conflict.json").write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.yaml").write_text("model: [1")
    (tmp_path / "hollow.yaml").write_text("noise:\n")
    (tmp_path / "wrong.yaml").write_text("data:\n  seq_length: 128\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(argv: list[str], capsys) -> tuple[int, str]:
    disable_progress_bars()
    try:
        code = cli.main(["train", *argv])
    except SystemExit as exited:  # usage errors
        code = int(exited.code or 0)
    finally:
        enable_progress_bars()
    return code, capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"converted", "converted_from.json", ".adapt.json"} & set(path.parts)
    }


# overrides of a recipe that works -> (exit code, what the line says)
BLOCK = {"model__attention": "block", "model__block_size": 4}
CASES = {
    "wrong key": (
        {"training__learning_rat": 1e-3},
        2,
        r"training.learning_rat.* did you mean training.learning_rate\?",
    ),
    "wrong key in the file": ({"config": "wrong.yaml"}, 2, r"seq_length.* did you mean data.seq_len\?"),
    "wrong type": ({"training__num_steps": "many"}, 2, "training.num_steps.*many"),
    "wrong choice": ({"objective__name": "elbo"}, None, "objective.name=elbo: choose one of ar, nelbo"),
    "no recipe": ({"config": "recipes/none.yaml"}, 2, "config=recipes/none.yaml: no such file; give a recipe"),
    "another suffix": ({"config": "wrong.yml"}, 2, r"config=wrong.yml: no such file; did you mean wrong.yaml\?"),
    "broken recipe": ({"config": "broken.yaml"}, 2, r"config=broken.yaml: is no YAML \(line 1: .*; give a recipe"),
    "a folder for a recipe": ({"config": "broken"}, 2, "config=broken: is a folder; give a recipe"),
    "weights for a recipe": (
        {"config": "base/model.safetensors"},
        2,
        "config=base/model.safetensors: is not UTF-8 text",
    ),
    "a section without settings": (
        {"config": "hollow.yaml"},
        2,
        "config=hollow.yaml: noise holds no settings but None",
    ),
    "data for a recipe": (
        {"config": "other.jsonl"},
        2,
        "config=other.jsonl: unknown section question; allowed are data, model",
    ),
    "no data file": ({"data__train": "none.jsonl"}, 1, "data.train=none.jsonl: no such file; give json"),
    "empty data": ({"data__train": "empty.jsonl"}, 1, "data.train=empty.jsonl: is empty, nothing to train on; give"),
    "empty list of data": ({"data__train": "[]"}, None, r"data.train=\[\]: give at least one file"),
    "nothing to noise": ({"data__train": "hollow.jsonl"}, 1, "'cat' has an empty completion, nothing to noise; remove"),
    "other columns": (
        {"data__train": "other.jsonl"},
        1,
        "has the columns question; needs text, or prompt and completion",
    ),
    "sequence too long": (
        {"data__train": "long.jsonl"},
        1,
        "data.seq_len=32: 1 of 1 .* set data.seq_len=101 or data.too_long",
    ),
    "canvas too long": (
        {"data__canvas_length": 40},
        None,
        "data.canvas_length=40: longer than a row of data.seq_len=32; lower it, or raise",
    ),
    "too many views": (
        {"objective__views": 4},
        1,
        "data.seq_len=32: [0-9]+ of [0-9]+ examples take more with all their copies, up to [0-9]+ tokens; set data.seq_len=[0-9]+, "
        "data.too_long=drop, or lower objective.views",
    ),
    "empty canvas": ({"data__canvas_length": 0}, None, "data.canvas_length=0: must be from 1 to "),
    "no base": ({"model__base": "./none"}, 1, "model.base=./none: no such folder; give"),
    "base is no model": ({"model__base": "./not-a-model"}, 1, "model.base=./not-a-model: not a model folder"),
    "base is broken": ({"model__base": "./broken"}, 1, "broken: config.json is not valid JSON"),
    "ar base is no model": ({"model__base": "./none", "objective__name": "ar"}, 1, "model.base=./none: no such folder"),
    "model of another": (
        {"training__output_dir": "finished"},
        1,
        r"output_dir=finished: holds a model that no run of ours wrote .* choose another",
    ),
    "unknown deepspeed": ({"training__deepspeed": "zero9"}, 1, "deepspeed=zero9: shipped are zero0, zero1"),
    "no deepspeed file": ({"training__deepspeed": "./none.json"}, 1, "deepspeed=./none.json: no such file"),
    "broken deepspeed file": ({"training__deepspeed": "broken.json"}, 1, "deepspeed=broken.json: not valid JSON"),
    "deepspeed conflict": (
        {"training__deepspeed": "conflict.json"},
        1,
        'deepspeed.train_batch_size=64 conflicts with training.global_batch_size=8; set it to "auto" in conflict.json',
    ),
    "batch sizes": (
        {"training__micro_batch_size": 3},
        1,
        "global_batch_size=8: must be a multiple of .*micro_batch_size=3.*try 9",
    ),
    "steps and epochs": (
        {"training__num_epochs": 1},
        None,
        "num_steps=6 and training.num_epochs=1.0: give exactly one",
    ),
    "neither": ({"training__num_steps": None}, None, "num_steps=None and training.num_epochs=None: give exactly one"),
    "no epochs": ({"training__num_steps": None, "training__num_epochs": -1}, None, "num_epochs=-1.0: must be above 0"),
    "too little data": (
        {"training__num_steps": None, "training__num_epochs": 1, "training__global_batch_size": 64},
        1,
        "num_epochs=1.0: the data has [0-9]+ packed rows an epoch, too few .* lower it",
    ),
    "odd pairs": ({"objective__complementary": True}, None, "objective.views=1: complementary views come in pairs"),
    "canvases anywhere of no length": ({"data__canvas_start": "anywhere"}, None, "needs data.canvas_length.*; try 8"),
    "ar loss on nothing": (
        {"objective__ar_weight": 1},
        None,
        "objective.ar_weight=1.0: .* set one, or ar_weight to 0",
    ),
    "canvases anywhere in a bidirectional model": (
        {"data__canvas_start": "anywhere", "data__canvas_length": 4, "model__attention": "bidirectional"},
        1,
        "data.canvas_start=anywhere: a bidirectional checkpoint has no causal context .*set it to prompt",
    ),
    "unknown schedule": (
        {"training__lr_scheduler": "cosin"},
        1,
        "training.lr_scheduler=cosin: choose one of .*cosine,",
    ),
    "options of another schedule": (
        {"training__lr_scheduler_options": {"min_lr": 1}},
        1,
        "training.lr_scheduler_options={'min_lr': 1.*}: training.lr_scheduler=cosine does not take",
    ),
    "unknown optimizer": ({"training__optimizer": "adam"}, 1, "training.optimizer=adam: choose one of .*adamw_torch"),
    "unknown tracker": (
        {"training__report_to": ["tensorbord"]},
        None,
        "report_to=tensorbord: choose one of tensorboard",
    ),
    "unknown attention": (
        {"model__attention": "causal"},
        None,
        "model.attention=causal: choose one of bidirectional, block, prefix",
    ),
    "blocks of no size": (
        {"model__attention": "block"},
        None,
        "model.block_size=None: model.attention=block needs one; try 16 or 32",
    ),
    "a size of no blocks": (
        {"model__block_size": 4},
        None,
        "model.block_size=4: belongs to model.attention=block; set that",
    ),
    "a clean context of no blocks": ({"model__clean_context": "block"}, None, "belongs to model.attention=block"),
    "unknown clean context": (
        {**BLOCK, "model__clean_context": "bloc"},
        None,
        "model.clean_context=bloc: choose one of block, causal",
    ),
    "canvases in blocks": ({**BLOCK, "data__canvas_length": 8}, None, "the canvases are the blocks; leave both out"),
    "ar loss in a text that is not causal": (
        {**BLOCK, "model__clean_context": "block", "objective__ar_weight": 1},
        None,
        "objective.ar_weight=1.0: .* clean_context=causal",
    ),
    "a window in blocks": (
        {**BLOCK, "objective__anneal_steps": 3},
        None,
        "annealed by growing blocks; use objective.block_",
    ),
    "a curriculum that does not begin": (
        {**BLOCK, "objective__block_sizes": {2: 4}},
        None,
        "objective.block_sizes=.*must say the one of step 0",
    ),
    "a curriculum that ends elsewhere": (
        {**BLOCK, "objective__block_sizes": {0: 1, 2: 8}},
        None,
        "objective.block_sizes=.*must end at model.block_size=4",
    ),
    "a curriculum longer than the run": (
        {**BLOCK, "data__seq_len": 64, "objective__block_sizes": {0: 1, 6: 4}},
        1,
        "objective.block_sizes=.*: the run has 6 steps, so attention would never be what the checkpoint says",
    ),
    "annealing longer than the run": (
        {"objective__anneal_steps": 6},
        1,
        "objective.anneal_steps=6: the run has 6 steps",
    ),
    "a bound on a band": ({"noise__t_max": 0.8}, None, "noise.t_max=0.8: the NELBO .* need all times; set them to"),
    "a band upside down": (
        {"noise__t_min": 0.5, "noise__t_max": 0.4},
        None,
        "noise.t_max=0.4: must lie above noise.t_min",
    ),
    "unknown noise": ({"noise__kind": "white"}, None, "noise.kind=white: choose one of absorbing, hybrid, uniform"),
    "random noise with a schedule": (
        {"noise__kind": "uniform", "noise__schedule": "cosine"},
        None,
        "noise.schedule=cosine: noise.kind=uniform has a schedule of its own",
    ),
    "random noise in pairs": (
        {"noise__kind": "hybrid", "objective__views": 2, "objective__complementary": True},
        None,
        "noise.kind=hybrid: complementary views.* are defined for absorbing noise",
    ),
    "pieces compiled": (
        {"model__torch_compile": True, "model__attn_implementation": "sdpa_pieces"},
        None,
        "with model.torch_compile=true use flex_attention or sdpa",
    ),
    "unknown lora layers": (
        {"model__lora": {"target_modules": ["nowhere"]}},
        1,
        r"model.lora.target_modules=\['nowhere'\]: .*not found",
    ),
}


@pytest.mark.parametrize("overrides, code, line", CASES.values(), ids=CASES.keys())
def test_a_mistake_is_told_in_one_line_and_costs_nothing(folder: Path, capsys, overrides, code, line) -> None:
    overrides = dict(overrides)
    config = ["--config", overrides.pop("config")] if "config" in overrides else []
    before = contents(folder)
    found, err = run(config + recipe_argv(Path("base"), Path("pairs.jsonl"), Path("out"), **overrides), capsys)
    assert found == (code if code is not None else found) != 0
    assert found in (1, 2)
    assert err.startswith("adapt train: error: ")
    assert err.count("\n") == 1, err
    assert re.search(line, err), err
    assert contents(folder) == before


def test_debug_gives_the_traceback(folder: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["--debug", "train", *recipe_argv(Path("base"), Path("none.jsonl"), Path("out"))])


def test_a_finished_run_is_not_touched(folder: Path, capsys) -> None:
    run(recipe_argv(Path("base"), Path("pairs.jsonl"), Path("finished")), capsys)
    assert (folder / "finished" / "model" / "weights").read_text() == "precious"
    assert os.listdir(folder / "finished") == ["model"]


def test_a_bidirectional_checkpoint_is_no_base_for_the_control_arm(folder: Path, base: Path, capsys) -> None:
    from adapt.conversion.convert import convert

    convert(base, folder / "dlm", attention="bidirectional")
    _, err = run(recipe_argv(folder / "dlm", Path("pairs.jsonl"), Path("out"), objective__name="ar"), capsys)
    assert "objective.name=ar: model.base=" in err
    assert "give the causal LM that it came from" in err
