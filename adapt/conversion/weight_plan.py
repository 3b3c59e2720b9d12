"""What a copy of the weights will look like, decided before a byte is written: which tensors change, and each file's new header."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..files.safetensors_folder import DTYPES, Shard
from .embedding_rows import NewRows

FLOATING = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_NAMES = {dtype: name for name, dtype in FLOATING.items()}


def stored_dtype(shards: Mapping[str, Shard]) -> torch.dtype:
    """The floating dtype that most of the weights are stored in; ValueError where any are quantised."""
    sizes: dict[str, int] = {}
    for shard in shards.values():
        for tensor in shard.tensors.values():
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    most = max(sizes, key=sizes.__getitem__)
    quantised = sorted(sizes.keys() - DTYPES.keys()) or [most]
    if quantised[0] not in DTYPES or most not in FLOATING:
        raise ValueError(
            f"base={next(iter(shards.values())).path.parent}: its weights are stored as {quantised[0]}, which is quantised; "
            "convert the model in bfloat16, float16 or float32"
        )
    return FLOATING[most]


def kept_in_float32(model: PreTrainedModel, stored: Iterable[str], dtype: torch.dtype) -> set[str]:
    """Tensors that transformers computes in float32 whatever the dtype of the rest, such as a router's bias."""
    parts = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        parts |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {name for name in stored if parts & set(name.split("."))}


@dataclass(frozen=True)
class Plan:
    """One file of the copy."""

    source: Shard
    tensors: dict[str, dict[str, Any]]
    """{tensor name: dtype, shape, data_offsets}, in the order of the data"""
    changed: frozenset[str]
    """tensors that are not byte for byte those of the source"""

    @property
    def header(self) -> bytes:
        return encoded_header(self.source.metadata, self.tensors)

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return max(tensor["data_offsets"][1] for tensor in self.tensors.values())

    def written(self, path: Path) -> Shard:
        """The changed tensors, once they are at `path`."""
        return Shard(path, {t: self.tensors[t] for t in self.tensors if t in self.changed}, None, len(self.header))


def plan_of(
    shard: Shard, rewrite: Mapping[str, NewRows], dtype: torch.dtype | None, keep_dtype: Collection[str]
) -> Plan:
    """How the shard will be written: with other rows of the tensors in `rewrite`, in another dtype but for those in keep_dtype."""
    tensors, position = {}, 0
    for name in sorted(shard.tensors, key=lambda name: shard.tensors[name]["data_offsets"]):
        tensor = dict(shard.tensors[name])
        if name in rewrite:
            if tensor["dtype"] not in FLOATING:
                raise ValueError(f"base={shard.path}: {name} is stored as {tensor['dtype']}; give it in bfloat16")
            tensor["shape"] = [rewrite[name].num_rows, *tensor["shape"][1:]]
        if dtype is not None and tensor["dtype"] in FLOATING and name not in keep_dtype:
            tensor["dtype"] = _NAMES[dtype]
        if tensor != shard.tensors[name]:
            size = math.prod(tensor["shape"]) * FLOATING[tensor["dtype"]].itemsize
        else:
            size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
        tensors[name] = {**tensor, "data_offsets": [position, position + size]}
        position += size
    changed = {t for t in tensors if t in rewrite or tensors[t]["dtype"] != shard.tensors[t]["dtype"]}
    return Plan(shard, tensors, frozenset(changed))


def encoded_header(metadata: dict[str, str] | None, tensors: dict[str, dict[str, Any]]) -> bytes:
    """What stands before the data of a safetensors file."""
    encoded = json.dumps(({"__metadata__": metadata} if metadata else {}) | tensors, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(encoded)) + encoded
