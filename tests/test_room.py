"""Prompts, blanks and lengths are held against the model's positions and this machine's memory before a token is made."""

from __future__ import annotations

import pytest
import torch

from adapt import tokens
from adapt.decoding import room
from adapt.decoding.settings import SamplerConfig


@pytest.mark.parametrize(
    "text, number", [("a [?] b", 1), ("[?4][?]", 5), ("[?128]", 128), ("[?999999999]" * 9, 9 * 999_999_999)]
)
def test_blanks_are_counted_without_being_made(text: str, number: int) -> None:
    assert tokens.num_blanks(text) == number


@pytest.mark.parametrize(
    "text", ["[?0]", "a [?00] b", "[?9999999999]", "[?" + "9" * 5000 + "]", "[?] [?0]", "none", "[?-1]"]
)
def test_a_blank_of_no_token_or_of_too_many_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="infill=") as refused:
        tokens.num_blanks(text)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("number", [127, 129, 600, 20_000, 30_000_000, 999_999_999])
@pytest.mark.parametrize("attention", ["prefix", "bidirectional"])
def test_more_blanks_than_positions_are_refused(diffusion_lm, attention: str, number: int) -> None:
    lm = diffusion_lm("llama", attention)
    with pytest.raises(
        ValueError, match=r"infill=\d+: with the prompt's \d tokens that is more than the 128 positions"
    ):
        lm.fill_one(f"The [?{number}] cat")


@pytest.mark.parametrize("asked", [128, 10**6, 10**12])
def test_of_many_prompts_none_is_written_where_one_does_not_fit(diffusion_lm, asked: int) -> None:
    lm = diffusion_lm("llama", "prefix")
    with pytest.raises(ValueError, match=f"max_new_tokens={asked}: with the prompt's 1 tokens"):
        next(lm.write_batches(["a"], max_new_tokens=asked))
    with pytest.raises(ValueError, match="max_new_tokens=8: with the prompt's"):
        next(lm.write_batches(["a", "the cat " * 100], max_new_tokens=8, batch_size=1))


def test_what_does_not_fit_into_memory_is_refused_and_a_canvas_needs_less(diffusion_lm, monkeypatch) -> None:
    lm = diffusion_lm("llama", "prefix")
    monkeypatch.setattr(room, "free_bytes", lambda device: 100_000)
    with pytest.raises(
        ValueError, match=r"max_new_tokens=100: 2 rows of 101 tokens take 0\.0 GB and more, and cpu has 0\.0 GB"
    ):
        room.check_room(lm, prompt=1, blanks=100, rows=2)
    room.check_room(lm, prompt=1, blanks=100, rows=2, sampler=SamplerConfig(canvas_length=16))


def test_memory_that_the_machine_has_is_known() -> None:
    assert 1 << 20 < room.free_bytes(torch.device("cpu")) <= 1 << 62


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "is broken": "{% for m in messages %}",
    "divides by zero": "{{ 1 / 0 }}",
    "has no such filter": "{{ messages | system }}",
    "reaches for python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reaches for a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "wants a key that is not there": "{{ messages[0].name.first.second }}",
    "ranges too far": "{% for i in range(10**9) %}a{% endfor %}",
    "is endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "adds words to numbers": "{{ 'a' + 1 }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "includes a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_misbehaves_is_one_line(diffusion_lm, name: str, monkeypatch) -> None:
    lm = diffusion_lm("llama", "prefix")
    monkeypatch.setattr(lm.tokenizer, "chat_template", TEMPLATES[name])
    monkeypatch.setattr(tokens, "_RENDERING", 0.2)
    with pytest.raises(ValueError, match="chat: the tokenizer's chat template does not take this chat") as refused:
        lm.write([{"role": "user", "content": "a"}])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
