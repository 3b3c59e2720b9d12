"""Which dtype a machine computes in: bfloat16 where that is native, else float32.

A GPU is asked; a CPU is measured, because libraries say yes where they emulate. One core, one linear layer, 0.2 s, bf16 beside
fp32 in GFLOP/s: 204 and 97 with AVX512-BF16 (EPYC), 37 and 97 with AVX-512 alone, 20 and 97 with AVX2 (2026-11-24, torch 2.13).
"""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, NamedTuple

import torch

from ..spec import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
_NATIVE = 0.8
"""least speed of bf16 over that of fp32 that counts as native; what emulates it has 0.2 to 0.4, what computes it 2 to 8"""
_ROWS, _IN, _OUT, _ROUNDS = 256, 576, 1536, 7


class CpuSpeed(NamedTuple):
    """GFLOP/s of one core, in a linear layer."""

    bf16: float
    fp32: float


@cache
def cpu_speed() -> CpuSpeed:
    """How fast a core of this CPU multiplies matrices in either dtype: best of a few, in turns.

    In the thread's own CPU seconds: by the clock a machine that is shared by many looked as if it emulated bf16.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    try:
        with torch.no_grad():
            pairs = {dtype: (torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype)) for dtype in best}
            for round in range(_ROUNDS + 1):
                for dtype, (inputs, weight) in pairs.items():
                    start = time.thread_time()
                    torch.nn.functional.linear(inputs, weight)
                    if round:  # the first makes the kernel
                        best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    operations = 2e-9 * _ROWS * _IN * _OUT
    return CpuSpeed(operations / best[torch.bfloat16], operations / best[torch.float32])


def has_native_bf16(device: torch.device | str | None = None) -> bool:
    """Whether the device (default: CUDA if there is one, else the CPU) computes bfloat16 and does not emulate it."""
    kind = _kind(device)
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        bf16, fp32 = cpu_speed()
        return bf16 >= _NATIVE * fp32
    return True  # a GPU that is planned for and not here, and other accelerators


def resolved_precision(precision: str, device: torch.device | str | None = None) -> Literal["bf16", "fp32"]:
    """What `auto` means on the device; anything else is obeyed."""
    if precision == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    assert precision in ("bf16", "fp32"), precision
    return precision  # pyright: ignore[reportReturnType]


def about_precision(asked: str, device: torch.device | str | None = None) -> str | None:
    """One line on what was chosen and why, or a warning where bf16 was asked for and is emulated; None where nothing is to be said."""
    if asked == "fp32":
        return None
    native, kind = has_native_bf16(device), _kind(device)
    if kind == "cpu":
        bf16, fp32 = cpu_speed()
        figures = f"a core computes {bf16:.0f} GFLOP/s in bf16 and {fp32:.0f} in fp32"
    else:
        figures = "this GPU computes bf16" if native else "this GPU does not compute bf16"
    if asked == "auto":
        return f"precision auto: {resolved_precision(asked, device)} ({figures})"
    if asked == "bf16" and not native:
        factor = f"about {cpu_speed().fp32 / cpu_speed().bf16:.1f} times slower than fp32" if kind == "cpu" else "slow"
        return f"precision bf16: is emulated here, {factor} ({figures}); fp32 or auto is faster"
    return None


def default_dtype(stored: torch.dtype | str | None, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype to load weights in that are stored as `stored`: that one, or float32 where the device would emulate it, as
    CPUs do float16. Weights in float32 stay so: half of their bits are not given away unasked.
    """
    if isinstance(stored, str):
        stored = getattr(torch, stored.removeprefix("torch."), None)
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    assert isinstance(stored, torch.dtype)
    is_native = _kind(device) != "cpu" if stored == torch.float16 else has_native_bf16(device)
    return stored if is_native else torch.float32


def compute_dtype_of(device: torch.device | str | None = None) -> torch.dtype:
    """The dtype that the device computes fastest without loss of range: bfloat16, or float32 where it emulates that."""
    return torch.bfloat16 if has_native_bf16(device) else torch.float32


def _kind(device: torch.device | str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type
