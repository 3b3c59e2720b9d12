"""A Hugging Face model folder, as it comes from a stranger: what is in it, and what is not believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from yaml import YAMLError

_UNTRAINED = "UNTRAINED"


def mark_untrained(folder: Path) -> None:
    """Says of a converted model that it has not learned to refine; training writes a folder of its own, without the mark."""
    (folder / _UNTRAINED).write_text("Converted, and not yet trained to write by refining: it would write filler.\n")


def is_untrained(folder: str | Path) -> bool:
    """Whether a checkpoint is as its conversion left it."""
    return (Path(folder) / _UNTRAINED).is_file()


def is_diffusion_checkpoint(folder: str | Path) -> bool:
    """True if the folder's config.json has a `diffusion` section."""
    path = Path(folder) / "config.json"
    try:
        return path.is_file() and "diffusion" in json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download the model again") from error


def check_loaded(loading: dict[str, Any], what: str) -> None:
    """Raises ValueError for a tensor that was not found: transformers only warns of it, and leaves it random."""
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise ValueError(f"{what}: no weights for {', '.join(missing[:3])}; it is not complete, or not of this model")


def check_model_folder(folder: str | Path, setting: str = "checkpoint") -> None:
    """Raises one clear ValueError, about `setting`, if `folder` is a path that holds no model. Hub ids pass."""
    path = Path(folder)
    looks_local = (
        path.is_absolute() or str(folder).startswith((".", "~")) or path.exists() or str(folder).count("/") != 1
    )
    if not looks_local:
        return
    if not path.exists():
        raise ValueError(
            f"{setting}={folder}: no such folder; give a folder with config.json and safetensors, or a Hub id "
            "(owner/name)"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{setting}={folder}: not a model folder (no config.json in it)")


_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


def check_no_code(
    config: Mapping[str, Any], what: str, *, todo: str = "read it, and if you trust it say --trust_remote_code true"
) -> None:
    """ValueError, of `what` and with what `todo`, for the config.json of a model that only its own Python files can make."""
    known = isinstance(config.get("model_type"), str) and config["model_type"] in CONFIG_MAPPING
    if config.get("auto_map") and not known:
        raise ValueError(
            f"{what}: is made by Python code of its own ({str(config['auto_map'])[:60]}), which was not run; {todo}"
        )


def licence_named(folder: Path) -> str | None:
    """The licence that the folder's model card (README.md) names in its metadata; None where it names none."""
    try:
        found = (metadata_load(folder / "README.md") or {}).get("license")
    except (OSError, ValueError, YAMLError):  # no card, or no metadata in it
        return None
    return found if isinstance(found, str) else None


def copy_extras(source: Path, out: Path, *, trust_remote_code: bool) -> None:
    """Copies the licence, its name (as a card of one line), and the model's own Python where it is trusted.

    What a link brings from elsewhere is left out.
    """
    # In the Hub's cache every file is a link into `blobs` of the same repository.
    homes = [source.resolve(), source.resolve().parent.parent / "blobs"]
    for path in sorted(source.iterdir()):
        wanted = path.name in _LICENCES or (trust_remote_code and path.suffix == ".py")
        if wanted and path.is_file() and path.resolve().parent in homes:
            shutil.copyfile(path, out / path.name)
        # The card itself says things that are not true of a model that is made of this one.
        if path.name == "README.md" and path.resolve().parent in homes and (named := licence_named(source)):
            (out / "README.md").write_text(f"---\nlicense: {json.dumps(named)}\n---\n", encoding="utf-8")
