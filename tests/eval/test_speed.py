"""Speed: the same count for every arm, arms taking turns, forwards counted honestly."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt.tokens import left_padded
from adapt_eval.lm import AdaptLM
from adapt_eval.measure import speed, writers
from adapt_eval.measure.emitted import emitted_text
from adapt_eval.measure.speed import measure
from adapt_eval.measure.writers import SpeedArm, Written

KEYS = {
    "arm", "sampler", "batch_size", "prompt_tokens", "new_tokens", "tokens_per_s", "latency_p50_s", "latency_p95_s",
    "ttft_s", "nfe", "tpf", "peak_memory_bytes", "runs",
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a fake arm writes: exact on a busy machine."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now.seconds, monotonic=lambda: now.seconds))
    return now


def fake_arm(name, seconds, tokens, nfe, log, clock, prompts=4):
    def write(batch):
        log.append((name, len(batch)))
        clock.seconds += seconds
        return Written([[7] * tokens for _ in batch], nfe, seconds / 2)

    cpu = torch.device("cpu")
    return SpeedArm(name, "s", [[1, 2, 3]] * prompts, write, lambda _tokenizer, row: len(row), cpu)


def test_arms_take_turns_and_the_order_turns_too(clock):
    log = []
    arms = [fake_arm(n, 1, 1, 1, log, clock) for n in "abc"]
    measure(arms, tokenizer=None, batch_sizes=[4], repeats=3, progress=False)
    assert "".join(name for name, _ in log) == "abc" + "abc" + "bca" + "cab"  # the first three warm up


@pytest.mark.parametrize("until, rounds", [(0, (1, 1)), (12, (1, 2)), (20, (2, 3)), (99, (3, 3)), (None, (3, 3))])
def test_rounds_end_in_time_but_each_batch_size_has_one(clock, until, rounds):
    arms = [fake_arm(n, seconds, 1, 1, [], clock, prompts=2) for n, seconds in (("a", 1), ("b", 1))]
    rows = measure(arms, tokenizer=None, batch_sizes=[1, 2], repeats=3, until=until, progress=False)
    assert tuple(row["runs"] for row in rows if row["arm"] == "a") == rounds


def test_rates_come_from_the_clock_and_forwards_from_the_arm(clock):
    arms = [fake_arm("a", 0.02, 10, 4, [], clock), fake_arm("b", 0.04, 10, 10, [], clock)]
    rows = measure(arms, tokenizer=None, batch_sizes=[1, 2], repeats=2, progress=False)
    assert [(r["arm"], r["batch_size"]) for r in rows] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    for row in rows:
        assert set(row) >= KEYS
        assert row["runs"] == len(row["tokens_per_s_runs"]) == 2
    a1, b1, a2, _ = rows
    assert a1["tokens_per_s"] == pytest.approx(10 / 0.02)
    assert b1["tokens_per_s"] == pytest.approx(10 / 0.04)
    assert a2["tokens_per_s"] == pytest.approx(2 * 10 / 0.02)
    assert (a1["tpf"], b1["tpf"], a2["tpf"]) == (2.5, 1.0, 2.5)  # per sequence: a batch is no speed-up of the method
    assert (a1["nfe"], a1["new_tokens"], a1["prompt_tokens"]) == (4, 10, 3)
    assert a1["latency_p50_s"] == pytest.approx(0.02)
    assert a1["ttft_s"] == pytest.approx(0.01)


def test_neither_a_slow_nor_a_fast_round_moves_the_median(clock):
    arm = fake_arm("a", 0.1, 10, 1, [], clock, prompts=1)
    calls = iter([0, 0.1, 5, 0])  # warm-up, then three rounds: 50, 2 and 100 tokens/s

    def write(batch, quick=arm.write):
        clock.seconds += next(calls)
        return quick(batch)

    (row,) = measure([replace(arm, write=write)], tokenizer=None, batch_sizes=[1], repeats=3, progress=False)
    assert row["tokens_per_s"] == pytest.approx(50)
    assert row["latency_p95_s"] > 4
    assert min(row["tokens_per_s_runs"]) == pytest.approx(10 / 5.1)


def test_only_full_batches_count_and_sizes_above_the_prompts_are_left_out(clock):
    log = []
    arm = fake_arm("a", 1, 1, 1, log, clock, prompts=5)
    rows = measure([arm], tokenizer=None, batch_sizes=[2, 6], repeats=1, progress=False)
    assert {r["batch_size"] for r in rows} == {2}
    assert log == [("a", 2)] * 3


@pytest.fixture(scope="module")
def base(arms):
    model = AutoModelForCausalLM.from_pretrained(arms.base).eval()
    return model, AutoTokenizer.from_pretrained(arms.base)


def test_an_autoregressive_arm_is_transformers_generate_with_one_forward_per_token(base):
    model, tokenizer = base
    prompts = [tokenizer.encode(t) for t in ("hello:", "a much longer prompt:")]
    arm = writers.ar_arm("base", model, tokenizer, prompts, until=[], eos_ids=[], max_new_tokens=9)
    written = arm.write(prompts)
    for prompt, row in zip(prompts, written.new_tokens):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert row == alone[0, len(prompt) :].tolist()
    assert written.nfe == 9
    assert written.ttft_s is not None
    assert written.ttft_s > 0
    assert arm.sampler == "greedy"


def test_an_autoregressive_row_ends_at_its_stop_while_the_others_go_on(base):
    model, tokenizer = base
    prompts = [tokenizer.encode(t) for t in ("hello:", "world:")]
    ends = {"eos_ids": [tokenizer.eos_token_id], "max_new_tokens": 9}
    free = writers.ar_arm("base", model, tokenizer, prompts, until=[], **ends).write(prompts)
    first, second = ([tokenizer.decode([t]) for t in row] for row in free.new_tokens)
    letter = next(c for c in first[1:7] if c not in second)
    arm = writers.ar_arm("base", model, tokenizer, prompts, until=[letter], **ends)
    stopped = arm.write(prompts)
    at = first.index(letter)
    assert stopped.new_tokens[0][: at + 1] == free.new_tokens[0][: at + 1]
    assert set(stopped.new_tokens[0][at + 1 :]) == {tokenizer.pad_token_id}
    assert stopped.new_tokens[1] == free.new_tokens[1]
    assert arm.count(tokenizer, stopped.new_tokens[0]) == at


def test_a_diffusion_arm_writes_what_the_model_writes_and_counts_its_forwards(arms):
    lm = adapt.load(arms.adapted, device="cpu")
    prompts = [lm.tokenizer.encode("hello:")]
    sampler = adapt.SamplerConfig(tokens_per_step=2)
    arm = writers.diffusion_arm("adapted", lm, prompts, sampler=sampler, until=[], eos_ids=[], max_new_tokens=8)
    written = arm.write(prompts)
    out = lm.generate(torch.tensor(prompts), max_new_tokens=8, sampler=sampler)
    assert written.new_tokens == [out.sequences[0, len(prompts[0]) :].tolist()]
    assert written.nfe == out.nfe
    assert arm.sampler == "tokens_per_step=2"
    assert written.ttft_s is not None


def test_speed_measures_the_very_text_that_quality_scores(arms, base):
    model, tokenizer = base
    lm = adapt.load(arms.adapted, device="cpu")
    contexts = ["hello:", "a longer one:", "z:"]
    ends = {"until": ["e"], "eos_ids": [tokenizer.eos_token_id], "max_new_tokens": 10}
    request = {"until": ["e"], "max_gen_toks": 10, "do_sample": False}
    instances = [Instance("generate_until", {}, (c, request), i) for i, c in enumerate(contexts)]
    prompts = [tokenizer.encode(c) for c in contexts]
    scored = [HFLM(model, tokenizer=tokenizer, batch_size=3), AdaptLM(lm, batch_size=3, progress=False)]
    timed = [
        writers.ar_arm("base", model, tokenizer, prompts, **ends),
        writers.diffusion_arm("adapted", lm, prompts, sampler=adapt.SamplerConfig(), **ends),
    ]
    for scorer, arm in zip(scored, timed):
        rows = arm.write(prompts).new_tokens
        texts = [emitted_text(tokenizer, row, ends["until"], ends["eos_ids"]) for row in rows]
        assert texts == scorer.generate_until(instances, disable_tqdm=True)
        assert any(texts)


def test_sampler_words_leave_out_what_does_nothing():
    assert writers.sampler_words(adapt.SamplerConfig()) == "threshold=0.9"
    hot = adapt.SamplerConfig(threshold=0.5, temperature=0.7, top_p=0.95)
    assert writers.sampler_words(hot) == "threshold=0.5, temperature=0.7, top_p=0.95"


def test_prompts_are_padded_on_the_left():
    ids, attention_mask = left_padded(SimpleNamespace(pad_token_id=0), [[5], [6, 7, 8]])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
