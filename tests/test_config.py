"""A recipe is YAML plus dotted overrides; what it says is checked where it is read."""

from pathlib import Path

import pytest
import yaml

from adapt.training.model_section import LoraConfig, ModelConfig
from adapt.training.recipe import Recipe, parse_recipe
from adapt.training.sections import DataConfig, ObjectiveConfig, TrainingConfig

MINIMAL = {
    "model": {"base": "some/model"},
    "data": {"train": "a.jsonl"},
    "training": {"output_dir": "out", "num_steps": 3},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(recipe_file: str) -> None:
    recipe = parse_recipe(
        ["--config", recipe_file, "--training.learning_rate", "2e-4", "--data.train", '["a.jsonl", "b.jsonl"]']
    )
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.model == ModelConfig(base="some/model")
    assert recipe.objective == ObjectiveConfig()


def test_local_rank_of_the_deepspeed_launcher_is_accepted(recipe_file: str) -> None:
    assert parse_recipe(["--local_rank=1", "--config", recipe_file]) == parse_recipe(["--config", recipe_file])


def test_a_saved_recipe_loads_again_as_itself(tmp_path: Path) -> None:
    recipe = Recipe(
        ModelConfig("m", lora=LoraConfig(r=4, target_modules=["q_proj"])),
        DataConfig(["a.jsonl"], columns={"prompt": "question", "completion": "answer"}, canvas_length=8),
        TrainingConfig(
            "out",
            num_epochs=1.5,
            lr_scheduler_options={"min_lr_rate": 0.1, "decay_type": "cosine"},
            report_to=["wandb"],
        ),
    )
    recipe.save(tmp_path / "config.yaml")
    assert parse_recipe(["--config", str(tmp_path / "config.yaml")]) == recipe


def test_lora_can_be_switched_on_by_one_setting(recipe_file: str) -> None:
    assert parse_recipe(["--config", recipe_file, "--model.lora.r", "4"]).model.lora == LoraConfig(r=4)


@pytest.mark.parametrize("world_size, micro, steps", [(1, 8, 1), (2, 4, 1), (1, 2, 4), (4, 1, 2)])
def test_accumulation_makes_up_the_global_batch(world_size: int, micro: int, steps: int) -> None:
    training = TrainingConfig("out", num_steps=1, global_batch_size=8, micro_batch_size=micro)
    assert training.accumulation_steps(world_size) == steps


def test_batch_sizes_that_do_not_divide_name_the_next_that_does() -> None:
    training = TrainingConfig("out", num_steps=1, global_batch_size=10, micro_batch_size=4)
    with pytest.raises(ValueError, match=r"global_batch_size=10: .*micro_batch_size=4 x 2 ranks = 8; try 16"):
        training.accumulation_steps(2)


def test_an_abbreviated_setting_is_refused(recipe_file: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(["--config", recipe_file, "--training.learning_rat", "1"])
    assert "did you mean training.learning_rate?" in capsys.readouterr().err
