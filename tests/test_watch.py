"""Samples during training: they show the model as it is, and the run does not notice them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import losses, recipe_argv, train_ranks, write_base, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt.decoding.settings import SamplerConfig
from adapt.training import train
from adapt.training.recipe import parse_recipe
from adapt.training.watch import samples as watch
from adapt.training.watch.metrics import RunningMetrics

SAMPLED = {"training__sample_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path):
    def run(name: str = "out", **overrides) -> Path:
        argv = recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / name, **overrides)
        return train.train(parse_recipe(argv)).parent

    return run


def samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def assert_same_run(found: Path, want: Path) -> None:
    assert losses(found) == losses(want)
    weights = [load_file(out / "model" / "model.safetensors") for out in (found, want)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training__precision": "bf16"},
        {"model__attention": "bidirectional", "objective__anneal_steps": 3},
        {"model__lora": {"r": 4, "dropout": 0.3}, "training__precision": "bf16"},
        {"objective__ar_weight": 0.5, "data__canvas_start": "anywhere", "data__canvas_length": 4},
        {"objective__name": "ar"},
        {"model__gradient_checkpointing": True, "data__num_workers": 1},
        pytest.param(
            {"model__torch_compile": True, "training__num_steps": 4},
            marks=[
                pytest.mark.exhaustive,
                pytest.mark.filterwarnings("ignore"),
            ],  # torch's own, as it traces and compiles
        ),
    ],
    ids=str,
)
def test_a_run_with_samples_is_the_run_without_to_the_bit(run, settings) -> None:
    watched, alone = run("watched", **SAMPLED, **settings), run("alone", **settings)
    assert_same_run(watched, alone)
    assert [sample["step"] for sample in samples(watched)] == [2, 4, 6][: len(losses(watched)) // 2]
    assert not (alone / "samples.jsonl").exists()


@pytest.mark.parametrize("attention", ["prefix", "bidirectional"])
def test_the_last_sample_is_what_the_final_model_writes(run, folder: Path, attention: str) -> None:
    out = run(model__attention=attention, training__sample_prompt="the cat", **SAMPLED)
    lm = adapt.load(out / "model", device="cpu")
    prompt = lm.tokenizer("the cat", return_tensors="pt")["input_ids"]
    output = lm.generate(prompt, max_new_tokens=watch.NEW_TOKENS, sampler=SamplerConfig())
    text = lm.tokenizer.decode(output.sequences[0, 2:], skip_special_tokens=True)
    last = samples(out)[-1]
    assert last == {"step": 6, "prompt": "the cat", "text": text, "nfe": output.nfe, "tpf": output.tpf}
    assert len({sample["text"] for sample in samples(out)}) > 1  # it learns between samples


def test_the_control_arms_last_sample_is_transformers_greedy_text(run) -> None:
    out = run(objective__name="ar", **SAMPLED)
    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    last = samples(out)[-1]
    prompt = tokenizer(last["prompt"], return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=watch.NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    assert last["text"] == tokenizer.decode(written, skip_special_tokens=True)
    assert last["nfe"] == len(written)
    assert last["tpf"] == pytest.approx(int((written != tokenizer.eos_token_id).sum()) / len(written))


def test_canvases_anywhere_are_sampled_canvas_after_canvas(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    generate = adapt.DiffusionLM.generate
    monkeypatch.setattr(
        adapt.DiffusionLM, "generate", lambda self, ids, **how: asked.append(how) or generate(self, ids, **how)
    )
    run("anywhere", data__canvas_start="anywhere", data__canvas_length=4, **SAMPLED)
    assert (asked[0]["sampler"].canvas_length, asked[0]["max_new_tokens"]) == (4, watch.NEW_TOKENS)
    run("prompt", data__canvas_length=12, **SAMPLED)
    assert (asked[-1]["sampler"].canvas_length, asked[-1]["max_new_tokens"]) == (None, 12)


def test_the_default_prompt_is_the_first_examples(run, folder: Path) -> None:
    first = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    assert {sample["prompt"] for sample in samples(run(**SAMPLED))} == {first["prompt"]}


def test_the_module_modes_and_the_random_state_come_back_even_if_decoding_fails() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()

    def fails() -> None:
        with watch._undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        fails()
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


class Layer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1


def test_nothing_is_compiled_for_a_sample() -> None:
    from torch._dynamo.testing import CompileCounter

    counter, layer = CompileCounter(), Layer()
    layer.compile(backend=counter, dynamic=False)
    layer(torch.ones(1, 2))
    assert counter.frame_count == 1
    with watch._undisturbed(layer):
        for length in range(2, 6):
            layer(torch.ones(length, 2))
    layer(torch.ones(1, 2))
    assert counter.frame_count == 1


def test_a_sample_stands_under_the_one_before_it_in_a_log_file(run, capsys) -> None:
    out = run(**SAMPLED)
    second, third = samples(out)[1:]
    shown = " ".join(capsys.readouterr().err.split("sample: ")[-1].split())
    heading = f"{third['nfe']} forwards, {third['tpf']:.2f} tokens per forward"
    texts = f"prompt {third['prompt']} step 4 {second['text']} step 6 {third['text']}"
    assert shown.startswith(f"{heading} {texts}")


def test_a_resumed_run_repeats_no_sample_and_shows_the_last_one_again(run, capsys) -> None:
    settings = {"training__sample_steps": 1, "training__save_steps": 4}
    whole, out = run("whole", **settings), run("cut", **settings)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    capsys.readouterr()
    run("cut", **settings)
    assert samples(out) == samples(whole)
    assert losses(out) == losses(whole)
    assert "  step 4  " in capsys.readouterr().err


def test_a_sample_that_cannot_be_decoded_is_told_and_the_run_goes_on(run, monkeypatch, capsys) -> None:
    def refuse(*args, **how):
        raise ValueError("the model computes NaN here")

    with monkeypatch.context() as patched:
        patched.setattr(adapt.DiffusionLM, "generate", refuse)
        out = run("watched", **SAMPLED)
    assert "sample of step 4: not decoded: the model computes NaN here\n" in capsys.readouterr().err
    assert samples(out) == []
    assert_same_run(out, run("alone"))


def test_the_time_of_samples_is_in_no_rate(run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(step=3.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: next(now)))  # of samples alone: 3 s each
    left_out: list[float] = []
    monkeypatch.setattr(RunningMetrics, "leave_out", lambda self, seconds: left_out.append(seconds))
    run(**SAMPLED)
    assert left_out == [3.0] * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"training__sample_prompt": ""}, "training.sample_prompt='': is empty"),
        ({"training__sample_steps": -1}, "training.sample_steps=-1: must be from 0 to "),
        (
            {"training__sample_steps": 1, "training__sample_prompt": "cat " * 300},
            "training.sample_prompt: has 300 tokens, and with the 64 .* more than the 256 positions",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_weights_are_loaded(run, tmp_path, settings, message) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        run(**settings)
    assert not (tmp_path / "out" / "config.yaml").exists()
    if isinstance(refused.value, ValueError):
        import re

        assert re.search(message, str(refused.value))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "deepspeed, objective",
    [
        ("zero3", "nelbo"),
        *(
            pytest.param(deepspeed, objective, marks=pytest.mark.exhaustive)
            for deepspeed, objective in [(None, "nelbo"), ("zero2", "nelbo"), ("zero3", "ar")]
        ),
    ],
)
def test_two_ranks_sample_what_one_does_and_their_curve_does_not_change(folder, tmp_path, deepspeed, objective) -> None:
    task = {"objective__name": objective, "data__canvas_length": 12}

    def on_two(name: str, **more) -> Path:
        settings = {"training__micro_batch_size": 4, "training__deepspeed": deepspeed, **task}
        argv = recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / name, **settings, **more)
        said = train_ranks(argv, tmp_path / f"{name}.log")
        assert said.count("forwards, ") == (3 if more else 0)  # rank 0 alone shows them
        return tmp_path / name

    watched = on_two("watched", **SAMPLED)
    if (deepspeed, objective) == ("zero3", "nelbo"):  # where all ranks take part
        assert_same_run(watched, on_two("alone"))
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / "one", **task, **SAMPLED)
    one = train.train(parse_recipe(argv)).parent
    assert list(losses(watched).values()) == pytest.approx(list(losses(one).values()), rel=2e-6)
    assert [sample["text"] for sample in samples(watched)] == [sample["text"] for sample in samples(one)]
