"""The examples run, on a tiny model, and show what they say."""

from __future__ import annotations

import base64
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_fixtures import write_base, write_pairs

from adapt import cli

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "refinement.ipynb"


def run(script: Path, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def test_the_example_converts_writes_and_fills(
    base_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "generate.py"
    assert len(script.read_text().splitlines()) <= 30
    run(script, base_folder("llama"), tmp_path / "out", monkeypatch=monkeypatch)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["diffusion"]["attention"] == "prefix"
    printed, rounds = capsys.readouterr()
    assert '"time":"09:40","track":"7"}' in printed.replace(" ", "")
    assert "round   1" in rounds


def test_the_example_takes_a_checkpoint_that_is_there(
    checkpoint_folder: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(EXAMPLES / "generate.py", "no-such-base", checkpoint_folder("llama", "prefix", True), monkeypatch=monkeypatch)
    assert "round   1" in capsys.readouterr().err


def test_the_notebook_runs_and_its_pictures_are_pictures(
    checkpoint_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    execute = runpy.run_path(str(ROOT / "benchmarks" / "run_notebook.py"))["execute"]
    before = Path.cwd()
    made = execute(NOTEBOOK, {"CHECKPOINT": str(checkpoint_folder("llama", "prefix", True))})
    assert Path.cwd() == before
    assert "CHECKPOINT" not in os.environ
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", [])]
    pictures = [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert any("tokens per forward" in "".join(o.get("text", [])) for o in outputs)
    assert set(made) == set(json.loads(NOTEBOOK.read_text()))


def test_a_packed_row_shows_prompts_whole_and_masks_in_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    settings = {
        "model.base": write_base(tmp_path / "base"),
        "data.train": write_pairs(tmp_path / "pairs.jsonl", rows=8),
        "data.seq_len": 64,
        "training.output_dir": run_folder,
        "training.num_steps": 1,
        "training.global_batch_size": 2,
        "training.micro_batch_size": 2,
        "training.precision": "fp32",
    }
    assert cli.main(["train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]) == 0
    capsys.readouterr()
    run(EXAMPLES / "packed_row.py", run_folder, monkeypatch=monkeypatch)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    view, weight = [int(line[2]) for line in lines], [float(line[-1]) for line in lines]
    assert {0, 1} <= set(view)
    assert all(w == 0 for v, w in zip(view, weight, strict=True) if v == 0)
    assert any(w > 0 for w in weight)


def test_the_readmes_pictures_are_made_from_a_quickstart(
    checkpoint_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart = tmp_path / "quickstart"
    for folder in ("adapted", "data", "report"):
        (quickstart / folder).mkdir(parents=True)
    (quickstart / "adapted" / "model").symlink_to(checkpoint_folder("llama", "prefix", True))
    example = {"prompt": "The cat", "completion": " sat on a mat"}
    (quickstart / "data" / "test.jsonl").write_text(json.dumps(example) + "\n")
    sampler = {"threshold": 0.9, "order": "left_to_right", "canvas_length": 8}
    provenance = {key: key for key in ("command", "date", "git_revision", "hardware", "dtype", "versions")}
    points = [
        {"arm": arm, "quality": 0.5, "tokens_per_s": 10.0 * i, "ci95": [0.4, 0.6], "sampler": ""}
        for i, arm in enumerate(("base", "control", "adapted"), start=1)
    ]
    report = {"provenance": {**provenance, "sampler": sampler, "seed": 1}, "pareto": points}
    (quickstart / "report" / "report.json").write_text(json.dumps(report))
    notebook = tmp_path / "refinement.ipynb"
    notebook.write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run(ROOT / "benchmarks" / "readme_pictures.py", quickstart, "--out", tmp_path, "--notebook", notebook,
        monkeypatch=monkeypatch)  # fmt: skip
    for name in ("refinement.png", "quality_speed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "pictures.json").read_text())["made_by"]["command"] == "command"
