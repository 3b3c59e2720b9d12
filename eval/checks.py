"""What is wrong with a comparison before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_type_hints

from adapt.decoding.settings import Threshold
from adapt.files.model_folder import check_model_folder, is_diffusion_checkpoint
from adapt.settings.bounds import Bounds, Items, Rows, Samples, Seed, check_value, one_of
from adapt.spec import DTYPE_NAMES

if TYPE_CHECKING:
    import torch

Shots = Annotated[int, Bounds(0, 1000)]


class Settings(TypedDict):
    """Each setting of `compare` that is no path and no name, and what it may be."""

    limit: Items | None
    num_fewshot: Shots | None
    base_num_fewshot: Shots | None
    apply_chat_template: bool
    batch_size: Rows
    sweep: list[Threshold]
    mc_samples: Samples
    corpus_tokens: Annotated[int, Bounds(2, 2**40)]
    speed_prompts: Items
    speed_batch_sizes: list[Rows]
    speed_repeats: Annotated[int, Bounds(0, 10**6)]
    seed: Seed
    overwrite: bool


SETTINGS = get_type_hints(Settings, include_extras=True)


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError for the first that is not what it may be."""
    for name, value in settings.items():
        check_value(name, value, SETTINGS[name])
    if settings["speed_repeats"] and not settings["speed_batch_sizes"]:
        raise ValueError("speed_batch_sizes=: names none; give numbers with commas between them, such as 1,8")


def check_folder(arm: str, folder: str) -> None:
    check_model_folder(folder, arm)
    diffusion = is_diffusion_checkpoint(folder)
    if diffusion and arm != "adapted":
        raise ValueError(f"{arm}={folder}: is a diffusion checkpoint; give the causal LM that writes left to right")
    if not diffusion and arm == "adapted" and Path(folder).is_dir():
        raise ValueError(f"adapted={folder}: no diffusion checkpoint; make one with `adapt convert {folder} OUT`")


def chosen_device(device: str | None) -> torch.device:
    import torch

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
    from adapt.model.precision import DTYPES, compute_dtype_of

    if dtype is None:
        return compute_dtype_of(chosen_device(device))
    one_of("dtype", dtype, DTYPE_NAMES)
    return DTYPES[dtype]
