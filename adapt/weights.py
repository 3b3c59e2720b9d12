"""Copies safetensors weights tensor by tensor: bytes as they are, except for the tensors that a conversion rewrites.

Memory is bounded by `_CHUNK` bytes of rows, not by a tensor and not by the model: what is rewritten streams by rows, the
rest goes from file to file inside the kernel.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .shards import DTYPES, INDEX, SINGLE, Shard

_CHUNK = 4 << 20  # bytes
_FLOATING = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_NAMES = {dtype: name for name, dtype in _FLOATING.items()}


@dataclass(frozen=True)
class NewRows:
    """What a conversion does to an embedding or head [V, ...]: how many rows it has then, and which is the mask token's."""

    num_rows: int
    mask_row: int
    std: float = 0.0
    """Of the noise that the mask token's row has around the mean of all rows; 0 = none."""
    seed: int = 0


def embedding_names(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """Names in the files of the input embedding and, where it is stored apart, of the head's weight and bias."""
    wanted = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"base={model.config.model_type}: has no output embedding, so it is not a causal language model"
        )
    kind, tokens = model.config.model_type, model.config.vocab_size
    for part, table in (("embedding", model.get_input_embeddings()), ("head", head)):
        rows = len(table.weight)  # pyright: ignore[reportArgumentType]
        if rows != tokens:  # CPM-Ant's prompts, Moshi's start token: no longer one row per token
            raise ValueError(
                f"base={kind}: its {part} has {rows} rows, but config.vocab_size={tokens}; a mask token cannot be added to such "
                "a vocabulary"
            )
    wanted |= {id(parameter) for parameter in head.parameters()}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in wanted}
    prefix = model.base_model_prefix + "."
    names |= {name.removeprefix(prefix) for name in names}  # checkpoints of the bare backbone (GPT-2) have no prefix
    found = sorted(names.intersection(stored))
    if not found:
        raise ValueError(
            f"base={model.config.model_type}: none of the tensors in its files is the embedding of this kind of model; "
            "wrong config.json?"
        )
    return found


def per_layer_rows(stored: Mapping[str, dict[str, Any]], num_stored: int, rows: NewRows) -> dict[str, NewRows]:
    """The same for the second table of tokens that Gemma 3n and Gemma 4 have for their layers; empty where there is none.

    It grows where the embedding of `num_stored` rows does, as in transformers' own resizing, or where the mask token is beyond it:
    Gemma 4 looks up every id there.
    """
    found = {name: about["shape"] for name, about in stored.items() if name.endswith("embed_tokens_per_layer.weight")}
    tables = {name: shape[0] for name, shape in found.items() if len(shape) == 2}
    return {
        name: replace(rows, num_rows=rows.num_rows if rows.num_rows > num_stored or rows.mask_row >= size else size)
        for name, size in tables.items()
    }


def stored_dtype(shards: Mapping[str, Shard]) -> torch.dtype:
    """The floating dtype that most of the weights are stored in; ValueError where any are quantised."""
    sizes: dict[str, int] = {}
    for shard in shards.values():
        for tensor in shard.tensors.values():
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    most = max(sizes, key=sizes.__getitem__)
    quantised = sorted(sizes.keys() - DTYPES.keys()) or [most]
    if quantised[0] not in DTYPES or most not in _FLOATING:
        raise ValueError(
            f"base={next(iter(shards.values())).path.parent}: its weights are stored as {quantised[0]}, which is quantised; "
            "convert the model in bfloat16, float16 or float32"
        )
    return _FLOATING[most]


def size_of_copy(
    shards: Mapping[str, Shard],
    rewrite: Mapping[str, NewRows],
    *,
    dtype: torch.dtype | None = None,
    keep_dtype: Collection[str] = (),
) -> int:
    """Bytes of the tensors that `copy` would write with the same arguments."""
    plans = (_planned(shard, rewrite, dtype, keep_dtype) for shard in shards.values())
    return sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for plan in plans for tensor in plan.values())


