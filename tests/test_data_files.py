"""The files that were named are those that are read, and a row that cannot be learned from is named by file and number."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_fixtures import tiny_tokenizer

from adapt.training.checkpoints.seal import data_files
from adapt.training.data import rows as rows_module
from adapt.training.data.examples import load_examples, load_rows
from adapt.training.data.files import check_unchanged, for_datasets, stamps
from adapt.training.data.held_out import load_split
from adapt.training.sections import DataConfig

GOOD = b'{"text": "cat"}\n'


def config(train: str | list[str], **options: Any) -> DataConfig:
    return DataConfig(train=train, seq_len=32, **options)


def test_a_byte_that_changes_anywhere_in_large_data_is_seen(tmp_path: Path) -> None:
    """9 MB, changed where 64 samples would not look; the base's weights alone are sampled."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"a" * 9_000_000)
    before, read_as = data_files(str(path)), for_datasets([str(path)])
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(b"b")
    assert data_files(str(path)) != before
    assert for_datasets([str(path)]) != read_as


# -- names

NAMES = [
    "a[1].jsonl", "x*.jsonl", "q?.jsonl", "[!a].jsonl", "**.jsonl", "[[].jsonl", "]x[.jsonl", "{a,b}.jsonl", "~t.jsonl",
    "a:b.jsonl", "zip:x.jsonl", "%41.jsonl", "#h.jsonl", "@y.jsonl", "-dash.jsonl", "back\\slash.jsonl", "sp ace.jsonl",
    "ü.jsonl", "n\nl.jsonl", "train-test.jsonl", "*.json", "a[1].txt", "sp ace.jsonl.gz", "$none_such.jsonl", "'q'.jsonl",
]  # fmt: skip
DECOYS = ["a1.jsonl", "xy.jsonl", "qq.jsonl", "b.jsonl", "a.jsonl", "a1.txt", "z.json"]


