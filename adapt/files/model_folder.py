"""A Hugging Face model folder, as it comes from a stranger: what is in it, and what is not believed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from .json_file import read_json

_UNTRAINED = "UNTRAINED"
_ADAPTER = "adapter_config.json"


def mark_untrained(folder: Path) -> None:
    """Says of a converted model that it has not learned to refine; training writes a folder of its own, without the mark."""
    (folder / _UNTRAINED).write_text("Converted, and not yet trained to write by refining: it would write filler.\n")


def is_untrained(folder: str | Path) -> bool:
    """Whether a checkpoint is as its conversion left it."""
    return (Path(folder) / _UNTRAINED).is_file()


def is_diffusion_checkpoint(folder: str | Path) -> bool:
    """True if the folder's config.json has a `diffusion` section."""
    return diffusion_section(folder) is not None


def diffusion_section(folder: str | Path) -> Any:
    """What the folder's config.json has as its `diffusion` section; None where there is none."""
    if not (Path(folder) / "config.json").is_file():
        return None
    return read_json(Path(folder) / "config.json", f"checkpoint={folder}").get("diffusion")


def check_named_folders(folder: str | Path, adapter: str | Path | None = None, setting: str = "checkpoint") -> None:
    """ValueError for what is no model or no adapter at first sight, before what reads them is imported."""
    if not (Path(folder) / _ADAPTER).is_file():  # an adapter's folder stands for the model that it names
        check_model_folder(folder, setting)
    if adapter is not None and not (Path(adapter) / _ADAPTER).is_file():
        raise ValueError(f"adapter={adapter}: not a PEFT folder (no {_ADAPTER} in it)")


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


_CARD = 1 << 20  # characters of a model card in which its metadata end
_METADATA = re.compile(r"\s*---\n([\S\s]*?)\n---[ \t]*(?:\n|$)")
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "additional_chat_templates/*", "*.py")
"""what is read of every model folder besides its licences; a tokenizer's class may read files of any other name"""
_NOT_READ = {".bin", ".ckpt", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".pdf", ".png", ".jpg", ".pt", ".pth"}


def check_files(folder: Path, what: str) -> None:
    """ValueError, of `what`, where a file that would be read is none, or a link to somewhere else: it would be copied on from there."""
    for path in _readable(folder):
        name = path.relative_to(folder)
        if not _lies_in(folder, path):
            raise ValueError(
                f"{what}: {name} is a link to {os.readlink(path) if path.is_symlink() else path.resolve()}, which is not in the "
                "folder; put the file itself there"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{what}: {name} is not a file; download the model again")
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{what}: is a model and an adapter at once, and transformers would put the adapter on; move the adapter out, and name "
            "it with --adapter"
        )


def _readable(folder: Path) -> list[Path]:
    """What a library could read of the folder: all but documents, weights of kinds that we do not read, and what is not there."""
    if not folder.is_dir():
        return []
    usual = {path for pattern in _READ for path in folder.glob(pattern)}
    others = {
        path
        for path in folder.iterdir()
        if path.suffix.lower() not in _NOT_READ and path.exists() and not path.is_dir()
    }
    return sorted(path for path in usual | others if path.name not in LICENCES)  # which `copy_extras` leaves out


def _lies_in(folder: Path, path: Path) -> bool:
    """Whether a file of the folder is in it, or in the `blobs` of its repository, where the Hub's cache keeps all files."""
    home, target = folder.resolve(), path.resolve()
    blobs = (home.parent.parent / "blobs").resolve()  # may be a link to a larger disk
    return home in target.parents or (home.parent.name == "snapshots" and target.parent == blobs)


def licence_named(folder: Path) -> str | None:
    """The licence that the folder's model card (README.md) names in its metadata; None where it names none."""
    path = folder / "README.md"
    if not path.is_file() or not _lies_in(folder, path):  # a pipe or a device would be read for ever
        return None
    try:
        with path.open(encoding="utf-8-sig") as file:
            block = _METADATA.match(file.read(_CARD))
        found = yaml.safe_load(block[1]) if block else None
    # What the parser raises for deep nesting, and for numbers and dates that are none.
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, yaml.YAMLError):
        return None
    named = found.get("license") if isinstance(found, dict) else None
    return named if isinstance(named, str) and len(named) < 200 else None


def copy_json(source: Path, out: Path, what: str) -> None:
    """Copies a config file without what names Python files; ValueError, of `what`, where it is no JSON, or a link to somewhere else."""
    from .model_config import without_code  # brings torch, and the rest here is quick

    check_files(source.parent, what)
    content = without_code(read_json(source, what))
    (out / source.name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_extras(source: Path, out: Path, *, trust_remote_code: bool) -> None:
    """Copies the licence, its name (as a card of one line), and the model's own Python where it is trusted.

    What a link brings from elsewhere is left out.
    """
    for path in sorted(source.iterdir()):
        wanted = path.name in LICENCES or (trust_remote_code and path.suffix == ".py")
        if wanted and path.is_file() and _lies_in(source, path):
            shutil.copyfile(path, out / path.name)
        # The card itself says things that are not true of a model that is made of this one.
        if path.name == "README.md" and (named := licence_named(source)):
            (out / "README.md").write_text(f"---\nlicense: {json.dumps(named)}\n---\n", encoding="utf-8")
