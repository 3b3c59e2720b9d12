"""Held-out likelihood: both arms score the same tokens, the original exactly."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt_eval.measure.likelihood import likelihood_row, nll, texts_of, windows_of

TEXTS = ["the quick brown fox jumps over the lazy dog" * 2, "short", "pack my box with five dozen jugs" * 2]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "held.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in TEXTS)
    return path


def test_texts_come_from_jsonl_and_txt_packed_or_not(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert list(texts_of(corpus)) == TEXTS
    assert list(texts_of(tmp_path / "a.txt")) == ["one\ntwo"]


def test_windows_are_whole_stay_within_a_text_and_stop_at_the_budget(corpus, arms):
    tokenizer = AutoTokenizer.from_pretrained(arms.base)
    windows = windows_of(corpus, tokenizer, seq_len=40, max_tokens=1000)
    assert [tokenizer.decode(w) for w in windows] == [TEXTS[0][:40], TEXTS[0][40:80], TEXTS[2][:40]]
    assert len(windows_of(corpus, tokenizer, seq_len=40, max_tokens=50)) == 2


def test_the_original_is_scored_exactly_and_the_adapted_model_by_its_bound(corpus, arms):
    base, tokenizer = AutoModelForCausalLM.from_pretrained(arms.base).eval(), AutoTokenizer.from_pretrained(arms.base)
    lm = adapt.load(arms.adapted, device="cpu")
    row = likelihood_row(
        corpus, base, lm, tokenizer, seq_len=20, max_tokens=60, num_samples=4, seed=2, progress=False
    )  # fmt: skip
    windows = windows_of(corpus, tokenizer, seq_len=20, max_tokens=60)
    with torch.no_grad():
        losses = [base(torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    assert row["base_nll"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert nll(base, windows) == pytest.approx(19 * sum(losses), rel=1e-5)
    bounds = adapt.nelbo(lm, [w[:1] for w in windows], [w[1:] for w in windows], num_samples=4, seed=2)
    assert row["adapted_nelbo"] == pytest.approx(sum(b.nats for b in bounds) / 57, rel=1e-5)
    assert row["mc_stderr"] == pytest.approx(math.sqrt(sum(b.stderr**2 for b in bounds)) / 57, rel=1e-5)
    assert row["bits_per_byte"]["base"] == pytest.approx(row["base_nll"] / math.log(2))  # one byte, one token
    assert row["unit"] == "nats/token"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("none.txt", None, "no such file"), ("a.csv", "x", "give a .txt or .jsonl"), ("a.jsonl", '{"txt": "x"}', "line 1"),
     ("b.jsonl", "not json", "line 1"), ("c.txt", "too short", "no text of 64 tokens")],
)  # fmt: skip
def test_a_corpus_that_cannot_be_read_is_named(name, content, says, tmp_path, arms):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        windows_of(tmp_path / name, AutoTokenizer.from_pretrained(arms.base), seq_len=64, max_tokens=64)
