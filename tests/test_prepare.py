"""Which attention kernel a run takes, for its model and its device."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import losses, recipe_argv, write_base, write_pairs
from transformers import (
    BioGptConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    StableLmConfig,
)
from transformers.integrations.flex_attention import flex_attention_forward

from adapt.training.checkpoints.run_folder import begin_run
from adapt.training.recipe import DataConfig, ModelConfig, Recipe, TrainingConfig, parse_recipe
from adapt.training.start_model import attention_kernel, diffusion_checkpoint, probe_kernel
from adapt.training.train import train

NO_DROPOUT = {"attention_dropout": 0.0}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
WITH_DROPOUT = {"attention_dropout": 0.1}


def recipe(**model) -> Recipe:
    return Recipe(
        ModelConfig(base="owner/name", **model),
        DataConfig(train="x.jsonl"),
        TrainingConfig(output_dir="x", num_steps=1),
    )


@pytest.mark.parametrize(
    ("config", "device", "compiled", "kernel"),
    [
        (LlamaConfig(**NO_DROPOUT), "cuda", False, "flex_attention"),
        (LlamaConfig(**NO_DROPOUT), "cpu", False, "sdpa_pieces"),
        (LlamaConfig(**SMALL), "cuda", False, "sdpa_pieces"),
        (LlamaConfig(**WITH_DROPOUT), "cuda", False, "sdpa_pieces"),
        (LlamaConfig(**WITH_DROPOUT), "cuda", True, "sdpa"),
        (BioGptConfig(), "cuda", False, "sdpa_pieces"),
        (GPT2Config(attn_pdrop=0.0), "cuda", False, "sdpa_pieces"),
        (Gemma2Config(**SMALL, sliding_window=8), "cuda", False, "flex_attention"),
        (Gemma2Config(**SMALL, sliding_window=8), "cpu", False, "eager"),
        (Gemma2Config(**SMALL, sliding_window=8), "cpu", True, "eager"),
        (StableLmConfig(**SMALL), "cuda", False, "sdpa"),
        (FalconConfig(**SMALL), "cpu", False, "sdpa"),
        (OPTConfig(**SMALL, **NO_DROPOUT), "cpu", False, "sdpa_pieces"),
    ],
    ids=[
        *(
            "llama",
            "cpu",
            "small heads",
            "dropout",
            "dropout, compiled",
            "dropout by another name",
            "not in transformers",
        ),
        *("gemma2", "gemma2, cpu", "gemma2, compiled", "hands on no pieces", "knows two kernels", "positions"),
    ],
)
def test_the_default_kernel_is_the_fastest_that_transformers_trains_the_model_with(
    config: PretrainedConfig, device: str, compiled: bool, kernel: str
) -> None:
    assert attention_kernel(recipe(torch_compile=compiled), config, device) == kernel


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SMALL), "takes heads of 16 dimensions or more, and the base's have 8"),
        (LlamaConfig(**WITH_DROPOUT), "takes no dropout, and the base's config.json has attention_dropout=0.1"),
        (GPT2Config(), "transformers' gpt2 does not run with it"),
    ],
    ids=["small heads", "dropout", "gpt2"],
)
def test_flex_attention_that_was_asked_for_is_refused_by_name(config: PretrainedConfig, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^model.attn_implementation=flex_attention: .*{re.escape(said)}; use eager"):
        attention_kernel(recipe(attn_implementation="flex_attention"), config)


def test_flex_attention_is_refused_where_there_is_no_gpu_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"^model.attn_implementation=flex_attention: has no backward pass on a CPU"):
        attention_kernel(recipe(attn_implementation="flex_attention"), LlamaConfig(), "cpu")


def test_on_a_gpu_a_conversion_is_probed_with_a_kernel_of_the_cpu_that_it_runs_on(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_kernel(recipe(), LlamaConfig()) == "flex_attention"
    assert probe_kernel(recipe(), LlamaConfig()) == "sdpa_pieces"
    assert probe_kernel(recipe(attn_implementation="eager"), LlamaConfig()) == "eager"


def test_transformers_refuses_what_we_refuse() -> None:
    with pytest.raises(ValueError, match="does not support `dropout`"):
        flex_attention_forward(None, None, None, None, None, dropout=0.1)  # pyright: ignore[reportArgumentType]


def test_a_base_with_attention_dropout_trains_and_with_flex_attention_nothing_is_written(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base, **WITH_DROPOUT)
    argv = recipe_argv(base, write_pairs(tmp_path / "pairs.jsonl", rows=16), tmp_path / "out", training__num_steps=1)
    with pytest.raises(ValueError, match=r"has attention_dropout=0\.1"):
        train(parse_recipe([*argv, "--model.attn_implementation", "flex_attention"]))
    assert not (tmp_path / "out" / "converted").exists()
    train(parse_recipe(argv))
    assert list(losses(tmp_path / "out")) == [1]


def test_what_was_converted_earlier_goes_with_the_same_base_alone(tmp_path: Path) -> None:
    """By content: a base that was moved is the same, other weights under its path are not."""
    base, out = write_base(tmp_path / "base"), tmp_path / "out"

    def converted(base: Path) -> Path:
        named = replace(recipe(), model=ModelConfig(base=str(base)))
        return diffusion_checkpoint(named, out, is_main=True)

    begin_run(out)
    assert converted(base) == out / "converted"
    base = base.rename(tmp_path / "moved")
    assert converted(base) == out / "converted"
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(base, tmp_path / "base")
    with pytest.raises(ValueError, match=r"earlier from .*moved;"):
        converted(tmp_path / "base")
    with pytest.raises(ValueError, match=r"earlier from .*moved, where model.safetensors has changed since; remove it"):
        converted(base)
    (out / "converted_from.json").unlink()  # a run from before it was written
    assert converted(tmp_path / "base") == out / "converted"
    (out / "converted_from.json").unlink()
    with pytest.raises(ValueError, match="was converted earlier from base; remove it"):
        converted(base)
