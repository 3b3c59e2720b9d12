"""What legitimate folders hold besides the tensors of their config is taken, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapt
from adapt.conversion.convert import convert
from adapt.export.export import export
from adapt.files.loading import check_loaded, check_weights, model_of
from adapt.files.model_config import check_sizes, without_code


def with_tensors(folder: Path, **more: torch.Tensor) -> Path:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


OLD = {
    "qwen3": {
        "lm_head.weight": torch.ones(320, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    },
    "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 128, 128), "h.1.attn.masked_bias": torch.ones(1)},
}


@pytest.mark.parametrize("kind", OLD)
def test_tied_heads_and_buffers_of_old_checkpoints_are_taken(base_folder, tmp_path: Path, kind: str) -> None:
    base = with_tensors(shutil.copytree(base_folder(kind), tmp_path / "base"), **OLD[kind])
    check_weights(base, "base")
    model_of(base, "base")
    adapt.load(convert(base, tmp_path / "out", attention="prefix"), device="cpu")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "v_head.weight", "model.layers.1.self_attn.q_proj.bias", "lora_A"]
)
def test_a_tensor_that_the_config_does_not_know_is_refused(base_folder, tmp_path: Path, name: str) -> None:
    base = with_tensors(shutil.copytree(base_folder("qwen3"), tmp_path / "base"), **{name: torch.ones(3)})
    for load in (lambda: model_of(base, "base=x"), lambda: convert(base, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"base=.*holds weights that its config.json has no place for .{name}"):
            load()
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_told_before_unexpected_ones() -> None:
    loading = {"missing_keys": {"a"}, "mismatched_keys": set(), "unexpected_keys": {"b"}}
    with pytest.raises(ValueError, match="no weights for a"):
        check_loaded(loading, "x")


def test_what_names_python_is_dropped_at_every_depth() -> None:
    config = {"auto_map": 1, "a": {"custom_generate": 2, "b": [3]}, "custom_pipelines": {}}
    assert without_code(config) == {"a": {"b": [3]}}


def test_lists_of_numbers_that_models_have_are_taken() -> None:
    gpt_neo = {"attention_types": [[["global", "local"], 12]], "num_labels": 2}
    mamba = {"time_step_limit": [0.0, float("inf")], "eos_token_id": [128001, 128009]}
    check_sizes(gpt_neo | mamba | {"no_rope_layers": [1, 0], "sub": {"image_mean": [-0.5], "window": [-1, 4096]}}, "x")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_machine_that_saved_a_model_is_not_asked_for_here(
    base_folder, tmp_path: Path, key: str
) -> None:
    base = shutil.copytree(base_folder("qwen3"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: "flash_attention_2"}))
    assert model_of(base, "base").config._attn_implementation == "sdpa"
    assert model_of(base, "base", attn_implementation="eager").config._attn_implementation == "eager"
    out = convert(base, tmp_path / "out", attention="prefix")
    assert "flash" not in (out / "config.json").read_text()
    spec = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(spec | {key: "flash_attention_2"}))
    adapt.load(out, device="cpu")
    export(out, tmp_path / "exported")
