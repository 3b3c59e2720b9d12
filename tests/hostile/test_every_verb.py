"""What every verb has to answer in one line, whatever it does: the table is verbs x bad values of what they have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attack import attack, run

from adapt.cli import VERBS

# A call of each verb that works on a model: what stands for the model, and the setting that names it.
MODEL_VERBS: dict[str, list[str]] = {
    "convert": ["convert", "{}", "out"],
    "generate": ["generate", "{}", "--prompt", "cat"],
    "export": ["export", "{}", "out"],
    "compare": ["compare", "--base", "base", "--adapted", "{}", "--tasks", "pairs", "--include_path", "tasks", "--out", "out"],
    "train": ["train", "--config", "recipe.yaml", "--model.base", "{}"],
    "plan": ["plan", "--config", "recipe.yaml", "--model.base", "{}"],
    "lm_eval": ["lm_eval", "--model", "adapt", "--model_args", "pretrained={}", "--tasks", "pairs", "--include_path", "tasks"],
}  # fmt: skip


def call(verb: str, model: object) -> list[str]:
    return [argument.format(model) for argument in MODEL_VERBS[verb]]


NO_MODELS = {
    "nothing there": "nowhere",
    "an empty folder": "empty",
    "a text file": "pairs.jsonl",
    "a folder of data": "tasks",
    "config.json is a list": "listed",
}


@pytest.mark.parametrize("model", NO_MODELS.values(), ids=NO_MODELS)
@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_what_is_no_model_is_refused(yard: Path, verb: str, model: str) -> None:
    (yard / "empty").mkdir()
    (yard / "listed").mkdir()
    (yard / "listed" / "config.json").write_text(json.dumps([1]))
    attack(yard, call(verb, model), model)


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_refused(yard: Path, verb: str) -> None:
    attack(yard, [verb, "--no_such_option", "1"])


def test_the_yard_is_good(yard: Path) -> None:
    assert run(yard, call("generate", "checkpoint")).code == 0
    assert run(yard, call("train", "checkpoint")).code == 0