def copy(
    shards: Mapping[str, Shard],
    out: Path,
    rewrite: Mapping[str, NewRows],
    *,
    dtype: torch.dtype | None = None,
    keep_dtype: Collection[str] = (),
) -> Iterator[Path]:
    """Writes the shards, and then their index, into the folder `out`; yields each file when it is written.

    rewrite: by tensor name. dtype: floating tensors are cast to it, but for those named in keep_dtype. ValueError for
    embeddings with NaN or infinity in them, and for weights that do not fit into float16.
    """
    total_size, total_parameters = 0, 0
    for name, shard in tqdm(shards.items(), desc="weights", unit="shard", disable=None):
        plan = _planned(shard, rewrite, dtype, keep_dtype)
        if plan == shard.tensors and not rewrite.keys() & plan.keys():
            with shard.path.open("rb") as read, (out / name).open("wb") as write:
                _copy_bytes(read, write, 0, shard.path.stat().st_size)
        else:
            with _one_thread():
                _write_shard(shard, out / name, plan, rewrite)
        if hasattr(os, "posix_fadvise"):  # so that the copy stays in memory for the probe where both do not fit
            with shard.path.open("rb") as read:
                os.posix_fadvise(read.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total_size += max(tensor["data_offsets"][1] for tensor in plan.values())
        total_parameters += sum(math.prod(tensor["shape"]) for tensor in plan.values())
        yield out / name
    if SINGLE not in shards:
        source = next(iter(shards.values())).path.parent
        index = json.loads((source / INDEX).read_text())
        about = index.get("metadata")
        about = dict(about) if isinstance(about, dict) else {}
        if "total_parameters" in about:
            about["total_parameters"] = total_parameters
        index["metadata"] = {**about, "total_size": total_size}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        yield out / INDEX


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces are too small to share: on a busy machine the threads waited for each other three times as long as they worked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _planned(
    shard: Shard, rewrite: Mapping[str, NewRows], dtype: torch.dtype | None, keep_dtype: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The header of the shard as it will be written, in the order of its data."""
    plan, position = {}, 0
    for name in sorted(shard.tensors, key=lambda name: shard.tensors[name]["data_offsets"]):
        tensor = dict(shard.tensors[name])
        if name in rewrite:
            if tensor["dtype"] not in _FLOATING:
                raise ValueError(f"base={shard.path}: {name} is stored as {tensor['dtype']}; give it in bfloat16")
            tensor["shape"] = [rewrite[name].num_rows, *tensor["shape"][1:]]
        if dtype is not None and tensor["dtype"] in _FLOATING and name not in keep_dtype:
            tensor["dtype"] = _NAMES[dtype]
        if tensor != shard.tensors[name]:
            size = math.prod(tensor["shape"]) * _FLOATING[tensor["dtype"]].itemsize
        else:
            size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
        plan[name] = {**tensor, "data_offsets": [position, position + size]}
        position += size
    return plan


def _write_shard(shard: Shard, out: Path, plan: dict[str, dict[str, Any]], rewrite: Mapping[str, NewRows]) -> None:
    header = ({"__metadata__": shard.metadata} if shard.metadata else {}) | plan
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with shard.path.open("rb", buffering=0) as read, out.open("wb", buffering=0) as write:
        write.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in plan.items():
            start, end = shard.tensors[name]["data_offsets"]
            if name in rewrite or tensor["dtype"] != shard.tensors[name]["dtype"]:
                read.seek(shard.start + start)
                _rewrite_tensor(read, write, name, shard.tensors[name], tensor, rewrite.get(name))
            else:
                _copy_bytes(read, write, shard.start + start, end - start)


def _rewrite_tensor(
    read: io.FileIO, write: io.FileIO, name: str, old: dict[str, Any], new: dict[str, Any], rows: NewRows | None
) -> None:
    """Streams one tensor from where `read` stands to where `write` stands: cast, grown, with a new row for the mask token."""
    from_dtype, to_dtype = _FLOATING[old["dtype"]], _FLOATING[new["dtype"]]
    row_shape = old["shape"][1:]
    width = math.prod(row_shape)  # numbers in a row; 1 for a bias
    num_old = old["shape"][0] if old["shape"] else 1
    row_bytes = width * from_dtype.itemsize
    at_once = max(1, _CHUNK // max(row_bytes, 1))
    begin = write.tell()
    total = torch.zeros(width, dtype=torch.float64)
    # Made once: the kernel clears every page of a new buffer, which took longer than what is done with it.
    buffer = torch.empty(min(at_once, num_old), width, dtype=from_dtype)
    in_float32 = torch.empty(buffer.shape)
    for first in range(0, num_old, at_once):
        chunk = buffer[: num_old - first]
        if not _read_all(read, _bytes_of(chunk)):
            raise _became_shorter(read)
        if rows is not None:
            total += in_float32[: len(chunk)].copy_(chunk).sum(0)
        _write_all(write, _bytes_of(_cast(chunk, to_dtype, name)))
    if rows is None:
        return
    mean = total / num_old
    if not mean.isfinite().all():
        raise ValueError(f"base={read.name}: {name} has NaN or infinity in it; mend the model, or download it again")
    noisy = mean
    if rows.std and len(old["shape"]) > 1:
        key = int.from_bytes(hashlib.sha256(f"{rows.seed}/{name}".encode()).digest()[:7], "little")
        noisy = mean + rows.std * torch.randn(width, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
    for first in range(num_old, rows.num_rows, at_once):
        _write_all(write, _bytes_of(_cast(mean.expand(min(at_once, rows.num_rows - first), width), to_dtype, name)))
    end = write.tell()
    write.seek(begin + rows.mask_row * width * to_dtype.itemsize)
    _write_all(write, _bytes_of(_cast(noisy, to_dtype, name)))
    write.seek(end)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and tensor.numel() and tensor.abs().max() > 65504:
        raise ValueError(f"dtype=float16: {name} holds {tensor.abs().max():.3g}, which float16 cannot; use bfloat16")
    return cast


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read_all(read: io.FileIO, into: memoryview) -> bool:
    while len(into):
        step = read.readinto(into)
        if not step:
            return False
        into = into[step:]
    return True


def _write_all(write: io.RawIOBase | io.BufferedIOBase, data: memoryview) -> None:
    while len(data):
        data = data[write.write(data) :]


def _copy_bytes(read, write, start: int, size: int) -> None:
    """`size` bytes of `read` from `start` to where `write` stands, inside the kernel where that can be done."""
    write.flush()
    done = 0
    while done < size:
        try:
            step = os.copy_file_range(
                read.fileno(), write.fileno(), min(size - done, 64 << 20), offset_src=start + done
            )
        except (AttributeError, OSError) as error:  # not on macOS, nor between some filesystems
            if done or getattr(error, "errno", errno.ENOSYS) not in _NO_KERNEL_COPY:
                raise
            return _copy_bytes_by_hand(read, write, start, size)
        if not step:
            raise _became_shorter(read)
        done += step


_NO_KERNEL_COPY = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EBADF, errno.EPERM}


def _copy_bytes_by_hand(read, write, start: int, size: int) -> None:
    read.seek(start)
    while size > 0:
        piece = read.read(min(_CHUNK, size))
        if not piece:
            raise _became_shorter(read)
        _write_all(write, memoryview(piece))
        size -= len(piece)


def _became_shorter(read) -> ValueError:
    return ValueError(f"base={read.name}: became shorter while it was read; is something writing to it?")
