"""How fast the arms write: the same prompts' tasks, the same stop, arms taking turns so that machine drift cancels.

    rows = measure([ar_arm("base", model, tokenizer, prompts, ...), diffusion_arm("adapted", lm, prompts, ...)],
                   batch_sizes=(1, 8), repeats=3)

An arm returns the new tokens of a batch; text, stop and count are one rule for all arms (emitted.py) and lie outside of
the timed part. A forward is one call of the network on the whole batch, the prompt's own included.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from adapt.progress import doing

from .emitted import Stop, count_tokens, emitted_text


class Written(NamedTuple):
    """One batch: the new tokens of each row (as the model gave them), forwards, seconds until the first token stood."""

    new_tokens: list[list[int]]
    nfe: int
    ttft_s: float | None


@dataclass(frozen=True)
class SpeedArm:
    """An arm that can write. `write(batch of prompts)` is what is timed; `count(tokenizer, new tokens)` counts what a
    row emitted; `weight_bytes` and `device` are for memory."""

    name: str
    sampler: str
    prompts: Sequence[Sequence[int]]
    write: Callable[[Sequence[Sequence[int]]], Written]
    count: Callable[[Any, list[int]], int]
    device: torch.device
    weight_bytes: int = 0


@dataclass
class _Timing:
    seconds: list[float] = field(default_factory=list)
    round_rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    token_forwards: int = 0
    peak: int = 0


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both [B, P], prompts on the right side."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        attention_mask[i, width - len(prompt) :] = 1
    return ids.to(device), attention_mask.to(device)


def pad_id_of(tokenizer: Any) -> int:
    """The padding id; end-of-text where the tokenizer has none (padding is never attended to)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


class _RowStop(StoppingCriteria):
    """Ends a row of `generate` where the diffusion sampler would end it, and notes when the first token stood."""

    def __init__(self, stop: Stop, prompt_width: int) -> None:
        self.stop, self.prompt_width, self.first_at = stop, prompt_width, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # pyright: ignore
        start = max(self.prompt_width, input_ids.shape[1] - self.stop.tail_tokens)
        done = [self.stop(row) for row in input_ids[:, start:].tolist()]  # .tolist() waits for the device
        if self.first_at is None:
            self.first_at = time.perf_counter()
        return torch.tensor(done, device=input_ids.device)


def ar_arm(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> SpeedArm:
    """An autoregressive arm: transformers' `generate` with its KV cache, greedy unless a temperature is given."""
    stop = Stop(tokenizer, until, eos_ids)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

    @torch.inference_mode()
    def write(batch: Sequence[Sequence[int]]) -> Written:
        input_ids, attention_mask = left_pad(batch, pad_id_of(tokenizer), model.device)
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        criterion = _RowStop(stop, input_ids.shape[1])
        hook = model.register_forward_pre_hook(count)
        start = time.perf_counter()
        try:
            sequences = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([criterion]),
                eos_token_id=list(eos_ids) or None,
                pad_token_id=pad_id_of(tokenizer),
                use_cache=True,
                **sampling,
            )
        finally:
            hook.remove()
        first = None if criterion.first_at is None else criterion.first_at - start
        return Written(sequences[:, input_ids.shape[1] :].tolist(), forwards, first)

    words = f"temperature={temperature:g}, top_p={top_p:g}" if temperature else "greedy"
    return SpeedArm(name, words, prompts, write, _counter(tokenizer, until, eos_ids), model.device, weights(model))


def diffusion_arm(
    name: str,
    lm: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Any,
    until: Sequence[str],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    seed: int = 1234,
) -> SpeedArm:
    """An adapted arm: DiffusionLM.generate. Its first token counts once nothing left of it can change any more."""
    stop = Stop(lm.tokenizer, until, eos_ids)

    def write(batch: Sequence[Sequence[int]]) -> Written:
        input_ids, attention_mask = left_pad(batch, pad_id_of(lm.tokenizer), lm.device)
        first: list[float] = []

        def stop_and_note(settled: list[int]) -> bool:
            if settled and not first:
                first.append(time.perf_counter())
            return stop(settled)

        start = time.perf_counter()
        out = lm.generate(
            input_ids,
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            sampler=sampler,
            generator=torch.Generator(device=lm.device).manual_seed(seed),
            stop=stop_and_note,
        )
        ttft = first[0] - start if first else None
        return Written(out.sequences[:, input_ids.shape[1] :].tolist(), out.nfe, ttft)

    return SpeedArm(
        name, sampler_words(sampler), prompts, write,
        _counter(lm.tokenizer, until, eos_ids), lm.device, weights(lm.model),
    )  # fmt: skip


def sampler_words(sampler: Any) -> str:
    """The settings of a SamplerConfig that do something, in words: `threshold=0.9, temperature=0.5`."""
    neutral = {"temperature": 0.0, "top_p": 1.0, "order": "confidence"}
    said = {k: v for k, v in vars(sampler).items() if v is not None and k != "seed" and neutral.get(k) != v}
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in said.items()) or "default"


def _counter(own: Any, until: Sequence[str], eos_ids: Sequence[int]) -> Callable[[Any, list[int]], int]:
    """Counts a row's emitted tokens: text by the arm's own tokenizer, count by the one tokenizer of all arms."""

    def count(tokenizer: Any, tokens: list[int]) -> int:
        return count_tokens(tokenizer, emitted_text(own, tokens, until, eos_ids), tokens, eos_ids)

    return count


def weights(model: Any) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def measure(
    arms: Sequence[SpeedArm],
    *,
    tokenizer: Any,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 3,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One row per arm and batch size with the keys of DESIGN.md 4.4, and `tokens_per_s_runs`, one rate per round.

    A round lets every arm write all of its prompts once; rounds follow each other with the order of the arms turned.
    tokens_per_s is the median round; latency is a request's, that is its whole batch's. tpf: emitted tokens per
    sequence and forward. peak_memory_bytes: on CUDA the arm's own weights and what its batches added; on CPU the whole
    process. `tokenizer` counts the tokens of all arms. A batch size larger than the number of prompts is skipped.
    """
    sizes = [b for b in batch_sizes if all(b <= len(arm.prompts) for arm in arms)]
    timings = {(arm.name, arm.sampler, size): _Timing() for size in sizes for arm in arms}
    batches = {size: {id(arm): _batches(arm.prompts, size) for arm in arms} for size in sizes}
    total = sum(len(b) for size in sizes for b in batches[size].values()) * repeats + len(sizes) * len(arms)
    with doing("speed", total=total, shown=progress) as task:
        for size in sizes:
            for arm in arms:  # warm-up: kernels, allocator, caches
                task.figures = [f"{arm.name}, batch {size}, warm-up"]
                arm.write(batches[size][id(arm)][0])
                task.update()
            for turn in range(repeats):
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