@pytest.mark.parametrize("where", ["data.train", "data.eval"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_pattern(tmp_path: Path, name: str, where: str) -> None:
    for decoy in [*DECOYS, name]:
        content = (decoy if decoy.endswith(".txt") else json.dumps({"text": decoy})).encode()
        (tmp_path / decoy).write_bytes(gzip.compress(content) if decoy.endswith(".gz") else content)
    path = str(tmp_path / name)
    if where == "data.train":
        found = load_rows(config(path))
    else:
        (tmp_path / "train.jsonl").write_bytes(GOOD)
        found = load_split(config(str(tmp_path / "train.jsonl"), eval=path)).held_out
        assert found is not None
    assert list(found["text"]) == [name]


@pytest.mark.parametrize("pattern", ["*.jsonl", "a[12].jsonl", "?.jsonl", "**/*.jsonl"])
def test_a_pattern_is_no_name_and_that_is_said(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a1.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"no such file.*a pattern is not looked up"):
        load_rows(config(str(tmp_path / pattern)))


@pytest.mark.parametrize(
    "name", ["$HOME.jsonl", "${HOME}.jsonl", "a::b.jsonl", "file:a::b.jsonl", "a[1].jsonl.gz", "x*.json.gz"]
)
def test_a_name_that_is_another_place_to_datasets_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(ValueError, match="rename "):
        load_rows(config(str(tmp_path / name)))


@pytest.mark.parametrize(
    "name", ["http://x/a.jsonl", "s3://b/a.jsonl", "zip://a.jsonl::b.zip", "a\0.jsonl", "x" * 300 + ".jsonl"]
)
def test_what_is_no_file_here_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.train="):
        load_rows(config(name))


def test_other_bytes_with_the_old_date_are_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ("cat", "dog"):
        path.write_text(json.dumps({"text": text}))
        os.utime(path, (1e9, 1e9))
        assert list(load_rows(config(str(path)))["text"]) == [text]


DATES = ["2024-01-01", "2024-01-01 10:00:00", "2024-01-01T10:00:00Z"]


@pytest.mark.parametrize("date", DATES)
def test_text_that_looks_like_a_date_is_text(tmp_path: Path, date: str) -> None:
    """Also in a second file, where the first has other text, and in messages."""
    messages = [{"role": "user", "content": date}, {"role": "assistant", "content": date}]
    rows = {
        "dates": {"prompt": "When?", "completion": date},
        "words": {"prompt": "When?", "completion": "cat"},
        "chat": {"messages": messages},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    words, dates = str(tmp_path / "words.jsonl"), str(tmp_path / "dates.jsonl")
    assert list(load_rows(config(dates))["completion"]) == [date]
    assert list(load_rows(config([words, dates]))["completion"]) == ["cat", date]
    assert list(load_rows(config([dates, words]))["completion"]) == [date, "cat"]
    assert list(load_rows(config(str(tmp_path / "chat.jsonl")))["messages"]) == [messages]


def test_a_file_that_is_written_to_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    given = config(str(path))
    before = stamps(given)
    check_unchanged(given, before)
    path.write_bytes(GOOD * 2)
    with pytest.raises(ValueError, match="was changed while it was read"):
        check_unchanged(given, before)


# -- rows: {name: (content, what the one line says)}

FILES: dict[str, tuple[bytes, str]] = {
    "number": (GOOD + b"42\n", "row 2 is no JSON object"),
    "string": (GOOD + b'"cat"\n', "row 2 is no JSON object"),
    "null": (GOOD + b"null\n", "row 2 is no JSON object"),
    "true": (b"true\n", "row 1 is no JSON object"),
    "list": (GOOD + b"[1, 2]\n", "row 2 is no JSON object"),
    "list first": (b"[1, 2]\n", "row 1 is no JSON object"),
    "NaN": (b"NaN\n", "row 1 is no JSON object"),
    "after blank lines": (b"\n\n" + GOOD + b"\n\n7\n", "row 2 is no JSON object"),
    "cut short": (GOOD + b'{"text": "do', "row 2 is not valid JSON"),
    "no value": (GOOD + b'{"text": }\n', "row 2 is not valid JSON"),
    "single quotes": (b"{'text': 'cat'}\n", "row 1 is not valid JSON"),
    "a key twice": (GOOD + b'{"text": "a", "text": "b"}\n', "row 2 is not valid JSON .'text' is there twice"),
    "half a pair": (GOOD + b'{"text": "\\ud800"}\n', "row 2 has half of a surrogate pair"),
    "other half": (GOOD + b'{"text": "\\udfff x"}\n', "row 2 has half of a surrogate pair"),
    "raw half": (GOOD + b'{"text": "\xed\xa0\x80"}\n', "row 2 is not UTF-8"),
    "Latin-1": (GOOD + b'{"text": "caf\xe9"}\n', "row 2 is not UTF-8"),
    "UTF-16": ('{"text": "cat"}\n'.encode("utf-16"), "row 1 is not UTF-8"),
    "UTF-16 without mark": ('{"text": "cat"}\n'.encode("utf-16-le"), "row 2 is no JSON object"),
    "raw null byte": (GOOD + b'{"text": "a\0b"}\n', "row 2 is not valid JSON"),
    "null byte": (GOOD + b'{"text": "a\\u0000b"}\n', "row 2: column text has a null byte at character 2"),
    "10 MB": (GOOD + b'{"text": "' + b"a" * 10_000_000 + b'"}\n', "row 2 has more than 8 MB"),
    "nested 3,000 deep": (GOOD + b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", "row 2 is nested deeper than 64"),
    "nested 20,000 deep": (GOOD + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"\n", "row 2 is nested deeper than 64"),
    "nested first": (b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n", "row 1 is nested deeper than 64"),
    "nested open": (GOOD + b'{"text": ' + b"[" * 100_000 + b"\n", "row 2 is nested deeper than 64"),
    "number as text": (GOOD + b'{"text": 3}\n', "row 2: column text holds 3, needs strings"),
    "list as text": (GOOD + b'{"text": ["cat"]}\n', "row 2: column text holds"),
    "object as text": (GOOD + b'{"text": {"a": 1}}\n', "row 2: column text holds"),
    "null as text": (GOOD + b'{"text": null}\n', "row 2: column text holds None"),
    "missing": (GOOD + b'{"other": "x"}\n', "row 2: column text holds None"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\n\t\n", "is empty"),
    "no columns": (b'{"other": "a"}\n', "needs text, or prompt"),
    "empty completion": (b'{"prompt": "a", "completion": "cat"}\n{"prompt": "a", "completion": ""}\n', "row 2: the prompt 'a' has an"),
    "messages of text": (b'{"messages": "cat"}\n', "row 1: column messages holds"),
    "messages of numbers": (b'{"messages": [1]}\n', "row 1: column messages holds"),
    "no role": (b'{"messages": [{"content": "cat"}]}\n', "row 1: column messages holds"),
    "ids of text": (b'{"context": ["a"], "target": ["b"]}\n', "row 1: has the target"),
    "ids that are true": (b'{"context": [], "target": [true, false]}\n', "row 1: has the target"),
    "ids that are none": (b'{"context": [1], "target": [-1, 99999]}\n', "row 1: has the target"),
    "ids of 30 digits": (b'{"context": [1], "target": [' + b"9" * 30 + b"]}\n", "data.train="),
    "ids without a list": (b'{"context": 1, "target": 2}\n', "row 1: has the target"),
    "no target": (b'{"context": [1], "target": []}\n', "row 1: has the target"),
}  # fmt: skip


def learn(path: Path, **options: Any) -> int:
    given = config(str(path), **options)
    return len(load_examples(given, tiny_tokenizer(), rows=load_rows(given)))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_a_row_that_cannot_be_learned_from_is_named(tmp_path: Path, name: str, compressed: bool) -> None:
    content, message = FILES[name]
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    with pytest.raises(ValueError, match=message) as refused:
        learn(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value).strip()
    assert len(str(refused.value)) < 600


DOCUMENTS: dict[str, tuple[str, bytes, str]] = {
    "list of numbers": ("a.json", b"[1, 2]", "row 1 is no JSON object"),
    "a number among objects": ("a.json", b'[{"text": "a"}, 3]', "row 2 is no JSON object"),
    "nested": ("a.json", b"[" * 5000 + b"]" * 5000, "is nested deeper than 64"),
    "cut short": ("a.json", b'[{"text": "a"},', "is not valid JSON"),
    "no UTF-8": ("a.json", b'[{"text": "caf\xe9"}]', "is not UTF-8"),
    "text of Latin-1": ("a.txt", b"a cat\nsat\ncaf\xe9\n", "line 3 is not UTF-8"),
    "text with a null byte": ("a.txt", b"a\0b", "row 1: column text has a null byte"),
    "no gz": ("a.jsonl.gz", GOOD, "cannot be read"),
    "half a gz": ("a.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "cannot be read"),
    "a gz with a wrong sum": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "cannot be read"),
    "a gz without its name": ("a.jsonl", gzip.compress(GOOD), "row 1 is not UTF-8"),
    "no parquet": ("a.parquet", b"PAR1xxxxPAR1", "cannot be read as parquet"),
    "an empty parquet": ("a.parquet", b"", "is empty"),
    "an ending of nobody": ("a.csv", b"text\n", "files of one kind only"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = DOCUMENTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        learn(tmp_path / name)
    assert "\n" not in str(refused.value).strip()


PLACES: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a pipe": lambda path: os.mkfifo(path),
    "no such file": lambda path: path.symlink_to(path.parent / "nowhere"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt", ".parquet"])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    PLACES[kind](tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=kind):
        learn(tmp_path / f"a{suffix}")


def test_the_row_is_that_of_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 300)
    (tmp_path / "b.jsonl").write_bytes(GOOD * 299 + b'{"text": null}\n')
    given = config([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    with pytest.raises(ValueError, match=rf"data.train={tmp_path}/b.jsonl: row 300: column text holds None"):
        load_examples(given, tiny_tokenizer(), rows=load_rows(given))


def test_the_row_of_a_share_is_its_place_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 39 + b'{"text": null}\n')
    given = config(str(tmp_path / "a.jsonl"), eval=0.5)
    split = load_split(given)
    assert split.held_out is not None
    rows = next(rows for rows in split if None in rows["text"])
    with pytest.raises(ValueError, match="row 40: column text holds None"):
        load_examples(given, tiny_tokenizer(), rows=rows)


def test_rows_of_8_mb_and_nesting_inside_of_a_string_are_taken(tmp_path: Path) -> None:
    inside = json.dumps({"text": "[" * 5000 + '"' + "{" * 5000}).encode()
    (tmp_path / "a.jsonl").write_bytes(inside + b"\n" + b"\xef\xbb\xbf".join([b"", GOOD])[3:])
    assert learn(tmp_path / "a.jsonl") > 0
    long = b'{"text": "' + b"cat " * 500_000 + b'"}\n'
    rows_module.check_json(str((tmp_path / "b.jsonl", (tmp_path / "b.jsonl").write_bytes(long))[0]))


# -- anything

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["text", "prompt", "completion", "messages", "context", "target", "role", "content", "other"])
MESSAGES = st.fixed_dictionaries({"messages": st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3)})
ROWS = st.dictionaries(KEYS, VALUES, max_size=3) | MESSAGES | VALUES


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=30), min_size=1, max_size=4))
def test_any_rows_are_examples_or_one_line(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        assert learn(path, too_long="drop") > 0
    except ValueError as refused:
        line = str(refused)
        assert line.startswith("data."), line
        assert "\n" not in line.strip()
