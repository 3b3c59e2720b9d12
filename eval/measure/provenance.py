"""Where a comparison's numbers come from: versions, checkpoints by hash, settings of the tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt.files import provenance
from adapt.files.provenance import checkpoint_sha256

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
    """Package -> installed version, of what a comparison's numbers depend on."""
    return provenance.versions(_DISTRIBUTIONS)


def checkpoint(path: str | Path, model: Any) -> dict[str, Any]:
    """Path as typed, sha256 of config.json and of the safetensors, number of parameters.

    A Hub id has no folder here: its commit stands instead.
    """
    found: dict[str, Any] = {"path": str(path), "parameters": sum(p.numel() for p in model.parameters())}
    found |= checkpoint_sha256(Path(path)) or {"revision": getattr(model.config, "_commit_hash", None)}
    section = getattr(model.config, "diffusion", None)
    if section is not None:
        found["diffusion"] = dict(section)
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
