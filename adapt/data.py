"""Rows of text, prompt/completion or chat messages -> tokenised examples: a context that stays clean, and a target.

An example is {"context": ids, "target": ids}. The context (a prompt, or just the start-of-text token) is never noised; the
target is what the model learns to write, and ends in end-of-text.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import PreTrainedTokenizerBase

from .config import DataConfig

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
COLUMNS = (("text",), ("prompt", "completion"), ("messages",))


def load_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, is_main_process: bool = True) -> Dataset:
    """The tokenised examples of `config.train` as a Dataset of "context" and "target" id lists.

    Raises ValueError for missing files, unknown columns, empty data, a mask token inside the data, and examples longer than
    data.seq_len (unless data.too_long is drop; plain text is cut into pieces of seq_len instead).
    """
    if not is_main_process:
        disable_progress_bars()
    rows = _load_rows(config)
    rows = rows.rename_columns({theirs: ours for ours, theirs in config.columns.items() if ours != theirs})
    kind = next((columns for columns in COLUMNS if set(columns) <= set(rows.column_names)), None)
    if kind is None:
        raise ValueError(
            f"data.train={config.train}: has the columns {', '.join(sorted(rows.column_names))}; needs text, or prompt and "
            "completion, or messages; name them in data.columns, such as {prompt: question, completion: answer}"
        )
    to_examples = {"text": _from_text, "prompt": _from_prompt, "messages": _from_messages}[kind[0]]
    examples = rows.map(
        to_examples,
        batched=True,
        batch_size=256,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "seq_len": config.seq_len},
        num_proc=config.num_workers if config.num_workers > 1 else None,
        desc="tokenise",
    )
    examples = _fit(examples, config)
    if len(examples) == 0:
        raise ValueError(f"data.train={config.train}: no examples in it, nothing to train on")
    return examples


def _load_rows(config: DataConfig) -> Dataset:
    files = [config.train] if isinstance(config.train, str) else list(config.train)
    suffixes = {_suffix(file) for file in files}
    local = suffixes & set(_LOADERS) or any(Path(file).exists() for file in files)
    if not local:
        if len(files) != 1:
            raise ValueError(f"data.train={config.train}: several Hub datasets; give one, or files")
        try:
            return load_dataset(files[0], split=config.split)
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise ValueError(f"data.train={files[0]}: neither a file nor a dataset that the Hub gives us: {error}") from error
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ValueError(f"data.train={', '.join(missing)}: no such file")
    if len(suffixes) > 1 or not suffixes <= set(_LOADERS):
        raise ValueError(f"data.train={config.train}: files of one kind only, out of {', '.join(sorted(_LOADERS))} (also .gz)")
    if all(Path(file).stat().st_size == 0 for file in files):
        raise ValueError(f"data.train={config.train}: is empty")
    loader = _LOADERS[suffixes.pop()]
    options = {"sample_by": "document"} if loader == "text" else {}
    try:
        return load_dataset(loader, data_files=files, split="train", **options)
    except Exception as error:  # datasets wraps whatever its readers raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data.train={config.train}: cannot be read as {loader}: {reason[:200]}") from error


def _suffix(file: str) -> str:
    suffixes = Path(file).suffixes
    return (suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])).lower()


def _from_text(batch: dict, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> dict:
    """Documents, cut into pieces that fit a row."""
    start = _start_tokens(tokenizer)
    contexts, targets = [], []
    for text in _checked(batch["text"], "text"):
        ids = _tokens(tokenizer, text) + [tokenizer.eos_token_id]
        room = seq_len - len(start)
        for i in range(0, len(ids), room):
            contexts.append(start)
            targets.append(ids[i : i + room])
    return {"context": contexts, "target": targets}


def _from_prompt(batch: dict, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> dict:
    start = _start_tokens(tokenizer)
    for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True):
        if completion == "":
            raise ValueError(
                f"data.train: the prompt {prompt[:60]!r} has an empty completion, nothing to noise; remove such rows"
            )
    return {
        "context": [start + _tokens(tokenizer, prompt) for prompt in _checked(batch["prompt"], "prompt")],
        "target": [_tokens(tokenizer, done) + [tokenizer.eos_token_id] for done in _checked(batch["completion"], "completion")],
    }


def _from_messages(batch: dict, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> dict:
    """One example for each assistant turn, with everything before it as the context."""
    if tokenizer.chat_template is None:
        raise ValueError("data.train: has chat messages, but the tokenizer has no chat template; use prompt and completion")
    contexts, targets = [], []
    for messages in batch["messages"]:
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
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


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by itself ([bos] or nothing)."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in ids:
        raise ValueError(
            f"data.train: a text contains the mask token {tokenizer.mask_token} ({text[:60]!r}...); remove it from the data, "
            "or convert with another --mask_token"
        )
    return ids


def _checked(values: list, column: str) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"data.train: column {column} holds {type(value).__name__}, needs strings")
    return values


def _fit(examples: Dataset, config: DataConfig) -> Dataset:
    lengths = [len(c) + len(t) for c, t in zip(examples["context"], examples["target"], strict=True)]
    too_long = [i for i, length in enumerate(lengths) if length > config.seq_len]
    if too_long and config.too_long == "error":
        longest = max(lengths)
        raise ValueError(
            f"data.seq_len={config.seq_len}: {len(too_long)} of {len(lengths)} examples are longer, the longest {longest} tokens; "
            f"set data.seq_len={longest} or data.too_long=drop"
        )
    keep = [i for i, length in enumerate(lengths) if length <= config.seq_len]
    return examples.select(keep) if too_long else examples
