"""The safetensors files of a model folder: which there are, and what each holds. Nothing in them is believed unchecked.

Names come from strangers: an index may name `../x` or another file's tensors, a header may promise more bytes than there
are. What a checksum alone would show (flipped bits inside a tensor) cannot be seen here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json_file import no_key_twice, read_json
from .model_folder import check_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""What the format calls them -> torch; others are of quantised weights, which are refused."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file: {tensor name: dtype, shape, data_offsets}, its metadata, and where its data begin."""

    path: Path
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str] | None
    start: int

    @property
    def end(self) -> int:
        """Where its data end, in the file."""
        return self.start + max(tensor["data_offsets"][1] for tensor in self.tensors.values())


def read_shards(folder: Path, what: str | None = None) -> dict[str, Shard]:
    """{file name: Shard} of the weights of a folder, in the order of their names. what: the setting that a line begins with.

    Raises ValueError, naming the file, where there are none, where one is missing, cut short or no safetensors, and where
    the index names what is not there or lies outside of the folder.
    """
    what = what or f"base={folder}"
    check_files(folder, what)
    weight_map: dict[str, str] = {}
    if (folder / SINGLE).is_file():  # where both are there, transformers reads the single file too
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = _weight_map(read_json(folder / INDEX, what), what)
        files = sorted(set(weight_map.values()))
    else:
        raise ValueError(
            f"{what}: no {SINGLE} or {INDEX} in it; pickled weights are not read, convert them to safetensors first"
        )
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{what}: {INDEX} names {name}, which is missing; download the model again")
    shards = {name: read_shard(folder / name, what) for name in files}
    home: dict[str, str] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if home.setdefault(tensor, file) != file:
                raise ValueError(f"{what}: {tensor} is in both {home[tensor]} and {file}; download the model again")
    for tensor, file in weight_map.items():
        if tensor not in shards[file].tensors:
            raise ValueError(f"{what}: {INDEX} says that {tensor} is in {file}, where it is not; download it again")
    return shards


def _weight_map(index: dict[str, Any], what: str) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{what}: {INDEX} has no weight_map from tensors to files; download the model again")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not file.startswith(".")
        if not plain or set(file) & {"/", "\\", "\0"}:
            raise ValueError(
                f"{what}: {INDEX} puts {tensor[:80]} into {str(file)[:80]!r}, which is not the name of a safetensors "
                "file of this folder; nothing was written"
            )
    return weight_map


def read_shard(path: Path, what: str) -> Shard:
    """One safetensors file; ValueError that begins with `what` where it is none, or was cut short."""
    what = f"{what}: {path.name}"
    try:
        with safe_open(
            path, framework="pt"
        ):  # the format's own reader holds shapes, offsets and size against each other
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=no_key_twice)
    except (OSError, RecursionError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{what} is not a safetensors file, or is cut short or damaged ({reason}); download the model again"
        ) from error
    metadata = header.pop("__metadata__", None)
    if not header:
        raise ValueError(f"{what} holds no tensor; download the model again")
    return Shard(path, header, metadata, 8 + length)


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as its file holds them."""
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
