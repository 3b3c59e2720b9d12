"""How fast the arms write: the same prompts' tasks, the same stop, arms taking turns so that machine drift cancels.

    rows = measure([ar_arm("base", model, tokenizer, prompts, ...), diffusion_arm("adapted", lm, prompts, ...)],
                   batch_sizes=(1, 8), repeats=3)

An arm returns the new tokens of a batch; text, stop and count are one rule for all arms (emitted.py) and lie outside of
the timed part. A forward is one call of the network on the whole batch, the prompt's own included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from adapt.progress import doing

from .writers import SpeedArm


@dataclass
class _Timing:
    seconds: list[float] = field(default_factory=list)
    round_rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    token_forwards: int = 0
    peak: int = 0


def measure(
    arms: Sequence[SpeedArm],
    *,
    tokenizer: Any,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 3,
    until: float | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One row per arm and batch size of the report's `speed`, and `tokens_per_s_runs`, one rate per round.

    A round lets every arm write all of its prompts once; rounds follow each other with the order of the arms turned.
    tokens_per_s is the median round; latency is a request's, that is its whole batch's. tpf: emitted tokens per
    sequence and forward. peak_memory_bytes: on CUDA the arm's own weights and what its batches added; on CPU the whole
    process. `tokenizer` counts the tokens of all arms. A batch size larger than the number of prompts is skipped. until: when to be
    done (time.monotonic()): a batch size has one round in any case, and another only if it fits into its share of what is left.
    """
    sizes = [b for b in batch_sizes if all(b <= len(arm.prompts) for arm in arms)]
    timings = {(arm.name, arm.sampler, size): _Timing() for size in sizes for arm in arms}
    batches = {size: {id(arm): _batches(arm.prompts, size) for arm in arms} for size in sizes}
    total = sum(len(b) for size in sizes for b in batches[size].values()) * repeats + len(sizes) * len(arms)
    with doing("speed", total=total, shown=progress) as task:
        for number, size in enumerate(sizes):
            now = time.monotonic()
            end = None if until is None else now + (until - now) / (len(sizes) - number)
            for arm in arms:  # warm-up: kernels, allocator, caches
                task.figures = [f"{arm.name}, batch {size}, warm-up"]
                arm.write(batches[size][id(arm)][0])
                task.update()
            begun = time.monotonic()
            for turn in range(repeats):
                now = time.monotonic()
                if turn and end is not None and now + (now - begun) / turn > end:
                    break
                shift = turn % len(arms)
                for arm in [*arms[shift:], *arms[:shift]]:
                    task.figures = [f"{arm.name}, batch {size}"]
                    timing = timings[arm.name, arm.sampler, size]
                    tokens, seconds = 0, 0.0
                    for batch in batches[size][id(arm)]:
                        new, spent = _timed(arm, batch, timing, tokenizer)
                        tokens, seconds = tokens + new, seconds + spent
                        task.update()
                    timing.round_rates.append(tokens / seconds)
    return [_row(arm, size, timings[arm.name, arm.sampler, size]) for size in sizes for arm in arms]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[Sequence[Sequence[int]]]:
    """Full batches only: a short last one would be another batch size."""
    return [prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size)]


def _timed(arm: SpeedArm, batch: Sequence[Sequence[int]], timing: _Timing, tokenizer: Any) -> tuple[int, float]:
    cuda = arm.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize(arm.device)
        torch.cuda.reset_peak_memory_stats(arm.device)
        before = torch.cuda.memory_allocated(arm.device)
    start = time.perf_counter()
    written = arm.write(batch)
    if cuda:
        torch.cuda.synchronize(arm.device)
    seconds = time.perf_counter() - start
    peak = arm.weight_bytes + torch.cuda.max_memory_allocated(arm.device) - before if cuda else _resident_bytes()
    counts = [arm.count(tokenizer, row) for row in written.new_tokens]
    timing.seconds.append(seconds)
    timing.tokens += counts
    timing.nfe.append(written.nfe)
    timing.token_forwards += written.nfe * len(batch)
    timing.peak = max(timing.peak, peak)
    if written.ttft_s is not None:
        timing.ttft.append(written.ttft_s)
    return sum(counts), seconds


def _resident_bytes() -> int:
    """Largest resident size of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _row(arm: SpeedArm, size: int, timing: _Timing) -> dict[str, Any]:
    used = [p for batch in _batches(arm.prompts, size) for p in batch]
    return {
        "arm": arm.name,
        "sampler": arm.sampler,
        "batch_size": size,
        "prompt_tokens": float(np.mean([len(p) for p in used])),
        "new_tokens": float(np.mean(timing.tokens)),
        "tokens_per_s": median(timing.round_rates),
        "latency_p50_s": float(np.percentile(timing.seconds, 50)),
        "latency_p95_s": float(np.percentile(timing.seconds, 95)),
        "ttft_s": float(np.median(timing.ttft)) if timing.ttft else None,
        "nfe": float(np.mean(timing.nfe)),
        "tpf": sum(timing.tokens) / timing.token_forwards if timing.token_forwards else None,
        "peak_memory_bytes": timing.peak or None,
        "runs": len(timing.round_rates),
        "tokens_per_s_runs": timing.round_rates,
    }
