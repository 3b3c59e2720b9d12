"""Rows of text, prompt/completion, chat messages or token ids -> tokenised examples: a context that stays clean, and a target.

An example is {"context": ids, "target": ids}. The context (a prompt, or just the start-of-text token) is never noised; the
target is what the model learns to write, and ends in end-of-text; rows of token ids are such examples already, and end as they do.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow.compute
from datasets import Dataset, disable_progress_bars
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ... import progress, tokens
from ...tokens import chat_text, text_ids
from ..sections import DataConfig
from .files import named_files, read
from .rows import RowError, located, map_rows

COLUMNS = (("text",), ("prompt", "completion"), ("messages",), ("context", "target"))


def load_rows(config: DataConfig) -> Dataset:
    """The rows of `config.train` under our column names; ValueError if they are missing, unreadable, empty or of no kind of ours.

    Needs no tokenizer, so it is done before a model is converted.
    """
    rows = read(config)
    missing = sorted(set(config.columns.values()) - set(rows.column_names))
    if missing:
        raise ValueError(
            f"data.columns={config.columns}: the data has no {', '.join(missing)}; it has {', '.join(sorted(rows.column_names))}"
        )
    renamed = {theirs: ours for ours, theirs in config.columns.items() if ours != theirs}
    rows = rows.remove_columns([ours for ours in renamed.values() if ours in rows.column_names]).rename_columns(renamed)
    if _kind(rows) is None:
        raise ValueError(
            f"data.train={config.train}: has the columns {', '.join(sorted(rows.column_names))}; needs text, or prompt and "
            "completion, or messages, or context and target (token ids); name them in data.columns, such as "
            "{prompt: question, completion: answer}"
        )
    if len(rows) == 0:
        raise ValueError(f"data.train={config.train}: is empty, nothing to train on; give files with rows in them")
    return rows


def load_examples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Dataset | None = None,
    piece_length: int | None = None,
    is_main_process: bool = True,
) -> Dataset:
    """The tokenised examples of `rows` (default: `load_rows(config)`) as a Dataset of "context" and "target" id lists.

    Plain text is cut into pieces of piece_length tokens (default: data.seq_len). A text that quotes the mask token's string is
    text. Raises ValueError for values that are not strings, empty completions, and examples longer than data.seq_len (unless
    data.too_long is drop).
    """
    if not is_main_process:
        disable_progress_bars()
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "model.base: its tokenizer has no end-of-text token, so no target would ever end; add an eos_token to it"
        )
    rows = load_rows(config) if rows is None else rows
    kind = _kind(rows)
    assert kind is not None
    if kind == "text" and config.canvas_start == "anywhere":
        raise ValueError(
            "data.canvas_start=anywhere: plain text is cut into pieces, whose ends a canvas would take for the end of the text; "
            "give prompt and completion, or set it to prompt"
        )
    options = {"tokenizer": tokenizer, "piece": piece_length or config.seq_len}
    tokenise: Callable[..., dict[str, list]] = {
        "text": _from_text,
        "prompt": _from_prompt,
        "messages": _from_messages,
        "context": _from_tokens,
    }[kind]
    tokenise_rows = partial(located, tokenise)
    in_processes = config.num_workers > 1
    with progress.doing("tokenising", total=None if in_processes else len(rows)) as task:

        def counted(batch: dict[str, list], indices: list[int], **how) -> dict[str, list]:
            examples = tokenise_rows(batch, indices, **how)
            task.update(len(batch[kind]))
            return examples

        examples = map_rows(
            rows,
            named_files(config.train),
            tokenise_rows if in_processes else counted,
            batched=True,
            with_indices=True,
            batch_size=256,
            remove_columns=rows.column_names,
            fn_kwargs=options,
            num_proc=config.num_workers if in_processes else None,
            # `datasets` hashes our functions by name alone, and would serve what an older version of this file tokenised.
            new_fingerprint=Hasher.hash([rows._fingerprint, _TOKENISER_SOURCE, kind, options]),
        )
    if len(examples) == 0:
        raise ValueError(
            f"data.train={config.train}: nothing to noise in it: no text, completion or assistant turn; check data.columns"
        )
    needed = lengths(examples, "context") + lengths(examples, "target")
    return drop_too_long(examples, needed, config, is_main_process, what="are longer")


def lengths(examples: Dataset, column: str) -> np.ndarray:
    """Number of tokens in that column of each example, [E]."""
    table = examples.select_columns([column]).with_format("arrow")[:]
    return pyarrow.compute.call_function("list_value_length", [table[column]]).to_numpy()


def _kind(rows: Dataset) -> str | None:
    return next((columns[0] for columns in COLUMNS if set(columns) <= set(rows.column_names)), None)


def _from_text(batch: dict, tokenizer: PreTrainedTokenizerBase, piece: int) -> dict:
    """Documents, cut into pieces of that many tokens."""
    start = _start_tokens(tokenizer)
    room = max(piece - len(start), 1)  # Packing says what is wrong where not one view fits
    contexts, targets = [], []
    for text in _checked(batch["text"], "text"):
        ids = _tokens(tokenizer, text)
        if not ids:
            continue
        ids = [*ids, tokenizer.eos_token_id]
        for i in range(0, len(ids), room):
            contexts.append(start)
            targets.append(ids[i : i + room])
    return {"context": contexts, "target": targets}


def _from_prompt(batch: dict, tokenizer: PreTrainedTokenizerBase, piece: int) -> dict:
    start = _start_tokens(tokenizer)
    contexts = [start + _tokens(tokenizer, prompt) for prompt in _checked(batch["prompt"], "prompt")]
    targets = [_tokens(tokenizer, completion) for completion in _checked(batch["completion"], "completion")]
    for prompt, target in zip(batch["prompt"], targets, strict=True):
        if not target:
            raise RowError(f"the prompt {prompt[:60]!r} has an empty completion, nothing to noise; remove such rows")
    return {"context": contexts, "target": [[*target, tokenizer.eos_token_id] for target in targets]}


def _from_messages(batch: dict, tokenizer: PreTrainedTokenizerBase, piece: int) -> dict:
    """One example for each assistant turn, with everything before it as the context."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "data.train: has chat messages, but the tokenizer has no chat template; use prompt and completion"
        )
    contexts, targets = [], []
    for messages in map(_messages, batch["messages"]):
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _rendered(tokenizer, messages[:i], add_generation_prompt=True)
            whole = _rendered(tokenizer, messages[: i + 1])
            if not whole.startswith(before):
                raise ValueError(
                    "data.train: the chat template does not keep the start of a conversation as it grows, so turns cannot be "
                    "told apart; render the prompts yourself and give prompt and completion"
                )
            target = _tokens(tokenizer, whole[len(before) :])
            end = tokenizer.eos_token_id
            target = target[: len(target) - target[::-1].index(end)] if end in target else [*target, end]
            contexts.append(_tokens(tokenizer, before))
            targets.append(target)
    return {"context": contexts, "target": targets}


