"""What is wrong with a comparison before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adapt.files.model_folder import check_model_folder, is_diffusion_checkpoint
from adapt.model.precision import DTYPES, compute_dtype_of


def check_numbers(
    limit: int | None, batch_size: int, prompts: int, sizes: Sequence[int], repeats: int, sweep: Sequence[float]
) -> None:
    for setting, value, least in (
        ("limit", limit, 1), ("batch_size", batch_size, 1), ("speed_prompts", prompts, 1),
        ("speed_repeats", repeats, 0),
        *(("speed_batch_sizes", size, 1) for size in sizes),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{setting}={value}: give a whole number of at least {least}")
    for threshold in sweep:
        if not 0 < threshold <= 1:
            raise ValueError(f"sweep={threshold}: thresholds lie above 0 and up to 1")


def check_folder(arm: str, folder: str) -> None:
    try:
        check_model_folder(folder)
    except ValueError as error:
        raise ValueError(str(error).replace("checkpoint=", f"{arm}=", 1)) from None
    diffusion = is_diffusion_checkpoint(folder)
    if diffusion and arm != "adapted":
        raise ValueError(f"{arm}={folder}: is a diffusion checkpoint; give the causal LM that writes left to right")
    if not diffusion and arm == "adapted" and Path(folder).is_dir():
        raise ValueError(f"adapted={folder}: no diffusion checkpoint; make one with `adapt convert {folder} OUT`")


def chosen_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device}: give cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch finds no CUDA device here; use cpu")
    return found


def chosen_dtype(dtype: str | None, device: str | None) -> torch.dtype:
    if dtype is None:
        return compute_dtype_of(chosen_device(device))
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(sorted(DTYPES))}; all arms run in the same")
    return DTYPES[dtype]
