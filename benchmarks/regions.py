"""Where a step's time goes: the operators of torch.profiler, summed and counted by the part of the step that they belong to.

Modules mark their forward; a backward operator belongs to the part whose forward made its autograd node.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("body", "attention", "head+loss", "mask", "embedding", "optimizer", "grad accumulation", "data", "other")
_BACKWARD_SCOPE = 1  # of torch's RecordScope


def profiler(model: Any) -> profile:
    """A profiler, not yet started, with the model's parts marked for it."""
    backbone: Any = model.base_model
    # What the model does before its backbone is building the mask, and after it the head. Inner ranges close first.
    model.register_forward_hook(lambda *_: _close("head+loss"))
    _mark(model, "mask")
    _mark(backbone, "body")
    backbone.register_forward_hook(lambda *_: _open("head+loss"))
    embedding: Any = model.get_input_embeddings()
    _mark(embedding, "embedding")
    for module in backbone.modules():
        if type(module).__name__.endswith("Attention"):
            _mark(module, "attention")
            for projection in module.modules():
                if isinstance(projection, nn.Linear):
                    _mark(projection, "body")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return profile(activities=activities)


def shares(done: profile, seconds: float) -> dict[str, Any]:
    """Seconds (on the GPU if there is one, else self CPU time) and operators of each part, and those that took most of it."""
    events = list(done.events())
    part_of_node = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not _is_backward(event):
            # The last operator before the counter moved on is the one that made the node.
            part_of_node[event.sequence_nr] = _part(event, {})
    parts: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        part = _part(event, part_of_node)
        parts[part] += _self_seconds(event)
        calls[part] += 1
    averages = done.key_averages()
    total = sum(_self_seconds(e) for e in averages)
    top = sorted(averages, key=_self_seconds, reverse=True)[:25]
    return {
        "seconds": seconds,
        "parts": {part: parts[part] for part in PARTS},
        "calls": {part: calls[part] for part in PARTS},
        "operators": [
            {"name": e.key, "calls": e.count, "self_seconds": _self_seconds(e), "share": _self_seconds(e) / total}
            for e in top
        ],
    }


def _part(event: FunctionEvent, part_of_node: dict[int, str]) -> str:
    """The nearest part around an operator."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith("part:"):
            return at.name.removeprefix("part:")
        if at.name.startswith("Optimizer."):
            return "optimizer"
        if at.name.startswith("enumerate(DataLoader)"):
            return "data"
        if "AccumulateGrad" in at.name:
            return "grad accumulation"
        if _is_backward(at) and at.sequence_nr in part_of_node:
            return part_of_node[at.sequence_nr]
        at = at.cpu_parent
    return "other"


def _is_backward(event: FunctionEvent) -> bool:
    return event.scope == _BACKWARD_SCOPE or event.name.startswith("autograd::engine::evaluate_function")


def _self_seconds(event: Any) -> float:
    return (event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total) / 1e6


_ranges: dict[str, list[record_function]] = defaultdict(list)


def _open(part: str) -> None:
    _ranges[part].append(record_function(f"part:{part}"))
    _ranges[part][-1].__enter__()


def _close(part: str) -> None:
    _ranges[part].pop().__exit__(None, None, None)


def _mark(module: nn.Module, part: str) -> None:
    module.register_forward_pre_hook(lambda *_: _open(part))
    module.register_forward_hook(lambda *_: _close(part))
