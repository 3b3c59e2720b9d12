"""Tensors from file to file: rewritten in chunks of rows, or copied inside the kernel, so that memory is bounded by `_CHUNK`."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..files.safetensors_folder import bytes_of
from .embedding_rows import NewRows
from .weight_plan import FLOATING

_CHUNK = 4 << 20  # bytes
PIECE = 16 << 20  # bytes that the kernel copies in one call
_NO_KERNEL_COPY = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EBADF, errno.EPERM}


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rewrite_tensor(
    read: io.FileIO, write: io.FileIO, name: str, old: dict[str, Any], new: dict[str, Any], rows: NewRows | None
) -> None:
    """Streams one tensor from where `read` stands to where `write` stands: cast, grown, with a new row for the mask token."""
    from_dtype, to_dtype = FLOATING[old["dtype"]], FLOATING[new["dtype"]]
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
        if chunk.numel() and not torch.stack(chunk.aminmax()).isfinite().all():
            raise not_finite(read.name, name)
        if rows is not None:
            total += in_float32[: len(chunk)].copy_(chunk).sum(0)
        _write_all(write, bytes_of(_cast(chunk, to_dtype, name)))
    if rows is None:
        return
    mean = total / num_old
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


def not_finite(path: Any, name: str) -> ValueError:
    """What is said of a tensor with NaN or infinity in it."""
    return ValueError(f"base={path}: {name} has NaN or infinity in it; mend the model, or download it again")


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


def copy_bytes(read: io.FileIO, write: io.FileIO, start: int, at: int, size: int) -> Iterator[tuple[int, int]]:
    """`size` bytes of `read` from `start` to `at` of `write`, inside the kernel where that can be done: (where, size) of each piece."""
    end = start + size
    while start < end:
        try:
            step = os.copy_file_range(
                read.fileno(), write.fileno(), min(end - start, PIECE), offset_src=start, offset_dst=at
            )
        except (AttributeError, OSError) as error:  # not on macOS, nor between some filesystems
            if getattr(error, "errno", errno.ENOSYS) not in _NO_KERNEL_COPY:
                raise
            step = _copy_by_hand(read, write, start, at, min(end - start, _CHUNK))
        if not step:
            raise _became_shorter(read)
        yield at, step
        start, at = start + step, at + step


def _copy_by_hand(read: io.FileIO, write: io.FileIO, start: int, at: int, size: int) -> int:
    read.seek(start)
    write.seek(at)
    piece = read.read(size)
    _write_all(write, memoryview(piece))
    return len(piece)


def _became_shorter(read) -> ValueError:
    return ValueError(f"base={read.name}: became shorter while it was read; is something writing to it?")
