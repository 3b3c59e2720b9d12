"""What numbers were taken on."""

from __future__ import annotations

import os
from typing import Any

import torch


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on: CPU model, cores this process may use, torch threads, GPU."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": _usable_cores(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
