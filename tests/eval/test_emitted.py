"""One rule for where a text ends and how many tokens it is."""

from __future__ import annotations

import pytest

from adapt_eval.measure.emitted import Stop, count_tokens, emitted_text


@pytest.fixture(scope="module")
def tokenizer(arms):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arms.adapted)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_text_ends_at_the_earliest_stop_string(tokenizer):
    tokens = ids(tokenizer, "one; two\nthree")
    assert emitted_text(tokenizer, tokens, ["\n", ";"]) == "one"
    assert emitted_text(tokenizer, tokens, ["\n"]) == "one; two"
    assert emitted_text(tokenizer, tokens, ["", "zz"]) == "one; two\nthree"


def test_text_ends_at_end_of_text_even_if_a_stop_string_follows(tokenizer):
    eos = tokenizer.eos_token_id
    assert emitted_text(tokenizer, [*ids(tokenizer, "ab"), eos, *ids(tokenizer, "c\nd")], ["\n"], [eos]) == "ab"


def test_a_stop_string_that_is_a_special_token_cuts_and_special_tokens_leave_no_text(tokenizer):
    mask, pad = tokenizer.mask_token_id, tokenizer.pad_token_id
    tokens = [*ids(tokenizer, "a"), mask, *ids(tokenizer, "b"), pad, *ids(tokenizer, "c")]
    assert emitted_text(tokenizer, tokens, [tokenizer.pad_token]) == "ab"


def test_stop_is_seen_only_once_it_is_whole_and_within_the_tail(tokenizer):
    stop = Stop(tokenizer, ["END"], [tokenizer.eos_token_id])
    tokens = ids(tokenizer, "xxxxxxxxxxxxxEND")
    assert not stop(tokens[:-1])
    assert stop(tokens)
    assert stop(tokens[-stop.tail_tokens :])
    assert stop([5, tokenizer.eos_token_id])
    assert not Stop(tokenizer, [""], [])(tokens)


def test_tail_is_long_enough_for_a_stop_string_spelt_byte_by_byte(tokenizer):
    stop = Stop(tokenizer, ["é→ü"])
    tokens = ids(tokenizer, "abcdé→ü")
    assert stop(tokens[-stop.tail_tokens :])


def test_tokens_are_counted_on_the_text_and_never_above_what_was_spent(tokenizer):
    eos, half_character = tokenizer.eos_token_id, ids(tokenizer, "é")[:1]
    assert count_tokens(tokenizer, "abc", ids(tokenizer, "abcdef")) == 3
    assert count_tokens(tokenizer, emitted_text(tokenizer, half_character, []), half_character) == 1
    spent = [*ids(tokenizer, "ab"), eos, eos, eos]
    assert count_tokens(tokenizer, emitted_text(tokenizer, spent, [], [eos]), spent, [eos]) == 2
