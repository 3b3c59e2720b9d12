"""The arms of a comparison as speed measures them: each one's prompts of the same items, and how to write after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import adapt

from .lm import AdaptLM
from .measure.emitted import end_of_text_ids
from .measure.writers import SpeedArm, ar_arm, diffusion_arm

FALLBACK_NEW_TOKENS = 64


class Prompts(NamedTuple):
    """What speed is measured on: per arm the prompts as text, and how to write after them."""

    texts: dict[str, list[str]]
    until: list[str]
    max_new_tokens: int
    temperature: float
    top_p: float
    fallback: bool


def model_of(lm: Any) -> Any:
    return lm.lm.model if isinstance(lm, AdaptLM) else lm.model


def choose_prompts(results: Mapping[str, Mapping[str, Any]], count: int, adapted: AdaptLM) -> Prompts | None:
    """The first items' prompts of the first task that generates, of each arm its own; contexts where none does."""

    def first_items(task: str) -> dict[str, list[Any]]:
        chosen: dict[str, list[Any]] = {}
        for arm, result in results.items():
            by_document: dict[Any, Any] = {}
            for sample in result["samples"][task]:
                by_document.setdefault(sample["doc_id"], sample["arguments"][0])
            chosen[arm] = [by_document[k] for k in sorted(by_document)][:count]
        return chosen

    kinds = {t: c.get("output_type") for t, c in results["adapted"]["configs"].items()}
    tasks = list(results["adapted"]["samples"])
    for task in tasks:
        if kinds.get(task) != "generate_until":
            continue
        items = first_items(task)
        asked = adapted.settings_of(items["adapted"][0][1])
        texts = {arm: [arguments[0] for arguments in chosen] for arm, chosen in items.items()}
        sampler = asked["sampler"]
        return Prompts(texts, asked["until"], asked["max_gen_toks"], sampler.temperature, sampler.top_p, False)
    for task in tasks:
        if kinds.get(task) in ("loglikelihood", "multiple_choice"):
            texts = {arm: [a[0] for a in chosen if a[0]] for arm, chosen in first_items(task).items()}
            if all(texts.values()):
                sampler = adapted.sampler
                new_tokens = min(FALLBACK_NEW_TOKENS, adapted.max_length // 2)
                return Prompts(texts, [], new_tokens, sampler.temperature, sampler.top_p, True)
    return None


def speed_arm(arm: str, lm: Any, prompts: Prompts, sampler: adapt.SamplerConfig, seed: int) -> SpeedArm:
    model = model_of(lm)
    room = max(1, lm.max_length - prompts.max_new_tokens)
    tokens = [lm.tok_encode(text)[-room:] for text in prompts.texts[arm]]
    ends = {
        "until": prompts.until,
        "eos_ids": end_of_text_ids(model, lm.tokenizer),
        "max_new_tokens": prompts.max_new_tokens,
    }
    if isinstance(lm, AdaptLM):
        sampler = dataclasses.replace(sampler, temperature=prompts.temperature, top_p=prompts.top_p)
        return diffusion_arm(arm, lm.lm, tokens, sampler=sampler, seed=seed, **ends)
    return ar_arm(arm, model, lm.tokenizer, tokens, temperature=prompts.temperature, top_p=prompts.top_p, **ends)
