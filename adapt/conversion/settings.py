"""What a conversion may be asked for, checked before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from ..files.outputs import check_new_folder
from ..settings.bounds import Bounds, Seed, Share, Tokens, check_value, one_of
from ..spec import DTYPE_NAMES, NOISES, check_attention


class Settings(TypedDict):
    """Each setting of `adapt.convert` that is no path, and what it may be."""

    attention: str
    block_size: Tokens | None
    clean_context: str | None
    noise: str
    p_uniform: Share | None
    mask_token: str | None
    shift_logits: bool
    mask_init_std: Annotated[float, Bounds(0, 1)]
    seed: Seed
    pad_to_multiple_of: Annotated[int, Bounds(1, 2**16)] | None
    dtype: str | None
    trust_remote_code: bool
    verify: bool


SETTINGS = get_type_hints(Settings, include_extras=True)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """ValueError for an `out` that exists or cannot be made, a value that is not allowed, and for settings that do not go together."""
    check_new_folder(out)
    for name, value in settings.items():
        check_value(name, value, SETTINGS[name])
    attention, block_size, clean_context = (settings[name] for name in ("attention", "block_size", "clean_context"))
    one_of("noise", settings.get("noise", NOISES[0]), NOISES)
    check_attention(attention, block_size, clean_context)
    if settings["dtype"] is not None:
        one_of("dtype", settings["dtype"], DTYPE_NAMES)
