"""Structured extraction, the quickstart's task: a sentence or two in, a JSON object out. Seeded, no download.

    python -m adapt_recipes.quickstart.extraction data/extraction --train 2000 --test 400 --seed 0

What the model sees, and after `JSON:` what it should write:

    Text: The 9:40 flight to Porto, KL248, now leaves from gate B7, not gate C2.
    Keys: to, time, gate
    JSON: {"to":"Porto","time":"9:40","gate":"B7"}

Every value stands in the text to the letter. The keys are named in the prompt, three or four of the facts in the text;
the other facts, and values that were corrected ("not gate C2"), are there to be left out. Keys and punctuation can be
known before the values, and the values of different keys hardly depend on each other, so several tokens can be
written in one forward.

Train and test share templates but no sentence. A fifth of every pool of values never occurs in training, and a value
in the test split comes from that fifth with probability 1/2: what is measured is copying, not memory.
"""

import argparse
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any, Literal

from adapt.files import marks

from .pools import POOLS, SCHEMAS, Schema, Value

TASK = "extraction_json"
"""Name of the lm-eval task that `write_dataset` puts beside the data."""
MAX_COMPLETION_CHARS = 110
"""No completion is longer: at most 40 tokens of SmolLM2, to which every digit is a token (test_extraction.py)."""
MAX_PROMPT_CHARS = 190

_HELD_OUT_SHARE = 0.5


def examples(split: Literal["train", "test"], *, seed: int, exclude: frozenset[str] = frozenset()) -> Iterator[dict]:
    """Endless {"text", "prompt", "completion"}, no text twice and none of `exclude`; the same for a seed everywhere.

    Only `Random.random` is drawn from: of the generator's methods it alone is promised to stay the same in every
    Python. A longer dataset begins with the shorter one.
    """
    rng = Random(2 * seed + (split == "test"))
    schemas = list(SCHEMAS.values())
    texts = set(exclude)
    while True:
        schema = _pick(rng, schemas)
        text, values = _sentence(rng, schema, held_out_share=_HELD_OUT_SHARE if split == "test" else 0.0)
        keys = _keys(rng, [key for key in schema.fields if key in values])
        prompt = f"Text: {text}\nKeys: {', '.join(keys)}\nJSON:"
        completion = " " + json.dumps({k: values[k] for k in keys}, separators=(",", ":"), ensure_ascii=False)
        if text in texts or len(completion) > MAX_COMPLETION_CHARS or len(prompt) > MAX_PROMPT_CHARS:
            continue
        texts.add(text)
        yield {"text": text, "prompt": prompt, "completion": completion}


def write_dataset(folder: str | Path, *, train: int = 2000, test: int = 400, seed: int = 0) -> Path:
    """Write train.jsonl, test.jsonl ({"prompt", "completion"} a line) and the lm-eval task over them; the folder.

    The test split depends on the seed alone, whatever the size of the training split. Then
    `lm_eval --include_path FOLDER --tasks extraction_json` works from anywhere; after moving the folder, write again.
    """
    for name, count in (("train", train), ("test", test)):
        if count < 1:
            raise ValueError(f"{name}={count}: a split needs at least one example")
    if seed < 0:
        raise ValueError(f"seed={seed}: must be 0 or more")
    folder = Path(folder).resolve()
    marks.adopt(folder)
    marks.check_ours(folder, ("train.jsonl", "test.jsonl", f"{TASK}.yaml"), "folder")
    stream = examples("test", seed=seed)
    held_out = [next(stream) for _ in range(test)]
    stream = examples("train", seed=seed, exclude=frozenset(example["text"] for example in held_out))
    for name, rows in (("train", (next(stream) for _ in range(train))), ("test", held_out)):
        lines = (json.dumps({k: row[k] for k in ("prompt", "completion")}, ensure_ascii=False) for row in rows)
        marks.write(folder, f"{name}.jsonl", "".join(line + "\n" for line in lines))
    marks.write(folder, f"{TASK}.yaml", task_yaml(folder))
    return folder


def task_yaml(folder: str | Path) -> str:
    """Text of the lm-eval task over the data in `folder`, from the template `extraction.yaml`."""
    template = (files(__package__) / "extraction.yaml").read_text(encoding="utf-8")
    for name in ("train", "test"):
        template = template.replace(f"{name.upper()}_JSONL", json.dumps(str(Path(folder).resolve() / f"{name}.jsonl")))
    return template


def _sentence(rng: Random, schema: Schema, held_out_share: float) -> tuple[str, dict[str, Value]]:
    """A sentence and the values in it by key; wrong values (`{_key}`) are in the sentence only."""
    template = re.sub(r"\[([^\]]*)\]", lambda m: _pick(rng, m[1].split("|")), _pick(rng, schema.templates))
    values: dict[str, Value] = {}
    for slot in re.findall(r"\{(\w+)\}", template):
        pool = POOLS[schema.fields[slot.lstrip("_")]]
        while slot not in values:
            value = _pick(rng, pool.held_out if rng.random() < held_out_share else pool.seen)
            rival = values.get(slot.lstrip("_"), values.get(f"_{slot}"))
            if not any(_clash(value, other) for other in values.values()) and _same_style(value, rival):
                values[slot] = value
    text = template.format(**values)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
    return text, {key: value for key, value in values.items() if not key.startswith("_")}


def _clash(value: Value, other: Value) -> bool:
    """Whether one of two values would be found inside the other, as "9:30" is in "9:30 am"."""
    if isinstance(value, str) and isinstance(other, str):
        return value in other or other in value
    return value == other


def _same_style(value: Value, rival: Value | None) -> bool:
    """Whether a right and a wrong value can stand in one sentence: one currency, one way to write a date or a time."""
    style, other = (re.sub(r"[^\W\d]+", "a", re.sub(r"[\d.,:]+", "0", str(v))) for v in (value, rival))
    return rival is None or "0" not in style + other or style == other


def _keys(rng: Random, keys: list[str]) -> list[str]:
    """Four of the keys, or three of them one time in three, in their order."""
    count = 3 if rng.random() < 1 / 3 else 4
    while len(keys) > count:
        dropped = _pick(rng, keys)
        keys = [key for key in keys if key != dropped]
    return keys


def _pick(rng: Random, options: Any) -> Any:
    return options[int(rng.random() * len(options))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the extraction dataset and its lm-eval task.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="training examples (default %(default)s)")
    parser.add_argument("--test", type=int, default=400, help="test examples (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    print(write_dataset(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
