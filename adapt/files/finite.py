"""Whether weights are numbers: one pass over a safetensors file, in bounded memory, or over the parameters where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_folder import DTYPES, Shard, read_shards

_CHUNK = 16 << 20  # bytes
_FLOATING = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


def first_not_finite(shard: Shard) -> str | None:
    """The name of a tensor of a safetensors file with NaN or infinity in it; None if there is none."""
    buffer = bytearray(_CHUNK)
    with shard.path.open("rb", buffering=0) as file:
        for name, tensor in shard.tensors.items():
            dtype = _FLOATING.get(tensor["dtype"])
            start, end = (shard.start + offset for offset in tensor["data_offsets"])
            if dtype is None:
                continue
            file.seek(start)
            while start < end:
                view = memoryview(buffer)[: min(end - start, _CHUNK)]
                size = file.readinto(view) // dtype.itemsize * dtype.itemsize  # a piece may end inside of a number
                if not size:
                    raise ValueError(f"{shard.path}: became shorter while it was read; is something writing to it?")
                if not _is_finite(torch.frombuffer(view[:size], dtype=dtype)):
                    return name
                start += size
                file.seek(start)
    return None


def check_folder_finite(folder: Path, what: str) -> None:
    """ValueError that begins with `what` if a tensor in the folder's safetensors files has NaN or infinity in it."""
    for name, shard in read_shards(folder, what).items():
        if tensor := first_not_finite(shard):
            raise ValueError(f"{what}: {tensor} ({name}) has NaN or infinity in it")


@torch.no_grad()
def first_not_finite_parameter(parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a parameter with NaN or infinity in it, as far as it lies on this rank; None if there is none.

    Under ZeRO-3 a rank looks at its own partition (`ds_tensor`), which may lie in the CPU's memory; what is on NVMe is not read.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters:
        here = getattr(parameter, "ds_tensor", parameter)
        if here.is_floating_point() and here.numel():
            # min and max are NaN where one number is, and finite only where all are: no copy is made, as isfinite makes one
            found[name] = torch.stack(here.detach().aminmax()).isfinite().all()
    by_device: dict[torch.device, list[str]] = {}
    for name, is_finite in found.items():
        by_device.setdefault(is_finite.device, []).append(name)
    for names in by_device.values():  # one wait for each device, and not one for each parameter
        finite = torch.stack([found[name] for name in names]).tolist()
        if not all(finite):
            return names[finite.index(False)]
    return None


def _is_finite(values: Tensor) -> bool:
    low, high = values.aminmax()
    return math.isfinite(low) and math.isfinite(high)
