"""The lm-eval model `adapt`: any lm-eval task on a diffusion checkpoint, through lm-eval's own command line.

    adapt lm_eval --model adapt --model_args pretrained=out/smollm2,threshold=0.8 --tasks gsm8k --batch_size 8

`adapt compare` runs its adapted arm through the same class.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import lm_eval.models  # noqa: F401  registering ours into an empty registry would keep lm-eval from loading its own
import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, has_bos_prefix

import adapt
from adapt.decoding.settings import changed
from adapt.progress import Task, doing
from adapt.tokens import chat_text, left_padded, text_ids

from .answers import (
    bounds_of,
    check_max_length,
    check_requests,
    model_max_length,
    request_settings,
    rolling_windows,
    writes_greedily,
)
from .measure.emitted import Stop, count_tokens, emitted_text, end_of_text_ids
from .model_args import check_model_args

_logger = logging.getLogger(__name__)


class AdaptLM(TemplateLM):
    """lm-eval's view of a DiffusionLM.

    generate_until: the sampler on a canvas of `max_gen_toks`. A request's `until`, `max_gen_toks`, `do_sample`,
    `temperature`, `top_p` and `seed` come before the model's own settings.
    loglikelihood: minus the Monte-Carlo NELBO in nats, a lower bound of log p (exact for one token), with masks drawn
    by (seed, request), so that neither order nor batching changes it.
    is_greedy: whether the sampler, one surest token per step on a canvas of the continuation's length, writes the
    continuation. It is computed where a document has one continuation (lambada's `acc` is made of it); where it has
    several (multiple choice) lm-eval ranks likelihoods, and False is returned unless `greedy=always`.
    """

    def __init__(
        self,
        pretrained: str | adapt.DiffusionLM,
        *,
        adapter: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_new_tokens: int = 256,
        sampler: adapt.SamplerConfig | None = None,
        mc_samples: int = 32,
        seed: int = 1234,
        greedy: str = "auto",
        progress: bool = True,
        chat_template_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """pretrained: a diffusion checkpoint, or one that is loaded. max_new_tokens: canvas where a task names none. settings: of
        the sampler, one by one, before those of `sampler`."""
        super().__init__()
        given = {
            "adapter": adapter, "device": device, "attn_implementation": attn_implementation, "batch_size": batch_size,
            "max_length": max_length, "max_new_tokens": max_new_tokens, "mc_samples": mc_samples, "seed": seed,
            "greedy": greedy, "progress": progress, "chat_template_args": chat_template_args,
        }  # fmt: skip
        check_model_args(given | settings)
        self.lm = (
            adapt.load(pretrained, adapter=adapter, dtype=dtype, device=device, attn_implementation=attn_implementation)
            if isinstance(pretrained, str)
            else pretrained
        )
        self.sampler = changed(sampler or adapt.SamplerConfig(), **settings)
        self.tokenizer = self.lm.tokenizer
        self.batch_size = int(batch_size)
        self.max_new_tokens, self.mc_samples, self.seed, self.greedy = max_new_tokens, mc_samples, seed, greedy
        self.chat_template_args, self.progress = chat_template_args or {}, progress
        check_max_length(self.lm, max_length)
        self._max_length = max_length
        self._device = self.lm.device
        self._eos_ids = end_of_text_ids(self.lm.model, self.tokenizer)
        self._said_once: set[str] = set()
        self.counters: Counter[str] = Counter()
        """Since the start: generate_nfe, generate_tokens, generate_seconds, likelihood_nfe, likelihood_seconds."""

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> AdaptLM:
        """From lm-eval's --model_args, which come before its own --batch_size and --device (both may name them)."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None and k != "max_batch_size"}
        if str(given.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            del given["device"]  # lm-eval's command line says cuda:0 also where nobody did
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> AdaptLM:
        """The same from `key=value,key=value`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id  # pyright: ignore[reportReturnType]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id  # pyright: ignore[reportReturnType]

    @property
    def max_length(self) -> int:
        return self._max_length or model_max_length(self.lm)

    @property
    def max_gen_toks(self) -> int:
        return self.max_new_tokens

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids as lm-eval's own Hugging Face model has them: one BOS at most, where the tokenizer adds any."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return text_ids(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as one prompt, by the tokenizer's template (as lm-eval's own Hugging Face model does)."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return chat_text(self.tokenizer, chat_history, "apply_chat_template", **options, **self.chat_template_args)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text of each request up to its first stop string; requests of like settings and length share a batch."""
        asked: list[Any] = [request.args for request in requests]
        ordered = Collator(
            asked,
            sort_fn=lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],  # pyright: ignore[reportGeneralTypeIssues]
        )
        distinct = {json.dumps(kwargs, default=str): kwargs for _, kwargs in asked}
        check_requests(self.lm, map(self.settings_of, distinct.values()), self.max_length, self.batch_size)
        generators: dict[str, torch.Generator] = {}
        texts: list[str] = []
        with self._task(len(requests), "adapted: writing", disable_tqdm) as task:
            for batch in ordered.get_batched(n=self.batch_size):
                contexts, gen_kwargs = [c for c, _ in batch], batch[0][1]
                settings = self.settings_of(gen_kwargs)
                # One stream per kind of request, not per batch: repeats of a sampled request must differ.
                key = json.dumps(gen_kwargs, sort_keys=True, default=str)
                if key not in generators:
                    generators[key] = torch.Generator(device=self.lm.device).manual_seed(settings["seed"])
                written = self._write(contexts, settings, generators[key])
                for context, text in zip(contexts, written):
                    self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
                texts += written
                task.update(len(written))
        return ordered.get_original(texts)

    def settings_of(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What one request asks for: until, max_gen_toks, seed, sampler."""
        settings, ignored = request_settings(gen_kwargs, self.sampler, self.max_new_tokens, self.seed)
        if ignored:
            self._say_once(f"generation settings that the diffusion sampler has no use for: {', '.join(ignored)}")
        return settings

    def _write(self, contexts: Sequence[str], settings: dict[str, Any], generator: torch.Generator) -> list[str]:
        room = self.max_length - settings["max_gen_toks"]
        prompts = [self.tok_encode(context) for context in contexts]
        if any(len(p) > room for p in prompts):
            self._say_once(f"prompts longer than {room} tokens lose their beginning (max_length={self.max_length})")
        input_ids, attention_mask = left_padded(self.tokenizer, [p[-room:] for p in prompts], self.lm.device)
        start = time.perf_counter()
        out = self.lm.generate(
            input_ids,
            max_new_tokens=settings["max_gen_toks"],
            attention_mask=attention_mask,
            sampler=settings["sampler"],
            generator=generator,
            stop=Stop(self.tokenizer, settings["until"], self._eos_ids),
        )
        rows = out.sequences[:, input_ids.shape[1] :].tolist()
        self.counters["generate_seconds"] += time.perf_counter() - start  # pyright: ignore[reportArgumentType]
        self.counters["generate_nfe"] += out.nfe
        texts = [emitted_text(self.tokenizer, row, settings["until"], self._eos_ids) for row in rows]
        counts = [count_tokens(self.tokenizer, text, row, self._eos_ids) for text, row in zip(texts, rows)]
        self.counters["generate_tokens"] += sum(counts)
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(-NELBO in nats, is_greedy) of each continuation given its context; see the class."""
        continuations = Counter((r.task_name, r.doc_id) for r in requests)
        encoded = [self._encode_request(*r.args) for r in requests]
        pairs: list[Any] = [(r.args, *pair) for r, pair in zip(requests, encoded)]
        wanted = [self.greedy == "always" or continuations[r.task_name, r.doc_id] == 1 for r in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm, greedy_wanted=wanted)

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        # A text that begins with the prefix token brings its own.
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_token_id] else ([self.prefix_token_id], tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        greedy_wanted: Sequence[bool] | None = None,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, target) for _, context, target in requests]
        nats = self._nelbo(pairs, disable_tqdm)
        wanted = [i for i, w in enumerate(greedy_wanted or [False] * len(pairs)) if w]
        greedy = dict(zip(wanted, self._is_greedy([pairs[i] for i in wanted], disable_tqdm)))
        answers = [(-value, greedy.get(i, False)) for i, value in enumerate(nats)]
        for (arguments, _context, _target), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", arguments, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """-NELBO in nats of each whole text, in windows of max_length, every token predicted once."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            own = rolling_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length)
            windows += own
            owner += [i] * len(own)
        totals = [0.0] * len(requests)
        for i, value in zip(owner, self._nelbo(windows, disable_tqdm)):
            totals[i] -= value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _fit(self, context: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        """The pair cut to max_length, from the left."""
        over = len(context) + len(target) - self.max_length
        if over <= 0:
            return context, target
        self._say_once(f"requests longer than max_length={self.max_length} tokens lose their beginning")
        return context[over:] or [self.prefix_token_id], target[1 - self.max_length :]

    def _nelbo(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[float]:
        start = time.perf_counter()
        with self._task(
            sum(bool(target) for _, target in pairs), "adapted: likelihood, Monte Carlo", disable_tqdm
        ) as task:
            rows = max(self.batch_size, self.mc_samples)
            nats, nfe = bounds_of(self.lm, pairs, self.mc_samples, rows, self.seed, task)
        self.counters["likelihood_nfe"] += nfe
        self.counters["likelihood_seconds"] += time.perf_counter() - start  # pyright: ignore[reportArgumentType]
        return nats

    def _is_greedy(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[bool]:
        surest = dataclasses.replace(self.sampler, threshold=None, tokens_per_step=1, temperature=0.0, top_p=1.0)
        with self._task(len(pairs), "adapted: greedy continuations", disable_tqdm) as task:
            found, nfe = writes_greedily(self.lm, pairs, surest, self.batch_size, task)
        self.counters["likelihood_nfe"] += nfe
        return found

    def _task(self, total: int, what: str, disable: bool) -> AbstractContextManager[Task]:
        return doing(what, total=total, shown=self.progress and not disable and total > 0)

    def _say_once(self, what: str) -> None:
        if what not in self._said_once:
            self._said_once.add(what)
            _logger.warning(what)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.lm.model.parameters()),
            "model_dtype": str(self.lm.model.dtype),
            "diffusion": dataclasses.asdict(self.lm.spec),
            "sampler": dataclasses.asdict(self.sampler),
            "mc_samples": self.mc_samples,
            "seed": self.seed,
        }


# Not as a decorator: its return type is lm-eval's LM, which hides AdaptLM from type checkers.
register_model("adapt")(AdaptLM)
