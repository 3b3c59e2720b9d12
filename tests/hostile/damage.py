"""What is done to a good model folder: each of these makes a function that changes one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def edited(file: str, *path: str, to: Any) -> Callable[[Path], None]:
    """Sets a key of a JSON file (of its inner objects along the path)."""

    def change(folder: Path) -> None:
        whole = section = json.loads((folder / file).read_text())
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = to
        (folder / file).write_text(json.dumps(whole))

    return change


def without(file: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = json.loads((folder / file).read_text())
        del whole[key]
        (folder / file).write_text(json.dumps(whole))

    return change


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_bytes(content if isinstance(content, bytes) else content.encode()))


def void(_: object) -> None:
    return None


def removed(*files: str) -> Callable[[Path], None]:
    return lambda folder: void([(folder / file).unlink() for file in files])


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Loads the weights of the single file, changes them in place, and saves them."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the header of the single file, and leaves its data."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        head = json.loads(data[8 : 8 + length])
        change(head)
        encoded = json.dumps(head).encode()
        encoded += b" " * (-len(encoded) % 8)
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])

    return edit


def data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: void(
        (folder / "model.safetensors").write_bytes(change((folder / "model.safetensors").read_bytes()))
    )
