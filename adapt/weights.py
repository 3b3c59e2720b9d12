"""Copies safetensors weights tensor by tensor: bytes as they are, except for the tensors that a conversion rewrites.

Memory is bounded by the largest rewritten tensor, not by the model: the others go from file to file as bytes.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def shards(folder: Path) -> dict[str, list[str]]:
    """{safetensors file name: names of its tensors}. Raises ValueError if there are none, or if a shard is missing."""
    if (folder / SINGLE).is_file():  # where both are there, transformers reads the single file too
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        raise ValueError(
            f"base={folder}: no {SINGLE} or {INDEX} in it; pickled weights are not read, convert them to "
            "safetensors first"
        )
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"base={folder}: {INDEX} names {name}, which is missing; download the model again")
    return {name: list(_header(folder / name)[0]) for name in files}


def embedding_names(folder: Path, config: PretrainedConfig) -> list[str]:
    """Names in the files of the input embedding and, where it is stored apart, of the head's weight and bias."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    wanted = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"base={config.model_type}: has no output embedding, so it is not a causal language model")
    for part, rows in (("embedding", model.get_input_embeddings().weight), ("head", head.weight)):
        if len(rows) != config.vocab_size:  # CPM-Ant's prompts, Moshi's start token: no longer one row per token
            raise ValueError(
                f"base={config.model_type}: its {part} has {len(rows)} rows, but config.vocab_size={config.vocab_size}; "
                "a mask token cannot be added to such a vocabulary"
            )
    wanted |= {id(parameter) for parameter in head.parameters()}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in wanted}
    prefix = model.base_model_prefix + "."
    names |= {name.removeprefix(prefix) for name in names}  # checkpoints of the bare backbone (GPT-2) have no prefix
    found = sorted(name for tensors in shards(folder).values() for name in tensors if name in names)
    if not found:
        raise ValueError(
            f"base={folder}: none of its tensors is the embedding of {config.model_type}; wrong config.json?"
        )
    return found


def num_embeddings(folder: Path, config: PretrainedConfig) -> int:
    """Rows of the stored input embedding, which may be more than the tokenizer's tokens."""
    names = embedding_names(folder, config)
    for file in shards(folder):
        header, _ = _header(folder / file)
        for name in names:
            if name in header:
                return header[name]["shape"][0]
    raise AssertionError("embedding_names() lists stored tensors only")


def copy(source: Path, out: Path, rewrite: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Copies all shards and the index from `source` to `out`; tensors named in `rewrite` go through its functions."""
    for file, names in tqdm(shards(source).items(), desc="weights", unit="shard", disable=None):
        if any(name in rewrite for name in names):
            _copy_shard(source / file, out / file, rewrite)
        else:
            shutil.copyfile(source / file, out / file)
    if not (out / SINGLE).is_file():
        index = json.loads((source / INDEX).read_text())
        tensors = [tensor for file in set(index["weight_map"].values()) for tensor in _header(out / file)[0].values()]
        total_size = sum(end - start for start, end in (tensor["data_offsets"] for tensor in tensors))
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_size}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(path: Path) -> tuple[dict[str, dict], dict]:
    """({tensor name: dtype, shape, data_offsets}, {metadata, first data byte}) of a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 2 <= length <= size - 8 else {}  # a git-lfs pointer claims exabytes
    metadata = header.pop("__metadata__", None)
    if max((tensor["data_offsets"][1] for tensor in header.values()), default=0) != size - 8 - length:
        raise ValueError(f"base={path}: not a safetensors file, or cut short; download the model again")
    return header, {"metadata": metadata, "start": 8 + length}


def _copy_shard(source: Path, out: Path, rewrite: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    header, about = _header(source)
    in_order = sorted(header, key=lambda name: header[name]["data_offsets"])
    rewritten: dict[str, bytes] = {}
    with safe_open(source, framework="pt") as tensors:
        for name in in_order:
            if name in rewrite:
                tensor = rewrite[name](tensors.get_tensor(name)).contiguous()
                header[name]["shape"], rewritten[name] = list(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()
    old_offsets = {name: tuple(header[name]["data_offsets"]) for name in in_order}
    position = 0
    for name in in_order:
        size = len(rewritten[name]) if name in rewritten else old_offsets[name][1] - old_offsets[name][0]
        header[name]["data_offsets"] = [position, position + size]
        position += size
    new_header = ({"__metadata__": about["metadata"]} if about["metadata"] else {}) | header
    encoded = json.dumps(new_header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with source.open("rb") as read, out.open("wb") as write:
        write.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in in_order:
            if name in rewritten:
                write.write(rewritten[name])
                continue
            start, end = old_offsets[name]
            read.seek(about["start"] + start)
            _copy_bytes(read, write, end - start)


def _copy_bytes(read, write, size: int, chunk: int = 16 << 20) -> None:
    while size > 0:
        piece = read.read(min(chunk, size))
        assert piece, "_header has held the offsets against the size of the file"
        write.write(piece)
        size -= len(piece)
