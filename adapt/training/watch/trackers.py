"""TensorBoard, W&B and trackio through transformers' callbacks: the recipe and samples, which those do not know of, go too."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import yaml
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from ..recipe import Recipe

PROJECT = "adapt-dlm"


class RecipeInTrackers(TrainerCallback):
    """Gives each tracker the recipe, under `recipe`, once it has begun its run."""

    def __init__(self, trainer: Trainer, recipe: Recipe) -> None:
        self.trainer, self.recipe = trainer, asdict(recipe)
        if "wandb" in recipe.training.report_to and trainer.is_world_process_zero():
            import wandb

            # transformers goes on in a run that has begun; its own would lie in wandb/ of wherever this was started.
            wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=os.environ.get("WANDB_DIR", recipe.training.output_dir),
                name=trainer.args.run_name,
            )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        for tracker in _trackers(self.trainer):
            if isinstance(tracker, TensorBoardCallback):
                text = "".join(f"    {line}\n" for line in yaml.safe_dump(self.recipe, sort_keys=False).splitlines())
                writer: Any = tracker.tb_writer
                writer.add_text("recipe", text)  # indented: Markdown's literal block
            elif isinstance(tracker, WandbCallback):
                tracker._wandb.config.update({"recipe": self.recipe}, allow_val_change=True)
            else:
                tracker._trackio.config.update({"recipe": self.recipe}, allow_val_change=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for tracker in _trackers(self.trainer):
            if isinstance(tracker, WandbCallback) and state.is_world_process_zero:
                tracker._wandb.finish()  # else a second run in this process would go on in the first one's


def log_to_trackers(trainer: Trainer, logs: dict[str, Any]) -> None:
    """Logs to the trackers alone, at the step that the run is at: neither metrics.jsonl nor the trainer's state sees it."""
    for tracker in _trackers(trainer):
        tracker.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=logs)


def _trackers(trainer: Trainer) -> list[Any]:
    kinds = (TensorBoardCallback, TrackioCallback, WandbCallback)
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
