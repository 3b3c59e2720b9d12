"""Where a comparison's numbers come from: versions, hardware, checkpoints by hash, command, settings."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_HASHED_WHOLE = 4 << 30  # bytes; a few seconds
_DISTRIBUTIONS = {
    "adapt": "adapt-dlm",
    "datasets": "datasets",
    "lm_eval": "lm-eval",
    "numpy": "numpy",
    "scipy": "scipy",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
}


def versions() -> dict[str, str]:
    """Package -> installed version; `adapt` falls back to the source tree's own."""
    import platform

    import adapt

    found = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = adapt.__version__ if name == "adapt" else "not installed"
    return found


def git_revision() -> str | None:
    """Revision of the checkout that this file lies in, `-dirty` if it has changes; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside of somebody else's checkout.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return revision and revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def checkpoint(path: str | Path, model: Any) -> dict[str, Any]:
    """Path as typed, sha256 of config.json and of the safetensors, number of parameters.

    A Hub id has no folder here: its commit stands instead.
    """
    folder = Path(path)
    found: dict[str, Any] = {"path": str(path), "parameters": sum(p.numel() for p in model.parameters())}
    if (folder / "config.json").is_file():
        found["config_sha256"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        found["safetensors"] = {f.name: safetensors_sha256(f) for f in sorted(folder.glob("*.safetensors"))}
    else:
        found["revision"] = getattr(model.config, "_commit_hash", None)
    section = getattr(model.config, "diffusion", None)
    if section is not None:
        found["diffusion"] = dict(section)
    return found


def safetensors_sha256(path: Path) -> dict[str, str]:
    """sha256 of the header (names, types, shapes; cheap at any size) and, of files up to 4 GiB, of all of it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = {"header_sha256": hashlib.sha256(file.read(length)).hexdigest()}
    if path.stat().st_size <= _HASHED_WHOLE:
        whole = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                whole.update(block)
        found["sha256"] = whole.hexdigest()
    return found


def task_settings(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Task -> version, items, few-shot examples per arm, sha256 of the YAML's content."""
    found = {}
    for task in results["adapted"]["samples"]:
        configuration = results["adapted"].get("configs", {}).get(task, {})
        content = {k: v for k, v in configuration.items() if k not in ("num_fewshot", "metadata")}
        found[task] = {
            "version": results["adapted"].get("versions", {}).get(task),
            "items": results["adapted"].get("n-samples", {}).get(task),
            "num_fewshot": {arm: r.get("n-shot", {}).get(task) for arm, r in results.items()},
            "config_sha256": hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest(),
        }
    return found
