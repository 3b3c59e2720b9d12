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
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import progress
from ..files.safetensors_folder import DTYPES, INDEX, SINGLE, Shard, bytes_of, read_shards
from .background import Written, beside
from .embedding_rows import NewRows

_CHUNK = 4 << 20  # bytes
_PIECE = 16 << 20  # bytes that the kernel copies in one call
_SAMPLE = 4096  # bytes
_FLOATING = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_NAMES = {dtype: name for name, dtype in _FLOATING.items()}


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


def kept_in_float32(model: PreTrainedModel, stored: Iterable[str], dtype: torch.dtype) -> set[str]:
    """Tensors that transformers computes in float32 whatever the dtype of the rest, such as a router's bias."""
    parts = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        parts |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {name for name in stored if parts & set(name.split("."))}


class Copy:
    """The weights of `shards`, as they will stand in the folder `out`.

    rewrite: embeddings by name. dtype: floating tensors are cast to it, but for those named in keep_dtype. What differs
    from the source is written first, what does not beside whatever the caller does meanwhile (`writing`).
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        out: Path,
        rewrite: Mapping[str, NewRows],
        *,
        dtype: torch.dtype | None = None,
        keep_dtype: Collection[str] = (),
    ) -> None:
        self._shards, self._out, self._rewrite = shards, out, rewrite
        self._plans = {name: _planned(shard, rewrite, dtype, keep_dtype) for name, shard in shards.items()}
        self._changed = {
            name: {t for t in plan if t in rewrite or plan[t]["dtype"] != shards[name].tensors[t]["dtype"]}
            for name, plan in self._plans.items()
        }
        self._headers = {name: _header(shards[name].metadata, plan) for name, plan in self._plans.items()}

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(_data_bytes(plan) for plan in self._plans.values())

    @contextmanager
    def writing(self, out: Path) -> Iterator[tuple[dict[str, Shard], Future[None]]]:
        """Inside, the files are written, to become `out`: (where each tensor can be read, whether it is written or not; what is done
        when all are).

        Raises ValueError for embeddings with NaN or infinity in them, for weights that do not fit into float16, and for what was
        not written as planned; OSError of the disk.
        """
        self._make_files()
        with progress.doing("writing the weights", total=self.num_bytes, unit="MB") as task:
            with beside(self._write_rest(task)) as rest:
                yield self._write_changed(), rest
                rest.result()
            self._check(out)

    def _make_files(self) -> None:
        """Those that differ from the source: a header, and holes for the tensors."""
        for name, plan in self._plans.items():
            if self._changed[name]:
                with (self._out / name).open("wb") as file:
                    file.write(self._headers[name])
                    file.truncate(len(self._headers[name]) + _data_bytes(plan))

    def _write_changed(self) -> dict[str, Shard]:
        """Returns where each tensor can be read then: here, or, as it is not changed, in the source."""
        readable: dict[str, Shard] = {}
        for name, shard in self._shards.items():
            kept = {t: about for t, about in shard.tensors.items() if t not in self._changed[name]}
            if kept:
                readable[f"{name} of the source"] = replace(shard, tensors=kept)
            if not self._changed[name]:
                continue
            header, plan = self._headers[name], self._plans[name]
            with (
                shard.path.open("rb", buffering=0) as read,
                (self._out / name).open("r+b", buffering=0) as write,
                num_threads(1),  # pieces are too small to share: threads waited three times as long as they worked
            ):
                for tensor in sorted(self._changed[name], key=lambda t: plan[t]["data_offsets"]):
                    read.seek(shard.start + shard.tensors[tensor]["data_offsets"][0])
                    write.seek(len(header) + plan[tensor]["data_offsets"][0])
                    rows = self._rewrite.get(tensor)
                    _rewrite_tensor(read, write, tensor, shard.tensors[tensor], plan[tensor], rows)
            changed = {t: plan[t] for t in plan if t in self._changed[name]}
            readable[name] = Shard(self._out / name, changed, None, len(header))
        return readable

    def _write_rest(self, task: progress.Task) -> Iterator[Written]:
        """Copies what is as in the source, piece by piece, and writes the index."""
        for name, shard in self._shards.items():
            path, mode = self._out / name, "r+b" if self._changed[name] else "wb"
            with shard.path.open("rb", buffering=0) as read, path.open(mode, buffering=0) as write:
                for source, target, size in self._as_they_are(name):
                    for at, step in _copy_bytes(read, write, source, target, size):
                        task.update(step)
                        yield Written(path, at, step)
        if SINGLE not in self._shards:
            self._write_index()

    def _as_they_are(self, name: str) -> Iterator[tuple[int, int, int]]:
        """(where in the source's file, where in ours, bytes): all of it, or the tensors that do not change."""
        shard, changed = self._shards[name], self._changed[name]
        if not changed:
            yield 0, 0, shard.path.stat().st_size
            return
        for tensor, about in self._plans[name].items():
            if tensor not in changed:
                start, end = shard.tensors[tensor]["data_offsets"]
                yield shard.start + start, len(self._headers[name]) + about["data_offsets"][0], end - start

    def _write_index(self) -> None:
        source = next(iter(self._shards.values())).path.parent
        index = json.loads((source / INDEX).read_text())
        about = index.get("metadata")
        about = dict(about) if isinstance(about, dict) else {}
        if "total_parameters" in about:
            shapes = (tensor["shape"] for plan in self._plans.values() for tensor in plan.values())
            about["total_parameters"] = sum(math.prod(shape) for shape in shapes)
        index["metadata"] = {**about, "total_size": self.num_bytes}
        (self._out / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _check(self, out: Path) -> None:
        """ValueError unless what was written, to become `out`, is as planned: headers, and some bytes of every copied piece."""
        try:
            written = read_shards(self._out)
        except ValueError as error:
            raise ValueError(
                f"out={out}: its weights were not written as planned ({error}); is something writing there?"
            ) from error
        for name, shard in written.items():
            source, changed = self._shards[name], self._changed[name]
            wrong = shard.tensors != (self._plans[name] if changed else source.tensors)
            with source.path.open("rb") as theirs, shard.path.open("rb") as ours:
                same = (
                    _samples(theirs, source, t) == _samples(ours, shard, t) for t in source.tensors.keys() - changed
                )
                if wrong or not all(same):
                    raise ValueError(
                        f"out={out}: {name} was not written as planned; is something writing to it, or to {source.path}?"
                    )


def _samples(file: io.BufferedIOBase, shard: Shard, tensor: str) -> list[bytes]:
    """`_SAMPLE` bytes from the beginning of a tensor, every `_PIECE` further, and its end."""
    start, end = (shard.start + offset for offset in shard.tensors[tensor]["data_offsets"])

    def at(place: int) -> bytes:
        file.seek(place)
        return file.read(min(_SAMPLE, end - place))

    return [at(place) for place in [*range(start, end, _PIECE), max(start, end - _SAMPLE)]]


def _data_bytes(plan: Mapping[str, dict[str, Any]]) -> int:
    return max(tensor["data_offsets"][1] for tensor in plan.values())


def _header(metadata: dict[str, str] | None, plan: dict[str, dict[str, Any]]) -> bytes:
    encoded = json.dumps(({"__metadata__": metadata} if metadata else {}) | plan, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(encoded)) + encoded


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        if not _read_all(read, bytes_of(chunk)):
            raise _became_shorter(read)
        if rows is not None:
            total += in_float32[: len(chunk)].copy_(chunk).sum(0)
        _write_all(write, bytes_of(_cast(chunk, to_dtype, name)))
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
        _write_all(write, bytes_of(_cast(mean.expand(min(at_once, rows.num_rows - first), width), to_dtype, name)))
    end = write.tell()
    write.seek(begin + rows.mask_row * width * to_dtype.itemsize)
    _write_all(write, bytes_of(_cast(noisy, to_dtype, name)))
    write.seek(end)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and tensor.numel() and tensor.abs().max() > 65504:
        raise ValueError(f"dtype=float16: {name} holds {tensor.abs().max():.3g}, which float16 cannot; use bfloat16")
    return cast


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


def _copy_bytes(read: io.FileIO, write: io.FileIO, start: int, at: int, size: int) -> Iterator[tuple[int, int]]:
    """`size` bytes of `read` from `start` to `at` of `write`, inside the kernel where that can be done: (where, size) of each piece."""
    end = start + size
    while start < end:
        try:
            step = os.copy_file_range(
                read.fileno(), write.fileno(), min(end - start, _PIECE), offset_src=start, offset_dst=at
            )
        except (AttributeError, OSError) as error:  # not on macOS, nor between some filesystems
            if getattr(error, "errno", errno.ENOSYS) not in _NO_KERNEL_COPY:
                raise
            step = _copy_by_hand(read, write, start, at, min(end - start, _CHUNK))
        if not step:
            raise _became_shorter(read)
        yield at, step
        start, at = start + step, at + step


_NO_KERNEL_COPY = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EBADF, errno.EPERM}


def _copy_by_hand(read: io.FileIO, write: io.FileIO, start: int, at: int, size: int) -> int:
    read.seek(start)
    write.seek(at)
    piece = read.read(size)
    _write_all(write, memoryview(piece))
    return len(piece)


def _became_shorter(read) -> ValueError:
    return ValueError(f"base={read.name}: became shorter while it was read; is something writing to it?")
