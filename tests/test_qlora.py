"""QLoRA on an NF4 base, and 8-bit AdamW, by bitsandbytes on CPU."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import losses, recipe_argv, train_ranks, write_base, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt.training import lora, train
from adapt.training.recipe import parse_recipe

SETTINGS = {
    "model__quantization": "nf4",
    "model__lora": {"r": 4},
    "training__num_steps": 30,
    "training__learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    write_base(folder / "base", hidden_size=64, intermediate_size=128)
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "nf4", **SETTINGS)
    return train.train(parse_recipe(argv)).parent


def test_the_loss_falls_and_the_base_is_in_four_bits(run: Path, folder: Path) -> None:
    curve = losses(run)
    assert sum(curve[step] for step in (28, 29, 30)) < 0.8 * sum(curve[step] for step in (1, 2, 3))
    model = AutoModelForCausalLM.from_pretrained(run / "converted", quantization_config=lora.nf4(torch.float32))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.model.embed_tokens.weight.dtype.is_floating_point


def test_the_merged_folder_is_the_adapter_on_the_dequantised_base(run: Path) -> None:
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(
        run / "converted", dtype=torch.float32, quantization_config=lora.nf4(torch.float32)
    ).dequantize(dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged(tokens).logits, want, rtol=1e-4, atol=1e-4)

    # Merged into the weights as they were before rounding it would be another model.
    plain = AutoModelForCausalLM.from_pretrained(run / "converted", dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(plain, str(run / "adapter")).eval()(tokens).logits
    assert (other - want).abs().max() > 0.01


def test_the_result_is_an_ordinary_checkpoint_whose_embedding_differs_at_the_mask_token_only(run: Path) -> None:
    found = adapt.load(run / "model", device="cpu")
    assert getattr(found.model.config, "quantization_config", None) is None
    mask = AutoTokenizer.from_pretrained(run / "model").mask_token_id
    before, after = (
        load_file(run / name / "model.safetensors")["model.embed_tokens.weight"] for name in ("converted", "model")
    )
    assert (before != after).any(1).nonzero().flatten().tolist() == [mask]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=pytest.mark.exhaustive), "zero3"])
def test_two_ranks_have_the_curve_of_one(stage: str, folder: Path, run: Path) -> None:
    settings = {**SETTINGS, "training__deepspeed": stage, "training__micro_batch_size": 4, "training__num_steps": 4}
    settings["training__lr_scheduler"] = "constant"
    one = {**settings, "training__deepspeed": None, "training__micro_batch_size": 8}
    train.train(parse_recipe(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / f"1-{stage}", **one)))
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / stage, **settings)
    train_ranks(argv, folder / f"{stage}.log")
    assert losses(folder / stage) == pytest.approx(losses(folder / f"1-{stage}"), rel=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model__lora": None}, "model.quantization=nf4: 4-bit weights cannot be trained themselves; set model.lora"),
        (
            {"model__torch_compile": True},
            "model.quantization=nf4: does not go with model.torch_compile=true",
        ),
        ({"model__quantization": "int2"}, "model.quantization=int2: choose one of nf4"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(settings: dict, message: str, capsys, tmp_path: Path) -> None:
    argv = recipe_argv(tmp_path, tmp_path / "data.jsonl", tmp_path / "out", **{**SETTINGS, **settings})
    with pytest.raises((SystemExit, ValueError)) as refused:
        parse_recipe(argv)
    assert message in str(refused.value) + capsys.readouterr().err


def test_eight_bit_adamw_keeps_its_moments_in_bytes_and_follows_adamws_curve(folder: Path, monkeypatch) -> None:
    import bitsandbytes

    dtypes: list[torch.dtype] = []
    step = bitsandbytes.optim.AdamW.step

    def spy(self, closure=None):
        out = step(self, closure)
        dtypes.extend(state["state1"].dtype for state in self.state.values())
        return out

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", spy)
    for name in ("adamw_8bit", "adamw_torch"):
        settings = {"training__optimizer": name, "training__num_steps": 8}
        train.train(parse_recipe(recipe_argv(folder / "base", folder / "pairs.jsonl", folder / name, **settings)))
    assert torch.uint8 in dtypes
    found, want = losses(folder / "adamw_8bit"), losses(folder / "adamw_torch")
    assert found == pytest.approx(want, rel=0.02)
    assert found != want
