"""Every shipped recipe trains a tiny model of its architecture, and the lines on top of it are true."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from training_fixtures import losses, tiny_tokenizer, write_pairs
from transformers import AutoConfig, AutoModelForCausalLM

from adapt.planning import plan
from adapt.training.recipe import parse_recipe
from adapt.training.train import train

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p.relative_to(ROOT) for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "quickstart")
FAMILIES = sorted({recipe.parent for recipe in RECIPES})
# One of each attention, objective, adapter and kind of layer; the others are exhaustive.
REPRESENTATIVES = (
    *(
        "smollm2-135m/block",
        "smollm2-135m/bidirectional",
        "smollm2-135m/control",
        "qwen3-0.6b/prefix",
        "qwen3-0.6b/qlora",
    ),
    *("gemma-3-1b/lora", "gpt2-124m/bidirectional", "qwen3-30b-a3b/block"),
)
PLANNED = ("smollm2-135m/prefix", "qwen3-0.6b/qlora", "qwen3-30b-a3b/block")


def every_recipe(representatives: tuple[str, ...]) -> pytest.MarkDecorator:
    assert set(representatives) <= {f"{recipe.parent.name}/{recipe.stem}" for recipe in RECIPES}
    cases = []
    for recipe in RECIPES:
        name = f"{recipe.parent.name}/{recipe.stem}"
        cases.append(pytest.param(recipe, marks=() if name in representatives else pytest.mark.exhaustive, id=name))
    return pytest.mark.parametrize("recipe", cases)


# The config.json of each folder holds the shape and no more; models of one shape (base, -it, -Instruct) share it. Compared with
# other people's tables, not with the Hub: litgpt/config.py of Lightning-AI/litgpt at 26857050 (Qwen3, Llama, Gemma 3 1B, Mistral 7B
# v0.3, SmolLM2), src/fairseq2/models/olmo/config.py of facebookresearch/fairseq2 at 1d050dd0 (OLMo 2 1B),
# tunix/models/gemma3/model.py of google/tunix at 0027ed2b (Gemma 3 270M), transformers' GPT2Config. Gemma 3 1B has 131,072 positions
# there and 32,768 here, of which no figure depends. The numbers of parameters are written down so that a shape does not change
# unseen; a tied head counts once.
PARAMETERS = {
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gpt2-124m": 124_439_808,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "olmo-2-1b": 1_484_916_736,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
# What is the recipe's own stays: attention, block size, shift, losses, adapters, 4 bits, checkpointing, optimizer, schedule.
HERE = {
    "data.seq_len": 128,
    "data.num_workers": 0,
    "training.num_epochs": "null",
    "training.num_steps": 2,
    "training.global_batch_size": 2,
    "training.micro_batch_size": 2,
    "training.warmup_steps": 1,
    "training.save_steps": 0,
    "training.deepspeed": "null",  # the stages have tests of their own
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows=16)


def tiny_base(family: Path, folder: Path) -> Path:
    """A random model of the family's architecture with its config.json made small."""
    shape = json.loads((ROOT / family / "config.json").read_text())
    small = {key: TINY[key] for key in TINY if shape.get(key) is not None}
    kv = 4 if shape.get("num_key_value_heads") == shape.get("num_attention_heads") else 2
    small |= {"num_key_value_heads": min(kv, shape["num_key_value_heads"])} if "num_key_value_heads" in shape else {}
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape, **small, **ids, "initializer_range": 0.2})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@every_recipe(REPRESENTATIVES)
def test_a_tiny_model_of_its_architecture_takes_two_steps(recipe: Path, pairs: Path, tmp_path: Path) -> None:
    base = tiny_base(recipe.parent, tmp_path / "base")
    settings = {**HERE, "model.base": base, "data.train": pairs, "training.output_dir": tmp_path / "run"}
    text = (ROOT / recipe).read_text()
    settings |= {"data.canvas_length": 16} if "canvas_length" in text else {}
    settings |= {"objective.anneal_steps": 1} if "anneal_steps" in text else {}
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    final = train(parse_recipe(["--config", str(ROOT / recipe), *argv]))
    curve = losses(tmp_path / "run")
    assert sorted(curve) == [1, 2]
    assert all(0 < loss < 100 for loss in curve.values())
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(final).state_dict()
    moved = [
        name for name, tensor in after.items() if not torch.equal(tensor.float()[: len(before[name])], before[name])
    ]
    assert len(moved) > len(after) / 4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_shape_has_the_number_of_parameters_that_its_model_has(family: Path) -> None:
    config = AutoConfig.from_pretrained(ROOT / family / "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[family.name]


@every_recipe(PLANNED)
def test_the_lines_on_top_are_its_command_and_its_memory(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / recipe).read_text().splitlines()
    commands = [shlex.split(line.lstrip("# ")) for line in lines if line.startswith("#   ")]
    run, of_memory = commands
    launcher = ["deepspeed", "adapt"].index(run[0])
    argv = run[run.index("--config") :]
    assert argv[1] == str(recipe)
    assert parse_recipe(argv).data.train == argv[argv.index("--data.train") + 1]
    assert launcher == 1 or run[run.index("--config") - 1] == "recipes/train.py"
    ranks = 1 if launcher == 1 else 0
    if "--num_gpus" in run:
        ranks = int(run[run.index("--num_gpus") + 1])
    elif "--hostfile" in run:
        ranks = sum(map(int, re.findall(r"slots=(\d+)", (ROOT / run[run.index("--hostfile") + 1]).read_text())))
    assert of_memory[of_memory.index("--gpus") + 1] == str(ranks)

    assert of_memory[:4] == ["adapt", "plan", "--config", str(recipe)]
    plan.main([*of_memory[2:], "--json", "true"])
    ways = json.loads(capsys.readouterr().out)["bytes_per_rank"]
    total = next(way["total"] for way in ways if way["is_recipes"])
    assert f"# Memory of each GPU, computed and not measured: {total / 1e9:.1f} GB" in lines


def test_recipes_set_what_the_page_of_ablations_says_of_them() -> None:
    made = {
        str(recipe.parent.name + "/" + recipe.stem): parse_recipe(["--config", str(ROOT / recipe)])
        for recipe in RECIPES
    }
    blocks = {name: one for name, one in made.items() if one.model.attention == "block"}
    assert len(blocks) > 10
    for name, one in blocks.items():
        assert one.model.shift_logits is True, name
        assert (one.objective.ar_weight, one.objective.weight) == (1, "uniform"), name
        assert (one.objective.block_sizes, one.objective.complementary, one.model.clean_context) == ({}, False, None), (
            name
        )
    assert [name for name, one in made.items() if one.objective.distill_weight] == ["qwen3-0.6b/qlora"]
