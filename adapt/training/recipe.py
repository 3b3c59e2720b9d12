"""A recipe: YAML plus dotted overrides. The sections are in `sections.py` and `model_section.py`; here is what must hold between them.

adapt train --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4 --data.train my.jsonl
python -m adapt.training.recipe whole.yaml --config ...      the recipe with all overrides and defaults, as a file
"""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]

from ..arguments import CommandParser
from ..files.user_text import user_yaml, yaml_text
from ..settings.bounds import Bounds, check_value, dataclass_in, hints, shown
from .model_section import ModelConfig
from .sections import DataConfig, NoiseConfig, ObjectiveConfig, TrainingConfig


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
        return yaml_text(asdict(self))

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


def recipe_sections(file: Path) -> dict[str, dict[str, Any]]:
    """What a recipe says, {section: {setting: value}}; ValueError where it is no recipe, or a value is not of its setting's type.

    The file is read once: it may be a pipe.
    """
    found = user_yaml(file, "config", "a recipe")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"config={file}: is no recipe, which has the sections {', '.join(sorted(hints(Recipe)))}")
    for section, settings in found.items():
        known = hints(Recipe).get(section)
        if known is None:
            raise ValueError(f"config={file}: unknown section {shown(section)}; {_instead(section, hints(Recipe))}")
        if not isinstance(settings, dict):
            raise ValueError(
                f"config={file}: {section} holds no settings but {shown(settings)}; write some under it, or leave it out"
            )
        _check_section(file, section, settings, known)
    return found


def _check_section(file: Path, section: str, settings: dict[str, Any], known: type) -> None:
    for name, value in settings.items():
        hint = hints(known).get(name)
        if hint is None:
            raise ValueError(
                f"config={file}: unknown setting {section}.{name}; {_instead(name, hints(known), section)}"
            )
        if isinstance(value, dict) and (inner := dataclass_in(hint)):
            _check_section(file, f"{section}.{name}", value, inner)
            continue
        try:
            check_value(f"{section}.{name}", value, hint)
        except ValueError as error:
            raise ValueError(f"config={file}: {error}") from None


def _instead(name: object, known: Collection[str], section: str = "") -> str:
    prefix = f"{section}." if section else ""
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"did you mean {prefix}{near[0]}?"
    return f"allowed are {', '.join(sorted(known))}"


class RecipeFile(ActionConfigFile):
    """`--config FILE`, whose place among the arguments counts: later ones override it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            sections = recipe_sections(Path(values))
        except ValueError as error:
            parser.error(str(error))
        ActionConfigFile.apply_config(parser, cfg, self.dest, json.dumps(sections, ensure_ascii=False))
        cfg[self.dest][-1] = values


@functools.cache  # building it takes 0.07 s, most of it to find the fields' docstrings in the source
def _parser(description: str | None) -> CommandParser:
    parser = CommandParser(prog="adapt train", description=description)
    parser.add_argument("--config", action=RecipeFile, help="a recipe; later arguments override it")
    parser.option(
        "--local_rank", type=Annotated[int, Bounds(-1, 2**16)], default=-1, help="set by the deepspeed launcher"
    )
    parser.settings_of(Recipe)
    return parser


def parse_recipe(argv: list[str], description: str | None = None) -> Recipe:
    """The recipe of a command line: `--config FILE` and dotted overrides. Exits with 2 on unknown keys and wrong types."""
    parser = _parser(description)
    config = parser.instantiate(parser.parse_args(argv))
    return Recipe(config.model, config.data, config.training, config.noise, config.objective)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("adapt train: error: name the file that the recipe is written to")
    try:
        parse_recipe(sys.argv[2:]).save(Path(sys.argv[1]))
    except ValueError as refused:
        sys.exit(f"adapt train: error: {refused}")
