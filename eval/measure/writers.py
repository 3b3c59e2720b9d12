"""The arms as they write: a batch of prompts in, new tokens out; autoregressive by transformers, diffusion by our sampler.

Text, stop and count are one rule for all arms (emitted.py) and lie outside of the timed part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from adapt.tokens import left_padded, pad_token_id

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
        input_ids, attention_mask = left_padded(tokenizer, batch, model.device)
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
                pad_token_id=pad_token_id(tokenizer),
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
        input_ids, attention_mask = left_padded(lm.tokenizer, batch, lm.device)
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
