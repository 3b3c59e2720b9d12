"""What an lm-eval request asks of a diffusion model: a sampler, bounds on likelihoods, whether a text is its greedy one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

import adapt
from adapt.decoding.likelihood import nelbo
from adapt.decoding.room import check_room, positions_of
from adapt.progress import Task
from adapt.tokens import left_padded

_HANDLED = {"do_sample", "max_gen_toks", "seed", "temperature", "top_p", "until"}
_CHUNK = 64
"""Requests per call of nelbo: small enough for a progress bar, large enough to fill batches."""

Pairs = Sequence[tuple[list[int], list[int]]]
"""(context, target) of each request, token ids"""


def request_settings(
    gen_kwargs: Mapping[str, Any], sampler: adapt.SamplerConfig, max_new_tokens: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """({until, max_gen_toks, seed, sampler} of a request, before which the model's own settings stand back; what is ignored)."""
    asked: dict[str, Any] = {**normalize_gen_kwargs(dict(gen_kwargs), max_new_tokens)}
    if "do_sample" in gen_kwargs or "temperature" in gen_kwargs:
        # transformers samples at temperature 1 where none is given
        temperature = float(asked["temperature"] if "temperature" in gen_kwargs else 1.0) if asked["do_sample"] else 0.0
        sampler = dataclasses.replace(sampler, temperature=temperature)
    if gen_kwargs.get("top_p") is not None:
        sampler = dataclasses.replace(sampler, top_p=float(gen_kwargs["top_p"]))
    own_seed = gen_kwargs.get("seed")
    settings = {
        "until": [u for u in asked.get("until", []) if u],
        "max_gen_toks": asked["max_gen_toks"],
        "seed": seed if own_seed is None else int(own_seed),
        "sampler": sampler,
    }
    return settings, sorted(set(asked) - _HANDLED)


def check_max_length(lm: adapt.DiffusionLM, max_length: object) -> None:
    """ValueError for a max_length (None: the model's own) that the model has no positions for."""
    most = positions_of(lm)
    if max_length is not None and not (isinstance(max_length, int) and 1 < max_length <= most):
        raise ValueError(
            f"max_length={max_length!r:.60}: must be a whole number from 2 to the model's {most} positions"
        )


def model_max_length(lm: adapt.DiffusionLM) -> int:
    """Tokens of a prompt and what is written after it, as lm-eval reads a model; never more than its positions."""
    return min(resolve_max_length(lm.model.config, lm.tokenizer, default=2048), positions_of(lm))


def check_requests(
    lm: adapt.DiffusionLM, requests: Iterable[Mapping[str, Any]], max_length: int, batch_size: int
) -> None:
    """ValueError for settings (of `request_settings`) that leave no room, whatever the prompt is; before the first is written."""
    for settings in requests:
        wanted = settings["max_gen_toks"]
        if type(wanted) is not int or wanted < 1:
            raise ValueError(f"max_gen_toks={wanted!r:.60}: must be a whole number of at least 1")
        if wanted >= max_length:
            raise ValueError(f"max_gen_toks={wanted}: leaves no room for a prompt in max_length={max_length}")
        check_room(lm, prompt=1, blanks=wanted, rows=batch_size, sampler=settings["sampler"], what="max_gen_toks")


def rolling_windows(tokens: list[int], prefix_token: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """(context, target) pairs in which every token of a long text is predicted once."""
    # The canvas comes after its context: one token more than an AR window.
    options = {"prefix_token": prefix_token, "max_seq_len": max_length - 1, "context_len": 1}
    return [utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(token_list=tokens, **options)]


def bounds_of(
    lm: adapt.DiffusionLM, pairs: Pairs, num_samples: int, batch_size: int, seed: int, task: Task
) -> tuple[list[float], int]:
    """(NELBO in nats of each target given its context, rows that went through the model); an empty target is certain.

    Longest first, so that a batch that is too large fails at once.
    """
    order = sorted((i for i in range(len(pairs)) if pairs[i][1]), key=lambda i: -sum(map(len, pairs[i])))
    nats, nfe = [0.0] * len(pairs), 0
    options = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    for at in range(0, len(order), _CHUNK):
        chunk = order[at : at + _CHUNK]
        bounds = nelbo(lm, [pairs[i][0] for i in chunk], [pairs[i][1] for i in chunk], **options)
        for i, bound in zip(chunk, bounds):
            nats[i] = bound.nats
            nfe += bound.nfe
        task.update(len(chunk))
    return nats, nfe


def writes_greedily(
    lm: adapt.DiffusionLM, pairs: Pairs, sampler: adapt.SamplerConfig, batch_size: int, task: Task
) -> tuple[list[bool], int]:
    """(whether the sampler writes each target on a canvas of its length, forwards); an empty one by writing nothing."""
    by_length: dict[int, list[int]] = {}
    for i, (_context, target) in enumerate(pairs):
        by_length.setdefault(len(target), []).append(i)
    found, nfe = [True] * len(pairs), 0
    for length, members in sorted(by_length.items()):
        members.sort(key=lambda i: -len(pairs[i][0]))
        for at in range(0, len(members) if length else 0, batch_size):
            batch = members[at : at + batch_size]
            input_ids, attention_mask = left_padded(lm.tokenizer, [pairs[i][0] for i in batch], lm.device)
            out = lm.generate(input_ids, max_new_tokens=length, attention_mask=attention_mask, sampler=sampler)
            nfe += out.nfe
            for i, row in zip(batch, out.sequences[:, input_ids.shape[1] :].tolist()):
                found[i] = row == pairs[i][1]
            task.update(len(batch))
    return found, nfe
