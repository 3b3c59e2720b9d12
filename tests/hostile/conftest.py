"""The yard that attacks are made in: a base, a checkpoint of it, data, a recipe and a task, all tiny and all good."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import yaml
from training_fixtures import write_base, write_pairs

from adapt.conversion.convert import convert


@pytest.fixture(scope="session", autouse=True)
def _tasks_of_the_yard_alone():
    """lm-eval reads its own thousands of tasks anew for each call, in 5 s."""
    from lm_eval.tasks import TaskManager

    every = TaskManager.__init__
    TaskManager.__init__ = functools.partialmethod(every, include_defaults=False)  # pyright: ignore[reportAttributeAccessIssue]
    yield
    TaskManager.__init__ = every


@pytest.fixture(scope="session")
def whole_yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to; `yard` is a copy of it."""
    folder = tmp_path_factory.mktemp("yard")
    write_base(folder / "base")
    convert(folder / "base", folder / "checkpoint", attention="prefix", verify=False)
    write_pairs(folder / "pairs.jsonl", 16)
    recipe = {
        "model": {"base": "checkpoint"},
        "data": {"train": "pairs.jsonl", "seq_len": 32},
        "training": {
            "output_dir": "run",
            "num_steps": 2,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "precision": "fp32",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "pairs.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def yard(whole_yard: Path, tmp_path: Path) -> Path:
    """base/, checkpoint/ (base with prefix attention), pairs.jsonl, recipe.yaml (2 steps into run/) and tasks/pairs.yaml."""
    return shutil.copytree(whole_yard, tmp_path / "yard")
