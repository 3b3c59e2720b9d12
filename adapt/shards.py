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
_MAX_JSON = 256 << 20  # bytes; the index of a model with a million tensors has 100 MB


@dataclass(frozen=True)
class Shard:
    """One safetensors file: {tensor name: dtype, shape, data_offsets}, its metadata, and where its data begin."""

    path: Path
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str] | None
    start: int


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ValueError that begins with `what` (`base=folder`) and names the file if it holds none."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"larger than {_MAX_JSON >> 20} MiB")
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_key_twice)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except FileNotFoundError:
        raise ValueError(f"{what}: has no {path.name}; download the model again") from None
    except (OSError, RecursionError, ValueError) as error:  # bytes that are no UTF-8 are a ValueError too
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{what}: {path.name} is not valid JSON ({reason}); download the model again") from error
    return content


def read_shards(folder: Path, setting: str = "base") -> dict[str, Shard]:
    """{file name: Shard} of the weights of a folder, the user's `setting`, in the order of their names.

    Raises ValueError, naming the file, where there are none, where one is missing, cut short or no safetensors, and where
    the index names what is not there or lies outside of the folder.
    """
    what = f"{setting}={folder}"
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
    shards = {name: _read_shard(folder / name, what) for name in files}
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


def _read_shard(path: Path, what: str) -> Shard:
    what = f"{what}: {path.name}"
    try:
        with safe_open(
            path, framework="pt"
        ):  # the format's own reader holds shapes, offsets and size against each other
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_no_key_twice)
    except (OSError, RecursionError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{what} is not a safetensors file, or is cut short or damaged ({reason}); download the model again"
        ) from error
    metadata = header.pop("__metadata__", None)
    if not header:
        raise ValueError(f"{what} holds no tensor; download the model again")
    return Shard(path, header, metadata, 8 + length)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
