"""A recipe: YAML plus dotted overrides. The sections are in `sections.py` and `model_section.py`; here is what must hold between them.

adapt train --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4 --data.train my.jsonl
python -m adapt.training.recipe whole.yaml --config ...      the recipe with all overrides and defaults, as a file
"""

from __future__ import annotations

import difflib
import functools
import sys
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .model_section import ModelConfig
from .sections import DataConfig, NoiseConfig, ObjectiveConfig, TrainingConfig

if TYPE_CHECKING:
    from ..arguments import CommandParser


@dataclass(frozen=True)
class Recipe:
    """One training run. Field docs hold units and defaults."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        anywhere, block = self.data.canvas_start == "anywhere", self.model.attention == "block"
        ar, noise, objective = self.objective.name == "ar", self.noise, self.objective
        if not ar and not noise.covers_all_times and (objective.weight == "elbo" or objective.complementary):
            raise ValueError(
                f"noise.t_min={noise.t_min} and noise.t_max={noise.t_max}: the NELBO and complementary views need all times; set "
                "them to 0.01 or less and 0.99 or more, or objective.weight=uniform and objective.complementary=false"
            )
        if noise.kind != "absorbing" and (
            objective.complementary or objective.weight == "cart" or objective.distill_weight
        ):
            raise ValueError(
                f"noise.kind={noise.kind}: complementary views, objective.weight=cart and objective.distill_weight are defined "
                "for absorbing noise; set them back"
            )
        if self.training.eval_steps is not None and self.data.eval is None:
            raise ValueError(
                f"training.eval_steps={self.training.eval_steps}: nothing to score; set data.eval, such as 0.05, or leave it out"
            )
        clean_target = anywhere or (block and self.model.clean_context != "block")
        if objective.ar_weight and not clean_target:
            raise ValueError(
                f"objective.ar_weight={objective.ar_weight}: there is a clean, causal target to predict only with "
                "model.attention=block and clean_context=causal, or with data.canvas_start=anywhere; set one, or ar_weight to 0"
            )
        if block and (self.data.canvas_length is not None or anywhere):
            raise ValueError(
                f"data.canvas_length={self.data.canvas_length} and data.canvas_start={self.data.canvas_start}: with "
                "model.attention=block the canvases are the blocks; leave both out"
            )
        if objective.block_sizes:
            last = objective.block_sizes[max(objective.block_sizes)]
            if not block or last != self.model.block_size:
                raise ValueError(
                    f"objective.block_sizes={objective.block_sizes}: needs model.attention=block, and must end at "
                    f"model.block_size={self.model.block_size}"
                )
        if objective.anneal_steps and block:
            raise ValueError(
                f"objective.anneal_steps={objective.anneal_steps}: block attention is annealed by growing blocks; use "
                "objective.block_sizes, such as {0: 1, 200: 4, 600: 32}"
            )
        if self.objective.complementary and anywhere:
            raise ValueError(
                "objective.complementary=true: with data.canvas_start=anywhere the views of an example cover different "
                "tokens; set one of them back"
            )

    def as_yaml(self) -> str:
        """The resolved recipe, which loads again as a recipe."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    def save(self, path: Path) -> None:
        """Writes it to a file."""
        path.write_text(self.as_yaml(), encoding="utf-8")


def ignored_by_ar(recipe: Recipe) -> list[str]:
    """The settings of objective and noise that are not the defaults and mean nothing to the AR objective."""
    ours = {"objective": (recipe.objective, ObjectiveConfig(name="ar")), "noise": (recipe.noise, NoiseConfig())}
    return [
        f"{section}.{field.name}"
        for section, (given, default) in ours.items()
        for field in fields(given)
        if getattr(given, field.name) != getattr(default, field.name)
    ]


def _no_recipe(file: Path) -> str | None:
    """Why that file cannot be read as a recipe, and what to do; None if it can."""
    if file.is_dir():
        return "is a folder; give a recipe in it, a YAML file"
    if not file.exists():
        beside = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, beside, n=1)
        return f"no such file; did you mean {file.with_name(near[0])}?" if near else "no such file; give a recipe"
    try:
        sections = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" (line {mark.line + 1}: {problem})" if mark else ""
        return f"is no YAML{where}; give a recipe"
    if not isinstance(sections, dict):
        return f"is no recipe, which has the sections {', '.join(sorted(section.name for section in fields(Recipe)))}"
    for name, settings in sections.items():
        if not isinstance(settings, dict):
            return f"{name} holds no settings but {settings!r}; write some under it, or leave it out"
    return None


def check_files(parser: CommandParser, argv: list[str]) -> None:
    """Exits with 2 where a `--config FILE` among the arguments cannot be read as a recipe."""
    given = [value for option, value in pairwise(argv) if option == "--config"]
    for file in [*given, *(option.removeprefix("--config=") for option in argv if option.startswith("--config="))]:
        if why := _no_recipe(Path(file)):
            parser.error(f"config={file}: {why}")


@functools.cache  # building it takes 0.07 s, most of it to find the fields' docstrings in the source
def _parser(description: str | None) -> CommandParser:
    from ..arguments import CommandParser

    parser = CommandParser(prog="adapt train", description=description)
    parser.add_argument("--config", action="config", help="a recipe; later arguments override it")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_class_arguments(Recipe, as_group=False)
    return parser


def parse_recipe(argv: list[str], description: str | None = None) -> Recipe:
    """The recipe of a command line: `--config FILE` and dotted overrides. Exits with 2 on unknown keys and wrong types."""
    parser = _parser(description)
    check_files(parser, argv)
    namespace = parser.parse_args(argv)
    config = parser.instantiate(namespace)
    return Recipe(config.model, config.data, config.training, config.noise, config.objective)


if __name__ == "__main__":
    try:
        parse_recipe(sys.argv[2:]).save(Path(sys.argv[1]))
    except ValueError as refused:
        sys.exit(f"adapt train: error: {refused}")
