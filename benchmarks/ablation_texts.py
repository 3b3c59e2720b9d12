"""Texts that a model wrote itself: of such texts its own NLL is the entropy, so that NELBO minus NLL bounds a KL divergence.

A text is kept if it ends within the context window and its string tokenises back to the same tokens. That is a selection S with
P(S) = Z: of the kept texts, q(x) = p(x) / Z, the entropy is the NLL plus log Z, and KL(q || adapted) <= NELBO - NLL - log Z.
Answers to prompts are all kept, as token ids, and cut where they get too long: nothing is selected, and Z = 1.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.trainer_utils import set_seed

from adapt.files.staging import write_whole

LARGEST_BLOCK = 32  # of all arms, whose block sizes divide it
AFTER_PROMPTS = 64  # texts sampled side by side after prompts: their cache grows with the length of the longest


class Text(NamedTuple):
    """What is trained on and scored."""

    ids: list[int]
    """with its end-of-text, unless it was cut, and without its context"""
    context: Sequence[int] = ()
    """tokens of the prompt that it answers; () = it follows the start-of-text alone"""

    def row(self, tokenizer: Any) -> dict[str, Any]:
        """As a line of training data."""
        if self.context:
            return {"context": self.context, "target": self.ids}
        return {"text": tokenizer.decode(self.ids[:-1])}


class Chunk(NamedTuple):
    """What became of the samples of one seed."""

    sampled: int
    ended: int
    """within the context window, or before they were cut"""
    kept: list[list[int]]
    """tokens of each text, as Text.ids"""
    contexts: Sequence[list[int]] = ()
    """of each text; () = without prompts"""
    cpu_s: float = 0.0

    @property
    def texts(self) -> list[Text]:
        return [Text(*one) for one in zip(self.kept, self.contexts or [()] * len(self.kept), strict=True)]


def write_base(source: Path, out: Path, random_seed: int | None = None, *, end_is_start: bool = True) -> Path:
    """A copy of a model, in fp32.

    random_seed: the copy has random weights, as `from_config` draws them. end_is_start: its end-of-text is its start-of-text, which
    a llama2.c model was trained to write between texts.
    """
    if out.exists():
        return out
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    if random_seed is not None:
        set_seed(random_seed)
        model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    if end_is_start:
        tokenizer.eos_token = tokenizer.bos_token
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    if not out.exists():  # another worker may have been first
        staged.rename(out)
    return out


def num_parameters(base: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False).num_parameters()


def read_prompts(file: Path, column: str, base: Path, longest: int) -> list[list[int]]:
    """The tokens of that column of every row, as a user's turn in the base's chat template if it has one, shuffled once for all.

    Prompts of more than `longest` tokens are left out. Raises ValueError for a file without such a column of strings.
    """
    from adapt.training.data.examples import load_rows
    from adapt.training.recipe import DataConfig

    found = load_rows(DataConfig(train=str(file), columns={"text": column}))["text"]
    if not all(isinstance(one, str) and one for one in found):
        raise ValueError(f"--prompt_column={column}: holds rows that are no text or are empty; remove them")
    tokenizer: Any = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    prompts = [prompt_ids(tokenizer, one) for one in dict.fromkeys(found)]
    prompts = [ids for ids in prompts if len(ids) <= longest]
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(question)["input_ids"]
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def sample(base: Path, seed: int, rows: int) -> Chunk:
    """Texts at temperature 1, all of the vocabulary: exact draws from the model."""
    started = time.process_time()
    model, tokenizer = _loaded(base)
    limit = model.config.max_position_embeddings - 1
    texts = _continued(model, [[tokenizer.bos_token_id]] * rows, limit, tokenizer.eos_token_id, _generator(seed))
    ended = [text for text in texts if text[-1] == tokenizer.eos_token_id]
    kept = [text for text in ended if _tokenises_back(tokenizer, text[:-1])]
    return Chunk(rows, len(ended), kept, cpu_s=round(time.process_time() - started, 1))


@torch.no_grad()
def answer(base: Path, seed: int, prompts: list[list[int]], max_new_tokens: int) -> Chunk:
    """A text after each prompt, drawn in the same way.

    What gets longer is cut where a block of every arm ends, within max_new_tokens: training fills the last block with end-of-text.
    """
    started = time.process_time()
    model, tokenizer = _loaded(base)
    end, generator = tokenizer.eos_token_id, _generator(seed)
    texts: list[list[int]] = []
    for at in range(0, len(prompts), AFTER_PROMPTS):
        texts += _continued(model, prompts[at : at + AFTER_PROMPTS], max_new_tokens, end, generator)
    cut = [max_new_tokens - (len(prompt) + max_new_tokens) % LARGEST_BLOCK for prompt in prompts]
    kept = [text[:length] for text, length in zip(texts, cut, strict=True)]
    ended = sum(text[-1] == end for text in kept)
    return Chunk(len(kept), ended, kept, prompts, round(time.process_time() - started, 1))


def _loaded(base: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).eval()
    return model, AutoTokenizer.from_pretrained(base, trust_remote_code=False)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _continued(
    model: Any, contexts: list[list[int]], limit: int, end: int, generator: torch.Generator
) -> list[list[int]]:
    """What follows each context, up to its first `end`, `limit` tokens at most. Finished texts leave the batch."""
    texts: list[list[int]] = [[] for _ in contexts]
    alive, cache = torch.arange(len(contexts)), DynamicCache(config=model.config)
    width = max(map(len, contexts))
    token = torch.tensor(
        [[end] * (width - len(one)) + one for one in contexts]
    )  # padding on the left is not attended to
    seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in contexts])
    for _ in range(limit):
        position = (seen.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]
        found = model(
            input_ids=token,
            attention_mask=seen,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = torch.multinomial(found.logits[:, -1].float().softmax(-1), 1, generator=generator)
        for text, one in zip(alive.tolist(), token[:, 0].tolist(), strict=True):
            texts[text].append(one)
        going = token[:, 0] != end
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
            alive, token, seen = alive[going], token[going], seen[going]
        if not len(alive):
            break
        seen = torch.cat([seen, torch.ones_like(token)], 1)
    return texts


def _tokenises_back(tokenizer: Any, ids: list[int]) -> bool:
    return bool(ids) and tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids


def saved_chunk(
    base: Path, folder: Path, seed: int, rows: int, prompts: list[list[int]] | None, max_new_tokens: int
) -> Chunk:
    """The chunk of that seed, from its file if it was sampled before; ValueError if that was after other prompts."""
    path = folder / (f"texts-{seed}.json" if prompts is None else f"texts-{rows}x{max_new_tokens}-{seed}.json")
    if not path.exists():
        chunk = sample(base, seed, rows) if prompts is None else answer(base, seed, prompts, max_new_tokens)
        write_whole(path, json.dumps(chunk))
    chunk = Chunk(*json.loads(path.read_text()))
    if prompts is not None and chunk.contexts != prompts:
        raise ValueError(f"--work={folder}: its texts were sampled after other prompts; give another folder")
    return chunk


def length_nats(seen: list[int], lengths: list[int], longest: int) -> np.ndarray:
    """-log p(length) of each length, nats, under a smoothed histogram of the lengths that were `seen`.

    A bidirectional canvas is told how long its text is; with a length drawn from this histogram first, it is a model of whole texts.
    """
    at = np.arange(1, longest + 1)
    kernel = np.exp(-0.5 * ((at[:, None] - np.array(seen)[None]) / 10) ** 2)
    kernel /= kernel.sum(0)
    probability = 0.99 * kernel.mean(1) + 0.01 / longest
    return -np.log(probability[np.array(lengths) - 1])
