"""Decoding is what an uncached loop over one prompt at a time would write, and counts every forward."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny_models import VOCABULARY
from transformers import DynamicCache

from adapt.attention.layout import Layout
from adapt.decoding import rounds
from adapt.decoding.sampler import generate, infill
from adapt.decoding.settings import SamplerConfig, changed
from adapt.lm import DiffusionLM
from adapt.model.forward import hidden_states
from adapt.model.head import output_head

CANVAS = 9
PROMPTS = [[5, 17, 33, 80, 41, 9, 120], [200, 7], [61, 62, 63, 64], [250, 3, 90, 14, 77]]
MODELS = [
    ("llama", "prefix", False),
    ("llama", "prefix", True),
    ("gemma3", "prefix", False),
    ("gemma3", "prefix", True),
    ("llama", "bidirectional", False),
    ("gemma3", "bidirectional", True),
    ("llama", "block/causal", False),
    ("llama", "block/block", True),
    ("gemma3", "block/block", False),
    ("gemma3", "block/causal", True),
    ("gpt2", "prefix", True),  # absolute positions: the others would not notice if padding shifted them
]


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[99] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def _with_end(lm: DiffusionLM, end: int) -> DiffusionLM:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    assert tokenizer.eos_token_id == end
    return dataclasses.replace(lm, tokenizer=tokenizer)


def _with_head(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor) -> None:
    """Every blank has the same logits, whatever the model says."""
    monkeypatch.setattr(rounds, "output_head", lambda _: lambda hidden: logits.expand(len(hidden), -1).clone())


def _block_of(lm: DiffusionLM, num_prompt: int, blank: int) -> tuple[int, int]:
    """(position of the canvas' first token, place in the canvas behind its last) of the block that a blank stands in."""
    size = lm.spec.block_size
    start = (num_prompt + blank) // size * size
    first = max(start, num_prompt) if lm.spec.clean_context == "causal" else start
    return first, start + size - num_prompt


def _block_layout(lm: DiffusionLM, first: int, length: int) -> Layout:
    position = torch.arange(length)
    ends = (position // lm.spec.block_size + 1) * lm.spec.block_size
    before = ends if lm.spec.clean_context == "block" else position + 1
    sees = torch.where(position < first, before, first)
    return Layout(torch.ones_like(position)[None], (position >= first).long()[None], position[None], sees[None])


@torch.no_grad()
def _reference(lm: DiffusionLM, prompt: list[int], config: SamplerConfig) -> tuple[list[int], int]:
    """(canvas, rounds) of one prompt with everything recomputed in each round, written for clarity."""
    end, mask = lm.tokenizer.eos_token_id, lm.spec.mask_token_id
    canvas: list[int | None] = [None] * CANVAS
    rounds = 0
    while None in canvas:
        rounds += 1
        start = canvas.index(None) if config.canvas_length else 0  # what lies before is context
        length = canvas.index(end) + 1 if end in canvas else CANVAS
        length = min(length, start + (config.canvas_length or CANVAS))
        layout = None
        if lm.spec.block_size is not None:
            first, end_of_block = _block_of(lm, len(prompt), canvas.index(None))
            length = min(length, end_of_block)
            layout = _block_layout(lm, first, len(prompt) + length)
        tokens = torch.tensor([prompt + [mask if token is None else token for token in canvas[:length]]])
        layout = layout or Layout.of(lm.spec.attention, torch.ones_like(tokens), len(prompt) + start)
        logits = output_head(lm.model)(hidden_states(lm.model, tokens, layout))[0]
        logits[:, mask] = -math.inf
        confidence, guesses = logits.softmax(-1).max(-1)
        blanks = [i for i in range(length) if canvas[i] is None]
        place = {i: len(prompt) + i - int(lm.spec.shift_logits) for i in blanks}
        left_to_right = config.order == "left_to_right"
        ranked = blanks if left_to_right else sorted(blanks, key=lambda i: -float(confidence[place[i]]))
        for i in blanks:
            sure = config.threshold is not None and confidence[place[i]] >= config.threshold
            if sure or i in ranked[: config.tokens_per_step or 1]:
                canvas[i] = int(guesses[place[i]])
            elif left_to_right:
                break
        if end in canvas:
            canvas[canvas.index(end) :] = [end] * (CANVAS - canvas.index(end))
    return [token for token in canvas if token is not None], rounds


@pytest.mark.parametrize("kind, attention, shift", MODELS)
def test_a_batch_writes_what_an_uncached_loop_writes_for_each_prompt_alone(diffusion_lm, kind, attention, shift):
    lm = diffusion_lm(kind, attention, shift)
    ids, attention_mask = _padded(PROMPTS)
    surest_first, all_at_once = SamplerConfig(tokens_per_step=1), SamplerConfig(threshold=1e-6)
    first = _reference(lm, PROMPTS[0], surest_first)[0]
    # Rows end, and leave the batch, at different rounds.
    endings = [lm, _with_end(lm, first[5]), _with_end(lm, first[0])]
    configs = [
        surest_first,
        all_at_once,
        SamplerConfig(threshold=0.5),
        SamplerConfig(tokens_per_step=4),
        SamplerConfig(threshold=0.3, order="left_to_right"),
        SamplerConfig(tokens_per_step=2, order="left_to_right"),
    ]
    if attention == "prefix":  # the canvas moves along, at another pace in each row
        configs += [SamplerConfig(threshold=0.4, canvas_length=4), SamplerConfig(threshold=0.4, canvas_length=1)]
        configs += [SamplerConfig(tokens_per_step=2, canvas_length=3)]
    for config in configs:
        for ending in endings:
            expected = [_reference(ending, prompt, config) for prompt in PROMPTS]
            out = generate(ending, ids, attention_mask=attention_mask, max_new_tokens=CANVAS, sampler=config)
            assert out.sequences[:, ids.shape[1] :].tolist() == [canvas for canvas, _ in expected]
            assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
            assert out.nfe == max(rounds for _, rounds in expected)
            written = [
                (canvas + [ending.tokenizer.eos_token_id]).index(ending.tokenizer.eos_token_id)
                for canvas, _ in expected
            ]
            assert out.num_tokens.tolist() == written
            forwards = sum(rounds for _, rounds in expected)
            assert out.tpf == pytest.approx(sum(written) / forwards)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
@torch.no_grad()
def test_hidden_states_of_a_canvas_on_a_cached_prompt_are_those_without_a_cache(diffusion_lm, kind):
    lm = diffusion_lm(kind, "prefix")
    ids, real = _padded([[*PROMPTS[0], 1, 2, 3, 4, 5], [*PROMPTS[1], 6, 7, 8, 9, 10]])
    layout, width = Layout.of("prefix", real, 7), ids.shape[1]
    whole = hidden_states(lm.model, ids, layout)[:, 7:]
    prompt = Layout(*(part[:, :7] for part in (layout.document_ids, layout.view_ids, layout.position_ids)))
    cache = DynamicCache()
    hidden_states(lm.model, ids[:, :7], prompt, cache=cache)
    for _ in range(2):  # the second round finds the prompt as the first did
        torch.testing.assert_close(
            hidden_states(lm.model, ids[:, 7:], layout, cache=cache), whole, rtol=1e-5, atol=1e-5
        )
        cache.crop(7 - width)


@pytest.mark.parametrize("attention", ["prefix", "bidirectional"])
def test_nfe_counts_every_forward_and_k_tokens_a_step_take_the_canvas_over_k(diffusion_lm, attention):
    lm = diffusion_lm("llama", attention)
    calls = []
    hook = lm.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        for k in (1, 2, 4, 100):
            calls.clear()
            config = SamplerConfig(tokens_per_step=k)
            out = lm.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=CANVAS, sampler=config)
            assert out.nfe == len(calls) == math.ceil(CANVAS / k)
        calls.clear()
        out = lm.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=CANVAS, sampler=SamplerConfig(threshold=1.0))
        one_by_one = lm.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=CANVAS, sampler=SamplerConfig(tokens_per_step=1)
        )
        assert torch.equal(out.sequences, one_by_one.sequences)
        assert (out.nfe, out.tpf) == (one_by_one.nfe, CANVAS / one_by_one.nfe)
    finally:
        hook.remove()