def _from_tokens(batch: dict, tokenizer: PreTrainedTokenizerBase, piece: int) -> dict:
    """Examples that are tokenised already, checked: nothing is added."""
    for context, target in zip(batch["context"], batch["target"], strict=True):
        lists = all(isinstance(column, list | None) for column in (context, target))
        ids = [*(context or []), *(target or [])] if lists else []
        if not lists or not target or not all(type(one) is int and 0 <= one < len(tokenizer) for one in ids):
            raise RowError(
                f"has the target {str(target)[:60]}; columns context and target need lists of token ids from 0 to "
                f"{len(tokenizer) - 1}, and a target at least one"
            )
        if tokenizer.mask_token_id in ids:
            raise RowError(
                f"contains the mask token {tokenizer.mask_token} ({tokenizer.mask_token_id}); remove it from the "
                "data, or convert with another mask_token"
            )
    return {"context": [context or [] for context in batch["context"]], "target": batch["target"]}


def _messages(messages: object) -> list[dict]:
    """A checked conversation, without the None that Arrow puts where only other messages have a key."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content") is not None
        for message in messages
    ):
        raise RowError(f"column messages holds {str(messages)[:60]!r}, needs lists of {{role: ..., content: ...}}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: bool) -> str:
    try:
        return chat_text(tokenizer, messages, "column messages", **options)
    except ValueError as error:
        raise RowError(str(error)) from error


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by itself ([bos] or nothing)."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return text_ids(tokenizer, text, add_special_tokens=False, verbose=False)


def _checked(values: list, column: str) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise RowError(f"column {column} holds {value!r:.60}, needs strings; remove or mend such rows")
        if "\0" in value:
            raise RowError(f"column {column} has a null byte at character {value.index(chr(0)) + 1}; remove it")
    return values


def drop_too_long(
    examples: Dataset, needed: np.ndarray, config: DataConfig, is_main_process: bool, *, what: str, todo: str = ""
) -> Dataset:
    """The examples whose needed [E] tokens fit into a row; ValueError where others are there and data.too_long is error.

    what: says in words what they need; todo: what else than a longer row or data.too_long helps.
    """
    fits = needed <= config.seq_len
    if fits.all():
        return examples
    too_long = (
        f"data.seq_len={config.seq_len}: {(~fits).sum()} of {len(needed)} examples {what}, up to {needed.max()} tokens"
    )
    if config.too_long == "error":
        others = f", data.too_long=drop{todo}" if todo else " or data.too_long=drop"
        raise ValueError(f"{too_long}; set data.seq_len={needed.max()}{others}")
    if not fits.any():
        raise ValueError(f"{too_long}, and data.too_long=drop leaves none; set data.seq_len={needed.min()} or more")
    if is_main_process:
        print(f"{too_long}: dropped", file=sys.stderr)
    return examples.select(np.flatnonzero(fits))


_TOKENISER_SOURCE = inspect.getsource(sys.modules[__name__]) + inspect.getsource(tokens)
