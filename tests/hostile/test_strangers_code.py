"""Python that comes with a model does not run, whoever says yes, and no folder that we write asks anybody to run it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from attack import Answer, attack, run
from damage import edited, removed, text

from adapt.export.export import export

ROOT = Path(__file__).resolve().parents[2]
YES = "y\n" * 1000
EVIL = "open('RAN', 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\ndef generate(*a, **k): pass\n"
HUB = {"AutoConfig": "attacker/evil--evil.Config", "AutoModelForCausalLM": "attacker/evil--evil.Model"}
HERE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
TOKENIZER = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}

_COMPARE = [
    "compare",
    "--tasks",
    "pairs",
    "--include_path",
    "tasks",
    "--out",
    "out",
    "--limit",
    "1",
    "--speed_repeats",
    "0",
]
_LM_EVAL = ["lm_eval", "--model", "adapt", "--tasks", "pairs", "--include_path", "tasks", "--limit", "1"]
_TRAIN = ["train", "--config", "recipe.yaml", "--training.num_steps", "1", "--training.sample_steps", "1"]
# name -> (the folder that is a stranger's, the call)
CALLS: dict[str, tuple[str, list[str]]] = {
    "convert": ("base", ["convert", "base", "out"]),
    "plan": ("base", ["plan", "--config", "recipe.yaml", "--model.base", "base"]),
    "plan of a checkpoint": ("checkpoint", ["plan", "--config", "recipe.yaml"]),
    "plan of a file": ("base", ["plan", "--config", "recipe.yaml", "--model_config", "base/config.json"]),
    "train": ("checkpoint", _TRAIN),
    "train that converts": ("base", [*_TRAIN, "--model.base", "base"]),
    "train left to right": ("base", [*_TRAIN, "--model.base", "base", "--objective.name", "ar"]),
    "train with a teacher": ("checkpoint", [*_TRAIN, "--objective.distill_weight", "1"]),
    "train with lora": ("checkpoint", [*_TRAIN, "--model.lora", '{"r": 2}']),
    "generate": ("checkpoint", ["generate", "checkpoint", "--prompt", "cat"]),
    "infill": ("checkpoint", ["generate", "checkpoint", "--infill", "a [?] b"]),
    "compare, the base": ("base", [*_COMPARE, "--base", "base", "--adapted", "checkpoint"]),
    "compare, the adapted": ("checkpoint", [*_COMPARE, "--base", "base", "--adapted", "checkpoint"]),
    "compare, the control": ("control", [*_COMPARE, "--base", "base", "--control", "control", "--adapted", "checkpoint"]),
    "lm_eval": ("checkpoint", [*_LM_EVAL, "--model_args", "pretrained=checkpoint"]),
    "export": ("checkpoint", ["export", "checkpoint", "out"]),
    "export in shards": ("checkpoint", ["export", "checkpoint", "out", "--max_shard_size", "1MB"]),
}  # fmt: skip


def evil(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """The changes, and the Python that they ask for."""

    def change(folder: Path) -> None:
        (folder / "evil.py").write_text(EVIL)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(EVIL)
        (folder / "custom_generate" / "requirements.txt").write_text("no-such-package\n")
        for one in changes:
            one(folder)

    return change


# Refused: without the code there is no such model.
NEEDED = {
    "config": evil(edited("config.json", "model_type", to="evil"), edited("config.json", "auto_map", to=HERE)),
    "config on the Hub": evil(
        edited("config.json", "model_type", to="evil"), edited("config.json", "auto_map", to=HUB)
    ),
    "tokenizer": evil(
        edited("tokenizer_config.json", "auto_map", to=TOKENIZER),
        edited("tokenizer_config.json", "tokenizer_class", to="Evil"),
        removed("tokenizer.json"),
    ),
    "kernel": evil(edited("config.json", "attn_implementation", to="attacker/evil")),
    "weights": evil(edited("config.json", "transformers_weights", to="../evil.safetensors")),
    "adapter": evil(
        text("adapter_config.json", json.dumps({"base_model_name_or_path": "attacker/evil", "peft_type": "LORA"}))
    ),
}
# Not needed: the model is made without it.
OFFERED = evil(
    edited("config.json", "auto_map", to=HERE | HUB),
    edited("config.json", "custom_generate", to="attacker/evil"),
    edited("tokenizer_config.json", "auto_map", to=TOKENIZER),
    text("generation_config.json", json.dumps({"custom_generate": "evil", "auto_map": HERE})),
)
_OUTPUTS = ("out", "run")
_NO_TOKENIZER = ("plan", "plan of a checkpoint", "plan of a file")


def planted(yard: Path, call: str, change: Callable[[Path], None]) -> list[str]:
    """The call, after the folder that it is a stranger's was changed; the other folders are good."""
    folder, argv = CALLS[call]
    if folder == "control":
        (yard / "control").mkdir()
        for file in (yard / "base").iterdir():
            (yard / "control" / file.name).write_bytes(file.read_bytes())
    change(yard / folder)
    return argv