def test_the_mask_token_is_never_written(diffusion_lm, monkeypatch):
    lm = diffusion_lm("llama", "prefix")
    logits = torch.zeros(VOCABULARY + 1)
    logits[lm.spec.mask_token_id], logits[7] = 50.0, 1.0
    _with_head(monkeypatch, logits)
    for temperature in (0.0, 1.0):
        config = SamplerConfig(threshold=1e-9, temperature=temperature)
        out = lm.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=64, sampler=config)
        assert lm.spec.mask_token_id not in out.sequences
    assert set(out.sequences[0, 7:].tolist()) != {7}


def test_temperature_follows_the_seed_and_top_p_the_distribution(diffusion_lm, monkeypatch):
    lm = diffusion_lm("llama", "prefix")
    probabilities = torch.full((VOCABULARY + 1,), 1e-9)
    probabilities[torch.tensor([11, 12, 13, 14])] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    _with_head(monkeypatch, probabilities.log())

    def draw(seed: int, top_p: float, temperature: float = 1.0) -> list[int]:
        config = SamplerConfig(threshold=1e-12, temperature=temperature, top_p=top_p)
        prompts = torch.tensor([PROMPTS[0]]).expand(8, -1)
        out = lm.generate(prompts, max_new_tokens=100, sampler=config, generator=torch.Generator().manual_seed(seed))
        return out.sequences[:, 7:].flatten().tolist()

    assert draw(1, 1.0) == draw(1, 1.0) != draw(2, 1.0)
    assert set(draw(1, 1.0)) == {11, 12, 13, 14}
    nucleus = draw(1, 0.7)
    assert set(nucleus) == {11, 12}
    assert nucleus.count(11) / 800 == pytest.approx(0.5 / 0.8, abs=4 * 0.48 / 800**0.5)
    assert draw(1, 1.0).count(11) / 800 == pytest.approx(0.5, abs=4 * 0.5 / 800**0.5)
    assert set(draw(1, 0.1)) == set(draw(1, 1.0, temperature=0.01)) == {11}


