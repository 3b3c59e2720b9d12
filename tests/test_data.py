"""Files of every kind and shape become contexts and targets; what cannot be learned from is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from training_fixtures import tiny_tokenizer

from adapt.training.data.examples import lengths, load_examples, load_rows
from adapt.training.sections import DataConfig

PAIRS = [{"prompt": "the cat", "completion": "sat on"}, {"prompt": "a", "completion": "dog ran ."}]
CHAT = [
    {"role": "user", "content": "cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "dog"},
    {"role": "assistant", "content": "ran on"},
]
TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def examples(path: Path | str, *, tokenizer=TOKENIZER, views: int = 1, **settings) -> list[tuple[list[int], list[int]]]:
    config = DataConfig(str(path), **settings)
    found = load_examples(config, tokenizer, piece_length=config.seq_len // views)
    return list(zip(found["context"], found["target"]))


def write(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_pairs_of_every_file_kind(tmp_path: Path, name: str) -> None:
    want = [(ids("the cat"), [*ids("sat on"), END]), (ids("a"), [*ids("dog ran ."), END])]
    assert examples(write(tmp_path / name, PAIRS)) == want


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{i}.jsonl", PAIRS[i : i + 1])) for i in (0, 1)]
    assert len(load_examples(DataConfig(files), TOKENIZER)) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    text = "the cat\nsat\n\non"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert examples(path) == [([], [*ids(text), END])]


def test_long_text_is_cut_into_pieces_that_fit_and_loses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "cat dog " * 10}, {"text": "mat"}])
    pieces = examples(path, seq_len=8)
    assert [len(target) for _, target in pieces] == [8, 8, 5, 2]
    assert [token for _, target in pieces for token in target] == [*ids("cat dog " * 10), END, *ids("mat"), END]
    assert max(len(target) for _, target in examples(path, seq_len=8, views=2)) == 4


def test_start_of_text_is_context_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    bos = tiny_tokenizer(bos=True)
    start = bos.bos_token_id
    pairs = examples(write(tmp_path / "a.jsonl", PAIRS[:1]), tokenizer=bos)
    assert pairs == [([start, *ids("the cat")], [*ids("sat on"), END])]
    texts = examples(write(tmp_path / "b.jsonl", [{"text": "cat " * 9}]), tokenizer=bos, seq_len=8)
    assert [len(target) for _, target in texts] == [7, 3]
    assert all(context == [start] for context, _ in texts)


def test_every_assistant_turn_becomes_an_example(tmp_path: Path) -> None:
    found = examples(write(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    before = "<s>user cat </s><s>assistant "
    rendered = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert [target for _, target in found] == [[*ids("sat"), END], [*ids("ran on"), END]]
    assert found[0][0] == ids(before)
    assert [*found[1][0], *found[1][1]] == ids(rendered)


def test_keys_that_only_other_messages_have_are_not_seen_by_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.keys() | list | join(' ') }} {{ m['content'] }}</s>{% endfor %}"
    )
    chat = [{"role": "user", "content": "cat", "name": "x"}, {"role": "assistant", "content": "sat"}]
    (_, target), *_ = examples(write(tmp_path / "a.jsonl", [{"messages": chat}]), tokenizer=tokenizer)
    assert target == [*tokenizer("role content sat</s>", add_special_tokens=False)["input_ids"]]


def test_rows_of_token_ids_are_examples_as_they_are_even_without_an_end(tmp_path: Path) -> None:
    rows = [{"context": [], "target": [5]}, {"context": [4, 5], "target": [6, 7]}]
    assert examples(write(tmp_path / "a.jsonl", rows)) == [([], [5]), ([4, 5], [6, 7])]


def test_columns_are_renamed_as_the_recipe_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "cat", "answer": "sat", "prompt": "an unused column"}])
    assert examples(path, columns={"prompt": "question", "completion": "answer"}) == [(ids("cat"), [*ids("sat"), END])]


def test_too_long_examples_are_dropped_and_said_so(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "cat", "completion": "dog " * 9}])
    assert len(examples(path, seq_len=8, too_long="drop")) == 2
    assert "1 of 3 examples are longer, up to 11 tokens: dropped" in capsys.readouterr().err


def test_blank_texts_are_passed_over(tmp_path: Path) -> None:
    assert len(examples(write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "cat"}, {"text": "  "}]))) == 1


def test_another_version_of_the_tokeniser_code_does_not_read_the_old_cache(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)
    before = load_examples(DataConfig(str(path)), TOKENIZER)
    monkeypatch.setattr("adapt.training.data.examples._TOKENISER_SOURCE", "changed")
    monkeypatch.setattr("adapt.training.data.examples._tokens", lambda tokenizer, text: [3])
    assert load_examples(DataConfig(str(path)), TOKENIZER)["target"] != before["target"]


def test_processes_change_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS * 3)
    assert examples(path, num_workers=2) == examples(path)


def test_lengths_follow_a_selection(tmp_path: Path) -> None:
    found = load_examples(DataConfig(str(write(tmp_path / "a.jsonl", PAIRS))), TOKENIZER)
    assert lengths(found, "target").tolist() == [3, 4]
    assert lengths(found.select([1]), "target").tolist() == [4]


def without_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def without_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def with_strict_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    return tokenizer


def with_forgetful_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}</s>"
    return tokenizer


@pytest.mark.parametrize(
    "rows, settings, tokenizer, message",
    [
        ([{"prompt": "cat", "completion": ""}], {}, tiny_tokenizer, "'cat' has an empty completion, nothing to noise"),
        ([{"prompt": "cat", "completion": None}, PAIRS[0]], {}, tiny_tokenizer, "column completion holds None"),
        ([{"prompt": None, "completion": ""}, PAIRS[0]], {}, tiny_tokenizer, "column prompt holds None"),
        ([{"context": [1], "target": []}], {}, tiny_tokenizer, r"has the target \[\]; .* at least one"),
        ([{"context": [1], "target": [99999]}], {}, tiny_tokenizer, "need lists of token ids from 0 to"),
        ([{"context": [1], "target": "cat"}], {}, tiny_tokenizer, "has the target cat; .* need lists of token ids"),
        ([{"text": 3}], {}, tiny_tokenizer, "column text holds 3, needs strings"),
        ([{"body": "cat"}], {}, tiny_tokenizer, "has the columns body; needs text, or prompt and completion"),
        ([{"text": "cat"}], {"columns": {"text": "body"}}, tiny_tokenizer, "the data has no body; it has text"),
        ([{"text": ""}], {}, tiny_tokenizer, "nothing to noise in it"),
        ([{"messages": CHAT[:1]}], {}, tiny_tokenizer, "nothing to noise in it: no text, completion or assistant turn"),
        ([{"messages": [{"from": "gpt"}]}], {}, tiny_tokenizer, r"column messages holds .* needs lists of \{role"),
        ([{"messages": "cat"}], {}, tiny_tokenizer, r"column messages holds 'cat', needs lists"),
        ([{"messages": CHAT}], {}, without_template, "has no chat template; use prompt and completion"),
        (
            [{"messages": CHAT}],
            {},
            with_strict_template,
            "row 1: column messages: the tokenizer's chat template does not",
        ),
        ([{"messages": CHAT}], {}, with_forgetful_template, "does not keep the start of a conversation"),
        ([{"text": "cat"}], {}, without_end, "no end-of-text token"),
        (PAIRS * 5, {"seq_len": 4}, tiny_tokenizer, "data.seq_len=4"),
        (
            [{"prompt": "cat", "completion": "dog " * 9}],
            {"seq_len": 8},
            tiny_tokenizer,
            "1 of 1 examples .* set data.seq_len=11",
        ),
        (
            [{"prompt": "cat", "completion": "dog " * 9}],
            {"seq_len": 8, "too_long": "drop"},
            tiny_tokenizer,
            "leaves none; set data.seq_len=11",
        ),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(tmp_path, rows, settings, tokenizer, message) -> None:
    with pytest.raises(ValueError, match=message):
        examples(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer(), **settings)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no such file"),
        ({"a.jsonl": ""}, "is empty, nothing to train on"),
        ({"a.json": "[]"}, "is empty, nothing to train on"),
        ({"a.jsonl": '{"text": '}, "a.jsonl: row 1 is not valid JSON"),
        ({"a.parquet": "no parquet"}, "cannot be read as parquet"),
        ({"a.csv": "text\ncat\n"}, "files of one kind only, out of .json, .jsonl, .parquet, .txt"),
        ({"a.jsonl": '{"text": "cat"}', "b.txt": "cat"}, "files of one kind only"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(DataConfig([str(tmp_path / name) for name in files or {"none.jsonl": ""}]))