@pytest.mark.parametrize("what", NEEDED)
@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_is_made_by_its_own_code_is_refused(yard: Path, call: str, what: str) -> None:
    argv = planted(yard, call, NEEDED[what])
    if call in _NO_TOKENIZER and what in ("tokenizer", "adapter"):
        assert run(yard, argv, stdin=YES).code in (0, 1)  # it reads no tokenizer
    else:
        attack(yard, argv, stdin=YES, may_write=_OUTPUTS)


@pytest.mark.parametrize("call", CALLS)
def test_code_that_a_model_offers_does_not_run_and_is_not_handed_on(yard: Path, call: str) -> None:
    answer = run(yard, planted(yard, call, OFFERED), stdin=YES)
    assert answer.code == 0, answer
    assert not [file for name in _OUTPUTS for file in (yard / name).rglob("*") if _asks_for_code(file)]


def _asks_for_code(file: Path) -> bool:
    """Whether a file of an output names code of a stranger, or is some; what an export decodes with is our own."""
    if file.suffix == ".py":
        return "RAN" in file.read_text()
    return file.suffix == ".json" and any(
        word in file.read_text() for word in ('"auto_map"', "custom_generate", "evil")
    )


@pytest.mark.parametrize(
    "call", ["generate", "infill", "lm_eval", "train", "plan of a checkpoint", "compare, the adapted"]
)
def test_the_code_of_an_export_is_for_others_and_does_not_run_here(yard: Path, call: str) -> None:
    export(yard / "checkpoint", yard / "exported")
    generate = yard / "exported" / "custom_generate" / "generate.py"
    generate.write_text(EVIL + generate.read_text())
    argv = [argument.replace("checkpoint", "exported") for argument in CALLS[call][1]]
    if call == "train" or call.startswith("plan"):
        argv += ["--model.base", "exported"]
    assert run(yard, argv, stdin=YES).code == 0


def test_the_files_of_an_adapter_do_not_run(yard: Path) -> None:
    assert run(yard, CALLS["train with lora"][1]).code == 0
    adapter = yard / "run" / "adapter"
    evil()(adapter)
    edited("adapter_config.json", "auto_mapping", to={"parent_library": "evil", "base_model_class": "Model"})(adapter)
    for argv in (["generate", "checkpoint", "--prompt", "cat"], ["export", "checkpoint", "out"]):
        assert run(yard, [*argv, "--adapter", "run/adapter"], stdin=YES).code == 0
    edited("adapter_config.json", "megatron_config", to={"tensor_model_parallel_size": 2})(adapter)
    edited("adapter_config.json", "megatron_core", to="evil")(adapter)
    for argv in (["generate", "checkpoint", "--prompt", "cat"], ["export", "checkpoint", "out2"]):
        refused: Answer = attack(yard, [*argv, "--adapter", "run/adapter"], "megatron_core='evil'", stdin=YES)
        assert "was not run" in refused.line


def test_every_call_that_loads_something_says_whether_code_is_trusted() -> None:
    """Transformers asks on standard input where nobody says."""
    silent: list[str] = []
    for path in (file for room in ("adapt", "eval", "recipes", "benchmarks") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            loads = (
                node.func.attr in ("from_pretrained", "from_config") and owner != "peft.PeftModel"
            )  # which has no such argument
            if loads and not any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not silent