@pytest.mark.parametrize("attention, shift", [("prefix", True), ("bidirectional", False), ("block/causal", False)])
def test_rounds_only_ever_fill_blanks(diffusion_lm, attention, shift):
    lm = diffusion_lm("llama", attention, shift)
    shown: list[torch.Tensor] = []

    class Recorder:
        ended = 0

        def put(self, value):
            shown.append(value)

        def end(self):
            self.ended += 1

    ids, attention_mask = _padded(PROMPTS)
    recorder = Recorder()
    out = lm.generate(
        ids,
        attention_mask=attention_mask,
        max_new_tokens=CANVAS,
        sampler=SamplerConfig(threshold=0.5),
        streamer=recorder,
        keep_history=True,
    )
    mask = lm.spec.mask_token_id
    assert (out.history[0][:, ids.shape[1] :] == mask).all()
    for before, after in zip(out.history, out.history[1:]):
        blank = before == mask
        assert torch.equal(after[~blank], before[~blank])
        assert ((after == mask).sum(1) < blank.sum(1))[blank.any(1)].all()  # each row that has a blank gets on
    assert torch.equal(out.history[-1], out.sequences)
    assert len(shown) == len(out.history) - 1
    assert all(torch.equal(a, b) for a, b in zip(shown, out.history[1:]))
    assert recorder.ended == 1


def test_a_prompt_that_holds_the_mask_token_is_left_alone(diffusion_lm):
    lm = diffusion_lm("llama", "bidirectional")
    prompt = torch.tensor([[5, lm.spec.mask_token_id, 17]])
    out = lm.generate(prompt, max_new_tokens=4)
    assert torch.equal(out.sequences[:, :3], prompt)
    assert int(out.num_tokens) == 4


