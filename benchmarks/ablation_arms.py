"""The arms of the ablation, most wanted first: what each changes in a recipe. A new arm is a new line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""learning rates that may be tried"""
REFERENCE = "block 16"
_BIDIRECTIONAL = {"model.attention": "bidirectional"}
_BLOCK_16 = {"model.attention": "block", "model.block_size": 16}
_SHIFT_AND_AR = {"model.shift_logits": True, "objective.ar_weight": 1.0}


@dataclass(frozen=True)
class Arm:
    settings: dict[str, Any]
    """of a recipe; "@0.5" stands for the step at that share of the run"""
    first_rates: tuple[float, float] = (1e-3, 3e-3)
    """neighbours in LADDER, from which tuning walks on to the side that is better, until the best has a worse one on either side"""
    from_scratch: bool = False
    """random weights instead of the base's"""
    copies: int = field(init=False)
    """tokens of a row that a token of a text takes at most: its noisy views, and a clean copy for block attention"""

    def __post_init__(self) -> None:
        views = int(self.settings.get("objective.views", 1))
        object.__setattr__(self, "copies", views + (self.settings.get("model.attention") == "block"))


ARMS: dict[str, Arm] = {
    REFERENCE: Arm(_BLOCK_16),
    "block 16, shift": Arm({**_BLOCK_16, "model.shift_logits": True}),
    "bidirectional": Arm(_BIDIRECTIONAL),
    "bidirectional, shift": Arm({**_BIDIRECTIONAL, "model.shift_logits": True}),
    "bidirectional, shift, annealed": Arm(
        {**_BIDIRECTIONAL, "model.shift_logits": True, "objective.anneal_steps": "@0.5"}
    ),
    "block 16, from scratch": Arm(_BLOCK_16, first_rates=(3e-3, 1e-2), from_scratch=True),
    "bidirectional, from scratch": Arm(_BIDIRECTIONAL, first_rates=(3e-3, 1e-2), from_scratch=True),
    "block 4": Arm({**_BLOCK_16, "model.block_size": 4}),
    "block 32": Arm({**_BLOCK_16, "model.block_size": 32}),
    "block 16, AR loss": Arm({**_BLOCK_16, "objective.ar_weight": 1.0}),
    "block 16, distillation": Arm({**_BLOCK_16, "objective.distill_weight": 1.0}),
    "block 16, complementary": Arm({**_BLOCK_16, "objective.views": 2, "objective.complementary": True}),
    "block 16, curriculum 1, 4, 16": Arm({**_BLOCK_16, "objective.block_sizes": {"0": 1, "@0.2": 4, "@0.5": 16}}),
    "block 16, LoRA": Arm({**_BLOCK_16, "model.lora.r": 16, "model.lora.alpha": 32}, first_rates=(3e-3, 1e-2)),
    "block 16, clean context block": Arm({**_BLOCK_16, "model.clean_context": "block"}),
    "block 16, shift, AR loss": Arm({**_BLOCK_16, **_SHIFT_AND_AR}),
    "block 16, weight uniform": Arm({**_BLOCK_16, "objective.weight": "uniform"}),
    "block 16, weight cart": Arm({**_BLOCK_16, "objective.weight": "cart"}),
    "bidirectional, uniform noise": Arm({**_BIDIRECTIONAL, "noise.kind": "uniform"}),
    "bidirectional, hybrid noise": Arm({**_BIDIRECTIONAL, "noise.kind": "hybrid"}),
    "block 16, shift, AR loss, weight cart": Arm({**_BLOCK_16, **_SHIFT_AND_AR, "objective.weight": "cart"}),
    "block 16, shift, AR loss, complementary": Arm(
        {**_BLOCK_16, **_SHIFT_AND_AR, "objective.views": 2, "objective.complementary": True}
    ),
    "block 16, shift, AR loss, curriculum 1, 4, 16": Arm(
        {**_BLOCK_16, **_SHIFT_AND_AR, "objective.block_sizes": {"0": 1, "@0.2": 4, "@0.5": 16}}
    ),
    "block 4, shift, AR loss, weight cart": Arm(
        {**_BLOCK_16, "model.block_size": 4, **_SHIFT_AND_AR, "objective.weight": "cart"}
    ),
    "block 16, shift, AR loss, weight uniform": Arm({**_BLOCK_16, **_SHIFT_AND_AR, "objective.weight": "uniform"}),
    "block 16, shift, AR loss, distillation": Arm({**_BLOCK_16, **_SHIFT_AND_AR, "objective.distill_weight": 1.0}),
}


def recipe_arguments(arm: Arm, settings: dict[str, Any], num_steps: int) -> list[str]:
    """The command line of a run: `settings`, then the arm's own, with shares of the run as steps."""

    def steps(value: Any) -> Any:
        if isinstance(value, dict):
            return {steps(key): inner for key, inner in value.items()}
        if isinstance(value, str) and value.startswith("@"):
            return max(1, round(float(value[1:]) * num_steps))
        return value

    argv: list[str] = []
    for setting, value in {**settings, **arm.settings}.items():
        value = steps(value)
        argv += [f"--{setting}", str(value) if isinstance(value, (str, Path)) else json.dumps(value)]
    return argv
