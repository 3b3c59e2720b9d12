"""A DeepSpeed checkpoint of N ranks for a run of M: DeepSpeed's universal format, made when it is needed.

    python -m deepspeed.checkpoint.ds_to_universal      what runs here, once, on rank 0

Rows, noise and the loss do not depend on the number of ranks, so the curve goes on as if the run had never stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from ...files import marks

_MADE = "latest_universal"  # DeepSpeed's converter writes it last


def num_shards(checkpoint: Path) -> int:
    """Ranks that ZeRO has split a checkpoint's optimizer over; 0 if it is not ZeRO's."""
    return len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))


def read_on_any_ranks(checkpoint: Path | None, args: TrainingArguments) -> list[TrainerCallback]:
    """Makes DeepSpeed load `checkpoint` on this run's ranks, converting it first where others wrote it.

    Returns callbacks that the Trainer needs for it: none where the number of ranks is the same.
    Raises ValueError if DeepSpeed's converter does not take it; the checkpoint stays as it was.
    """
    if checkpoint is None or args.deepspeed is None or num_shards(checkpoint) in (0, args.world_size):
        return []
    with args.main_process_first(local=False, desc="universal checkpoint"):
        if args.process_index == 0 and not (checkpoint / _MADE).is_file():
            _convert(checkpoint, args.world_size)
    if not (checkpoint / _MADE).is_file():
        raise ValueError(f"training.output_dir: {checkpoint} could not be converted; rank 0 says why")
    args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    return [_MendStage3()]


class _MendStage3(TrainerCallback):
    """Undoes what DeepSpeed's stage 3 does to a universal checkpoint's optimizer, and says nothing of (0.19.8).

    It gives every sub-group the same step tensor, which each of them then counts up, and the weight decay of the first
    parameter group to all; the second of transformers' two has none (norms and biases).
    """

    def on_train_begin(self, args, state, control, optimizer: Any = None, **kwargs) -> None:
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, then DeepSpeed's
            optimizer = optimizer.optimizer
        for one in optimizer.state.values():
            if torch.is_tensor(one.get("step")):
                one["step"] = one["step"].clone()
        for group in optimizer.param_groups[1:]:
            group["weight_decay"] = 0.0


def _convert(checkpoint: Path, world_size: int) -> None:
    step = (checkpoint / "latest").read_text().strip()
    source, out = checkpoint / step, checkpoint / f"{step}_universal"
    ranks = num_shards(checkpoint)
    print(
        f"{checkpoint}: written by {ranks} rank{'s' * (ranks > 1)}, read by {world_size}; converting it once (ds_to_universal)",
        file=sys.stderr,
    )
    marks.remove(out)
    marks.begin(out, marks.new_run())
    command = ["--input_folder", str(source), "--output_folder", str(out), "--inject_missing_state"]
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *command, "--num_extract_workers", "1"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        marks.remove(out)
        raise ValueError(
            f"{checkpoint}: was written by {num_shards(checkpoint)} ranks and this run has {world_size}, and DeepSpeed's "
            f"converter does not take it ({reason}); start on {num_shards(checkpoint)} ranks again, or choose another "
            "training.output_dir"
        )
    if marks.is_ours(checkpoint):
        marks.record(checkpoint, {_MADE: {}})