def test_stop_sees_the_settled_tokens_from_the_left_and_ends_its_row_only(diffusion_lm):
    lm = diffusion_lm("llama", "prefix")
    prompts = torch.tensor([PROMPTS[2], PROMPTS[0][:4]])
    config = SamplerConfig(tokens_per_step=1)
    free = lm.generate(prompts, max_new_tokens=CANVAS, sampler=config)
    asked: list[list[int]] = []
    wanted = free.sequences[0, 4:].tolist()[:3]
    assert free.sequences[1, 4:7].tolist() != wanted

    def stop(tokens: list[int]) -> bool:
        asked.append(tokens)
        return tokens[:3] == wanted

    out = lm.generate(prompts, max_new_tokens=CANVAS, sampler=config, stop=stop)
    assert lm.spec.mask_token_id not in [token for tokens in asked for token in tokens]
    assert out.sequences[0, 4:7].tolist() == wanted
    settled = next(tokens for tokens in asked if tokens[:3] == wanted)
    assert out.sequences[0, 4:].tolist() == settled + [lm.tokenizer.eos_token_id] * (CANVAS - len(settled))
    assert torch.equal(out.sequences[1], free.sequences[1])
    assert out.num_tokens.tolist() == [len(settled), CANVAS]


@pytest.mark.parametrize("attention", ["prefix", "bidirectional", "block/block", "block/causal"])
@pytest.mark.parametrize("shift", [False, True])
def test_infill_fills_every_blank_and_nothing_else(diffusion_lm, attention, shift):
    lm = diffusion_lm("gemma3", attention, shift)
    mask = lm.spec.mask_token_id
    text = [5, mask, 17, 33, mask, mask, 9, 0, mask, 41]
    short = [61, 62, mask, 64]
    ids, attention_mask = _padded([text, short])
    config = SamplerConfig(tokens_per_step=1)
    out = lm.infill(ids, attention_mask=attention_mask, sampler=config)
    assert mask not in out.sequences
    assert torch.equal(out.sequences[ids != mask], ids[ids != mask])
    assert (out.num_tokens.tolist(), out.nfe, out.tpf) == ([4, 1], 4, 1.0)
    for row, alone in ((0, text), (1, short)):
        one = infill(lm, torch.tensor([alone]), sampler=config)
        assert out.sequences[row, -len(alone) :].tolist() == one.sequences[0].tolist()


@pytest.mark.parametrize("kind, attention, shift", MODELS)
def test_infill_of_blanks_at_the_end_is_generate(diffusion_lm, kind, attention, shift):
    lm = diffusion_lm(kind, attention, shift)
    lm = _with_end(lm, 299)  # that no row writes
    for prompt in PROMPTS:
        text = torch.tensor([prompt + [lm.spec.mask_token_id] * CANVAS])
        written = lm.generate(torch.tensor([prompt]), max_new_tokens=CANVAS).sequences
        assert 299 not in written
        assert torch.equal(lm.infill(text).sequences, written)


