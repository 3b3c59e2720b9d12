"""Every setting of every verb with values that are none: refused in one line that names it, and nothing is touched.

The bounds themselves are held in tests/test_settings.py; here each verb is asked.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import yaml
from attack import attack

MODELS = {
    "convert": ["base", "out"],
    "generate": ["checkpoint", "--prompt", "cat"],
    "export": ["checkpoint", "out"],
    "compare": ["--base", "base", "--adapted", "checkpoint", "--tasks", "pairs", "--include_path", "tasks", "--out", "out"],
    "train": ["--config", "recipe.yaml"],
    "plan": ["--config", "recipe.yaml"],
    "doctor": [],
    "quickstart": ["--fast", "--out", "out"],
    "plot": ["nowhere"],
}  # fmt: skip
SAMPLER = {
    "sampler.threshold": ("0", "1.01"),
    "sampler.tokens_per_step": ("0", "16777217"),
    "sampler.canvas_length": ("0", "16777217"),
    "sampler.temperature": ("-0.1", "101"),
    "sampler.top_p": ("0", "1.01"),
}
NUMBERS = {  # of each verb: the setting, and the nearest values that it does not take
    "convert": {"seed": ("-1", "4294967296"), "block_size": ("0", "16777217"), "mask_init_std": ("-0.1", "1.1"),
                "pad_to_multiple_of": ("0", "65537")},
    "generate": {"max_new_tokens": ("0", "16777217"), "batch_size": ("0", "1048577"), "seed": ("-1", "4294967296"), **SAMPLER},
    "export": SAMPLER,
    "compare": {"limit": ("0", "1000000001"), "num_fewshot": ("-1", "1001"), "base_num_fewshot": ("-1", "1001"),
                "batch_size": ("0", "1048577"), "mc_samples": ("0", "65537"), "corpus_tokens": ("1", "1099511627777"),
                "speed_prompts": ("0", "1000000001"), "speed_repeats": ("-1", "1000001"), "seed": ("-1", "4294967296"), **SAMPLER},
    "train": {"data.seq_len": ("7", "16777217"), "data.num_workers": ("-1", "257"), "training.global_batch_size": ("0", "1048577"),
              "training.micro_batch_size": ("0", "17179869184"), "training.learning_rate": ("0", "11"),
              "training.weight_decay": ("-1", "11"), "training.num_epochs": ("0", "1e300"), "training.max_grad_norm": ("-1", "1e7"),
              "training.adam_beta2": ("-1", "1"), "training.seed": ("-1", "4294967296"), "training.max_loss_ratio": ("1", "1e10"),
              "training.save_minutes": ("-1", "1e9"), "training.max_minutes": ("0", "1e9"), "training.warmup_steps": ("-1", "1e10"),
              "noise.t_min": ("0", "1"), "noise.t_max": ("0", "1.1"), "noise.p_uniform": ("0", "1"), "objective.views": ("0", "257"),
              "objective.ar_weight": ("-1", "1e7"), "objective.distill_weight": ("-1", "1e7"), "model.lora.r": ("0", "65537"),
              "model.lora.alpha": ("0", "65537"), "model.lora.dropout": ("-1", "1"), "model.block_size": ("0", "16777217")},
    "plan": {"gpus": ("0", "65537"), "gpu_memory": ("0", "1e7"), "reserve": ("-0.1", "1"), "tokens_per_s": ("0", "1e13"),
             "train_tokens": ("0", "1e19")},
    "doctor": {"ranks": ("0", "257"), "timeout": ("0", "86401")},
    "quickstart": {"minutes": ("0", "1e8"), "seed": ("-1", "4294967296")},
    "plot": {"smooth": ("-0.1", "1")},
}  # fmt: skip
NO_NUMBERS = ("nan", ".inf", "true", "many", "", "[1]", "9" * 4400, "1e400")


@pytest.mark.parametrize("verb", NUMBERS)
def test_a_number_out_of_its_bounds_is_refused(yard: Path, verb: str) -> None:
    for setting, values in NUMBERS[verb].items():
        for value in (*values, *NO_NUMBERS):
            attack(yard, [verb, *MODELS[verb], f"--{setting}={value}"], setting)


TRUTHS = {
    "convert": ("shift_logits", "trust_remote_code"),
    "generate": ("chat", "trust_remote_code"),
    "compare": ("apply_chat_template",),
    "train": (
        "model.shift_logits",
        "model.torch_compile",
        "model.gradient_checkpointing",
        "training.resume",
        "objective.complementary",
    ),
    "plan": ("json",),
}


@pytest.mark.parametrize("verb", TRUTHS)
def test_what_is_no_truth_value_is_refused(yard: Path, verb: str) -> None:
    for setting in TRUTHS[verb]:
        for value in ("2", "0.0", "perhaps", "", "[true]"):
            attack(yard, [verb, *MODELS[verb], f"--{setting}={value}"], setting)


WORDS = {
    "convert": ("attention", "clean_context", "dtype", "mask_token", "adapter"),
    "generate": ("adapter", "dtype", "device", "sampler.order"),
    "export": ("adapter", "dtype", "format", "max_shard_size", "report", "license", "sampler.order"),
    "compare": ("base", "adapted", "control", "tasks", "out", "corpus", "include_path", "dtype", "device", "attn_implementation"),
    "train": ("model.base", "data.train", "training.output_dir", "training.deepspeed", "training.lr_scheduler",
              "training.optimizer", "training.sample_prompt", "data.split", "noise.schedule", "model.quantization"),
    "plan": ("model_config", "benchmark", "device"),
    "quickstart": ("out",),
    "plot": ("y", "out"),
}  # fmt: skip


@pytest.mark.parametrize("verb", WORDS)
def test_a_text_that_is_none_is_refused(yard: Path, verb: str) -> None:
    for setting in WORDS[verb]:
        for value in ("", "  ", "a\0b", "a\udcffb"):
            attack(yard, [verb, *MODELS[verb], f"--{setting}={value}"])


MODEL_ARGS = {
    "threshold": ("0", "2", "nan", "inf", "high", "True"),
    "tokens_per_step": ("0", "1.5", "many", "True"),
    "temperature": ("-1", "nan", "1e9"),
    "top_p": ("0", "2"),
    "order": ("random", "1"),
    "canvas_length": ("0", "99999999999"),
    "mc_samples": ("0", "1.5", "True", "1e300"),
    "seed": ("-1", "1.5", "4294967296"),
    "max_length": ("0", "-5", "nan"),
    "max_new_tokens": ("0", "None", "16777217"),
    "batch_size": ("0", "-1", "auto", "1.5"),
    "greedy": ("maybe", "True"),
    "progress": ("2", "no"),
    "dtype": ("int8", "1"),
    "device": ("gpu 0", "cuda:x"),
    "chat_template_args": ("1", "[1]"),
    "no_such": ("1",),
}


def test_model_args_that_are_none_are_refused(yard: Path) -> None:
    for name, values in MODEL_ARGS.items():
        for value in values:
            attack(
                yard,
                [
                    "lm_eval",
                    "--model",
                    "adapt",
                    "--model_args",
                    f"pretrained=checkpoint,{name}={value}",
                    "--tasks",
                    "pairs",
                ],
                name,
            )


LM_EVAL = ("--limit=nan", "--limit=-1", "--limit=inf", "--num_fewshot=-1", "--num_fewshot=1001", "--model_args={",
           "--model_args=pretrained=./none", "--tasks=a\0b")  # fmt: skip


@pytest.mark.parametrize("option", LM_EVAL)
def test_settings_of_lm_eval_that_are_none_are_refused(yard: Path, option: str) -> None:
    attack(yard, ["lm_eval", "--model", "adapt", "--model_args", "pretrained=checkpoint", "--tasks", "pairs", option])


@pytest.mark.parametrize("model_args", [[], ["--model_args", "threshold=0.8"]])
def test_lm_eval_without_a_checkpoint_is_refused_before_the_model(yard: Path, model_args: list[str]) -> None:
    attack(yard, ["lm_eval", "--model", "adapt", *model_args, "--tasks", "pairs"], "pretrained")


SMALL = {"sampler.temperature": "1e-40", "sampler.top_p": "1e-300", "device": "meta"}


@pytest.mark.parametrize("verb", ["generate", "compare"])
def test_what_no_numbers_come_of_is_refused(yard: Path, verb: str) -> None:
    for setting, value in SMALL.items():
        attack(yard, [verb, *MODELS[verb], f"--{setting}={value}"], f"{setting}={value}")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_refused(yard: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("x", "", "-1"):
        monkeypatch.setenv(name, value)
        for verb in ("train", "doctor"):
            attack(yard, [verb, *MODELS[verb]], f"{name}={value}:")


RECIPES = {
    "a key twice": "training: {num_steps: 2, num_steps: 900}",
    "a section twice": "noise: {}\nnoise: {}",
    "a million aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "code": "model: !!python/object/apply:os.system ['touch RAN']",
    "a class": "model: {class_path: os.system, init_args: {command: touch RAN}}",
    "a class for lora": "model: {lora: {class_path: subprocess.Popen}}",
    "a list": "[1, 2]",
    "a word": "recipe",
    "nothing": "",
    "deep": "[" * 30_000,
    "an unknown section": "modle: {base: a}",
    "an unknown setting": "model: {bsae: a}",
    "no truth": "model: {shift_logits: 'no'}",
    "a truth for a number": "training: {num_steps: true}",
    "a list for a number": "training: {num_steps: [2]}",
    "a number for a name": "model: {base: 5}",
    "nan": "training: {learning_rate: .nan}",
    "a date": "training: {num_steps: 2026-11-24}",
    "two documents": "model: {}\n---\nmodel: {}",
    "a null byte": 'model: {base: "a\\0b"}',
    "half a character": 'model: {base: "\\ud800"}',
}


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_what_is_no_recipe_is_refused(yard: Path, verb: str, text: str) -> None:
    (yard / "bad.yaml").write_text(text)
    attack(yard, [verb, "--config", "recipe.yaml", "--config", "bad.yaml"], "config=bad.yaml")


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/null", "tasks", "none.yaml", "checkpoint/model.safetensors", "", "x" * 300]
)
def test_what_cannot_be_read_as_a_recipe_is_refused(yard: Path, verb: str, path: str) -> None:
    attack(yard, [verb, f"--config={path}"], "config=")


def _pipe(yard: Path, text: str) -> str:
    os.mkfifo(yard.parent / "pipe")
    threading.Thread(target=(yard.parent / "pipe").write_text, args=(text,), daemon=True).start()
    return str(yard.parent / "pipe")


def test_a_bad_recipe_from_a_pipe_is_refused(yard: Path) -> None:
    recipe = yaml.safe_load((yard / "recipe.yaml").read_text())
    recipe["training"]["num_steps"] = -1
    attack(
        yard, ["train", "--config", _pipe(yard, yaml.safe_dump(recipe))], "training.num_steps=-1: must be from 1 to "
    )


def test_prompts_from_a_pipe_without_any_are_refused(yard: Path) -> None:
    attack(yard, ["generate", "checkpoint", "--prompts", _pipe(yard, "\n\n")], "holds no prompt")


DS = {
    "nan": '{"gradient_clipping": NaN}',
    "a key twice": '{"bf16": {}, "bf16": {}}',
    "a list": "[]",
    "a word for a section": '{"zero_optimization": "stage 2"}',
    "a word for an offload": '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
    "a number for parameters": '{"optimizer": {"type": "AdamW", "params": 3}}',
    "a truth for a stage": '{"zero_optimization": {"stage": true}}',
    "deep": "[" * 100_000,
    "bytes": "\udcff",
}


@pytest.mark.parametrize("text", DS.values(), ids=DS)
def test_what_is_no_config_of_deepspeed_is_refused(yard: Path, text: str) -> None:
    (yard / "ds.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    attack(yard, ["train", "--config", "recipe.yaml", "--training.deepspeed", "./ds.json"], "deepspeed")


LINES = ["[1]", '{"step": "one"}', '{"step": 1, "elapsed_s": [2]}', '{"step": true}', '{"step": {}}', "[" * 100_000, "nonsense",
         '{"step": 1, "loss": "low"}', '{"step": 1, "nelbo": null}', '{"step": ' + "9" * 5000 + "}", "{}"]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_what_is_no_line_of_a_run_is_refused(yard: Path, line: str) -> None:
    (yard / "metrics.jsonl").write_text(f"{line}\n{line}\n")
    attack(yard, ["plot", "metrics.jsonl"], "RUN=metrics.jsonl")


SECTIONS = ["--model", "--data", "--training", "--noise", "--objective"]


@pytest.mark.parametrize("option", SECTIONS)
@pytest.mark.parametrize("value", ['{"class_path": "evil.X"}', "recipe.yaml", "evil.X", "/dev/zero", "null"])
def test_a_section_is_no_setting_and_imports_nothing(
    yard: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    (yard / "evil.py").write_text("open('RAN', 'w').close()\nclass X: pass\n")
    monkeypatch.syspath_prepend(yard)
    attack(yard, ["train", "--config", "recipe.yaml", option, value], f"{option[2:]}={value}: is a section")
    attack(yard, ["train", "--config", "recipe.yaml", "--model.lora", "evil.X"], "model.lora=evil.X: is a section")