def test_a_blank_is_filled_in_sight_of_what_follows_it(diffusion_lm):
    lm = diffusion_lm("llama", "prefix")
    fills = {
        int(lm.infill(torch.tensor([[5, lm.spec.mask_token_id, after, after]])).sequences[0, 1])
        for after in range(20, 40)
    }
    assert len(fills) > 1


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda lm: lm.infill(torch.tensor([[1, 2]])), "a text has no blank; put the mask token (id "),
        (
            lambda lm: lm.infill(torch.tensor([[lm.spec.mask_token_id, 2]])),
            "the first token of a text has no predictor",
        ),
        (
            lambda lm: lm.infill(
                torch.tensor([[9, lm.spec.mask_token_id, 2]]), attention_mask=torch.tensor([[0, 1, 1]])
            ),
            "the first token of a text has no predictor",
        ),
        (lambda lm: lm.generate(torch.tensor([[1, 2]]), max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
        (
            lambda lm: lm.generate(torch.tensor([[1, 2]]), max_new_tokens=127),
            "max_new_tokens=127: with the prompt's 2 tokens",
        ),
        (lambda lm: lm.generate(torch.zeros(1, 0).long(), max_new_tokens=1), "needs [batch, at least one token]"),
        (
            lambda lm: lm.generate(torch.tensor([[1, 2]]), max_new_tokens=1, attention_mask=torch.tensor([[1, 0]])),
            "must be padded on the left",
        ),
        (
            lambda lm: SamplerConfig(threshold=0.9, tokens_per_step=2),
            "sampler.threshold=0.9 and sampler.tokens_per_step=2: are two rules for the same thing; give one",
        ),
        (
            lambda lm: SamplerConfig(threshold="0.9"),  # pyright: ignore[reportArgumentType]
            "sampler.threshold=0.9: must be a number",
        ),
        (lambda lm: SamplerConfig(threshold=1.5), "sampler.threshold=1.5: must be above 0 and at most 1"),
        (lambda lm: SamplerConfig(tokens_per_step=0), "sampler.tokens_per_step=0: must be from 1 to "),
        (lambda lm: SamplerConfig(order="random"), "sampler.order=random: choose one of confidence, left_to_right"),
        (lambda lm: SamplerConfig(canvas_length=0), "sampler.canvas_length=0: must be from 1 to "),
        (
            lambda lm: lm.infill(torch.tensor([[5, 301]]), sampler=SamplerConfig(canvas_length=2)),
            "sampler.canvas_length=2: infilling has the whole text as its canvas",
        ),
        (lambda lm: SamplerConfig(temperature=-1), "sampler.temperature=-1: must be from 0 to "),
        (lambda lm: SamplerConfig(top_p=0), "sampler.top_p=0: must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_written_is_refused(diffusion_lm, call, said):
    with pytest.raises(ValueError) as refusal:
        call(diffusion_lm("llama", "prefix", True))
    assert said in str(refusal.value)


def test_a_model_of_uniform_noise_sees_random_tokens_at_its_blanks_and_never_the_mask(diffusion_lm, monkeypatch):
    lm = diffusion_lm("llama", "prefix")
    lm = dataclasses.replace(lm, spec=dataclasses.replace(lm.spec, noise="uniform"))
    seen: list[torch.Tensor] = []
    plain = rounds.hidden_states

    def recorded(model, tokens, layout, **options):
        seen.append(tokens)
        return plain(model, tokens, layout, **options)

    monkeypatch.setattr(rounds, "hidden_states", recorded)
    ids, attention_mask = _padded(PROMPTS)
    config = SamplerConfig(tokens_per_step=1)
    options = {"attention_mask": attention_mask, "max_new_tokens": CANVAS, "sampler": config}
    out = generate(_with_end(lm, 299), ids, **options)
    assert not any((tokens == lm.spec.mask_token_id).any() for tokens in seen)
    assert (seen[1][:, -4:] != seen[2][:, -4:]).any()  # drawn anew each round
    assert (out.sequences != lm.spec.mask_token_id).all()
    again = generate(_with_end(lm, 299), ids, **options)
    assert torch.equal(again.sequences, out.sequences)


def test_the_rule_that_is_given_replaces_the_other():
    default, fixed = SamplerConfig(), SamplerConfig(tokens_per_step=2)
    assert (default.threshold, default.tokens_per_step) == (0.9, None)
    assert (fixed.threshold, fixed.tokens_per_step) == (None, 2)
    assert changed(default, tokens_per_step=2, threshold=None) == fixed
    assert changed(fixed, threshold=0.9) == default
    assert changed(fixed, top_p=0.5).tokens_per_step == 2
    for sampler in (default, fixed):
        assert SamplerConfig(**dataclasses.asdict(sampler)) == sampler
    with pytest.raises(ValueError, match="are two rules for the same thing"):
        changed(default, threshold=0.5, tokens_per_step=2)
