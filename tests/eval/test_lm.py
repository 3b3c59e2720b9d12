"""The lm-eval model: what it answers is what the sampler writes and what the network believes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt
from adapt.decoding.settings import SETTINGS
from adapt_eval import answers
from adapt_eval import lm as lm_module
from adapt_eval.lm import AdaptLM
from adapt_eval.lm_eval_command import main
from adapt_eval.model_args import MODEL_ARGS


@pytest.fixture(scope="module")
def loaded(arms):
    return adapt.load(arms.adapted, device="cpu")


@pytest.fixture
def model(loaded):
    return AdaptLM(loaded, batch_size=3, mc_samples=8, progress=False)


def generation(context, **gen_kwargs):
    gen_kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False} | gen_kwargs
    return Instance(request_type="generate_until", doc={}, arguments=(context, gen_kwargs), idx=0)


def scoring(context, continuation, doc_id=0, task="t"):
    one = Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)
    one.task_name, one.doc_id = task, doc_id
    return one


CONTEXTS = ["a:", "a longer one:", "bc:", "hello there, dear:", "z:"]


def test_generation_is_the_samplers_whatever_the_batching(model, loaded):
    texts = model.generate_until([generation(c) for c in CONTEXTS])
    for context, text in zip(CONTEXTS, texts):
        ids = torch.tensor([loaded.tokenizer.encode(context)])
        out = loaded.generate(ids, max_new_tokens=8)
        written = out.sequences[0, ids.shape[1] :].tolist()
        assert text == lm_module.emitted_text(loaded.tokenizer, written, ["\n"], [loaded.tokenizer.eos_token_id])
    alone = AdaptLM(loaded, batch_size=1, progress=False)
    assert alone.generate_until([generation(c) for c in CONTEXTS]) == texts
    assert len(set(texts)) > 1


def test_max_gen_toks_of_the_request_comes_before_the_canvas_of_the_model(loaded, monkeypatch):
    asked = []
    real = adapt.DiffusionLM.generate

    def spy(self, input_ids, **options):
        asked.append((options["max_new_tokens"], options["sampler"]))
        return real(self, input_ids, **options)

    monkeypatch.setattr(adapt.DiffusionLM, "generate", spy)
    model = AdaptLM(loaded, batch_size=4, max_new_tokens=5, threshold=0.7, progress=False)
    model.generate_until([generation("a:", max_gen_toks=3), generation("b:"), generation("c:", max_gen_toks=None)])
    assert sorted(n for n, _ in asked) == [3, 5, 8]
    assert {s.threshold for _, s in asked} == {0.7}


def test_text_is_cut_at_the_stop_and_stopping_early_saves_forwards(loaded):
    saved = 0
    for context in CONTEXTS:
        free, stopped = (AdaptLM(loaded, tokens_per_step=1, progress=False) for _ in range(2))
        (text,) = free.generate_until([generation(context, until=[], max_gen_toks=16)])
        stop = text[1]
        cut = stopped.generate_until([generation(context, until=[stop], max_gen_toks=16)])
        assert cut == [text.split(stop)[0]]
        saved += free.counters["generate_nfe"] - stopped.counters["generate_nfe"]
    assert saved > 0


def test_a_request_samples_by_its_own_temperature_and_seed(loaded):
    def write(**gen_kwargs):
        model = AdaptLM(loaded, batch_size=2, progress=False)
        return model.generate_until([generation(c, **gen_kwargs) for c in ("a:", "b:", "c:")])

    hot = {"do_sample": True, "temperature": 2.0}
    assert write(**hot, seed=1) == write(**hot, seed=1)
    assert write(**hot, seed=1) != write(**hot, seed=2)
    assert write(do_sample=False, temperature=2.0) == write()


def test_repeats_of_a_sampled_request_differ(loaded):
    model = AdaptLM(loaded, batch_size=1, progress=False)
    texts = model.generate_until([generation("a:", do_sample=True, temperature=3.0)] * 3)
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("gen_kwargs", "temperature"),
    [({}, 0.5), ({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0), ({"temperature": 0.3}, 0.3),
     ({"do_sample": False, "temperature": 0.3}, 0.0)],
)  # fmt: skip
def test_temperature_of_the_request_comes_before_that_of_the_model(loaded, gen_kwargs, temperature):
    model = AdaptLM(loaded, temperature=0.5, progress=False)
    assert model.settings_of(gen_kwargs)["sampler"].temperature == temperature


def test_a_likelihood_of_one_token_is_exact(model, loaded):
    (answer,) = model.loglikelihood([scoring("word:", "A")])
    prompt, target = loaded.tokenizer.encode("word:"), loaded.tokenizer.encode("A")[0]
    exact = adapt.nelbo(loaded, [prompt], [[target]], num_samples=1)[0].nats
    ids = torch.tensor([prompt])
    out = loaded.generate(ids, max_new_tokens=1, sampler=adapt.SamplerConfig(tokens_per_step=1))
    assert answer[0] == pytest.approx(-exact, abs=1e-5)
    assert answer[1] == (out.sequences[0, -1].item() == target)


def test_likelihoods_depend_neither_on_order_nor_on_batching(loaded):
    requests = [scoring(c, "ABC"[: 1 + i % 3], doc_id=i) for i, c in enumerate(CONTEXTS)]
    one = AdaptLM(loaded, batch_size=1, mc_samples=8, progress=False).loglikelihood(requests)
    many = AdaptLM(loaded, batch_size=16, mc_samples=8, progress=False).loglikelihood(requests[::-1])[::-1]
    other_seed = AdaptLM(loaded, mc_samples=8, seed=5, progress=False).loglikelihood(requests)
    assert [a for a, _ in one] == pytest.approx([a for a, _ in many], abs=1e-3)
    assert [g for _, g in one] == [g for _, g in many]
    assert [a for a, _ in one] != pytest.approx([a for a, _ in other_seed], abs=1e-3)


def test_is_greedy_is_whether_the_sampler_writes_the_continuation(model, loaded, monkeypatch):
    surest = adapt.SamplerConfig(tokens_per_step=1)
    pairs = []
    for context in CONTEXTS:
        ids = torch.tensor([loaded.tokenizer.encode(context)])
        written = loaded.generate(ids, max_new_tokens=3, sampler=surest).sequences[0, ids.shape[1] :].tolist()
        pairs.append((ids[0].tolist(), written))
    wrong = [(context, [*written[:2], (written[2] + 1) % 200]) for context, written in pairs]
    assert model._is_greedy(pairs, True) == [True] * len(pairs)
    assert model._is_greedy(wrong, True) == [False] * len(pairs)
    assert model._is_greedy([([1], [])], True) == [True]


def test_is_greedy_is_computed_for_single_continuations_only(loaded, monkeypatch):
    asked = []
    monkeypatch.setattr(AdaptLM, "_is_greedy", lambda self, pairs, _: asked.append(len(pairs)) or [True] * len(pairs))
    choices = [scoring("a:", c, doc_id=1, task="choice") for c in "ABC"]
    single = [scoring("a:", "A", doc_id=1, task="lambada"), scoring("a:", "B", doc_id=2, task="lambada")]
    answers = AdaptLM(loaded, mc_samples=2, progress=False).loglikelihood(choices + single)
    assert [g for _, g in answers] == [False] * 3 + [True] * 2
    AdaptLM(loaded, mc_samples=2, greedy="always", progress=False).loglikelihood(choices)
    assert asked == [2, 3]


def test_pairs_are_cut_into_tokens_as_lm_evals_own_model_does(model, arms):
    hf = HFLM(AutoModelForCausalLM.from_pretrained(arms.base), tokenizer=AutoTokenizer.from_pretrained(arms.base))
    for context, continuation in [("word", " tail"), ("word ", "tail"), ("a  ", " b"), ("é", "ü")]:
        assert model._encode_request(context, continuation) == hf._encode_pair(context, continuation)
    eos = model.prefix_token_id
    assert model._encode_request("", "ab") == ([eos], model.tok_encode("ab"))
    assert model._encode_request("", "<|end|>ab") == ([eos], model.tok_encode("ab"))


def test_rolling_windows_score_every_token_once_and_fit_the_model(loaded, monkeypatch):
    scored, widths = Counter(), []

    def count(_lm, contexts, targets, **_):
        widths.extend(len(c) + len(t) for c, t in zip(contexts, targets))
        for target in targets:
            scored.update(target)
        return [SimpleNamespace(nats=float(len(t)), nfe=1) for t in targets]

    monkeypatch.setattr(answers, "nelbo", count)
    text = "".join(chr(97 + i % 26) for i in range(53))
    model = AdaptLM(loaded, max_length=12, progress=False)
    one = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    short = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("xyz",), idx=0)
    assert model.loglikelihood_rolling([one, short]) == [-53.0, -3.0]
    assert scored == Counter(loaded.tokenizer.encode(text) + loaded.tokenizer.encode("xyz"))
    assert max(widths) == 12


def test_too_long_requests_lose_their_beginning_not_their_target(loaded):
    model = AdaptLM(loaded, max_length=8, progress=False)
    context, target = model._fit(list(range(10)), [90, 91, 92])
    assert (context, target) == ([5, 6, 7, 8, 9], [90, 91, 92])
    context, target = model._fit([1], list(range(20)))
    assert len(context) + len(target) == 8
    assert target == list(range(13, 20))


def test_one_sampler_setting_replaces_the_other(loaded):
    fixed = AdaptLM(loaded, tokens_per_step=2).sampler
    assert (fixed.threshold, fixed.tokens_per_step) == (None, 2)
    assert AdaptLM(loaded, sampler=fixed, threshold=0.5).sampler == dataclasses.replace(
        fixed, threshold=0.5, tokens_per_step=None
    )


def test_every_setting_of_the_sampler_is_a_model_arg(arms):
    headline = "threshold=0.95,order=left_to_right,canvas_length=8"  # the quickstart's
    sampler = AdaptLM.create_from_arg_string(f"pretrained={arms.adapted},device=cpu,{headline}").sampler
    assert sampler == adapt.SamplerConfig(threshold=0.95, order="left_to_right", canvas_length=8)
    others = "tokens_per_step=2,temperature=0.5,top_p=0.9"
    sampler = AdaptLM.create_from_arg_string(f"pretrained={arms.adapted},device=cpu,{others}").sampler
    assert sampler == adapt.SamplerConfig(tokens_per_step=2, temperature=0.5, top_p=0.9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"thresold": 0.9}, "model_args: unknown thresold"), ({"batch_size": "auto"}, "batch_size=auto"),
     ({"mc_samples": 0}, "mc_samples=0"), ({"threshold": 2.0}, "threshold=2.0"), ({"greedy": "no"}, "greedy=no")],
)  # fmt: skip
def test_bad_model_args_are_refused_by_name(loaded, arguments, says):
    with pytest.raises(ValueError, match=says):
        AdaptLM(loaded, **arguments)


def test_help_ends_with_every_model_arg_that_a_command_line_can_give(capsys):
    takes = inspect.signature(AdaptLM).parameters.keys() - {"sampler", "settings"} | set(SETTINGS)
    assert MODEL_ARGS.keys() == takes
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    lm_evals, ours = capsys.readouterr().out.split("--model_args of --model adapt")
    assert (left.value.code, "run" in lm_evals) == (0, True)
    assert all(f"  {name} " in ours for name in takes)
    assert "keep this many most confident guesses a round instead" in ours


def test_model_args_come_before_lm_evals_own_options(arms):
    own = {"batch_size": 1, "max_batch_size": 64, "device": "cpu"}
    model = AdaptLM.create_from_arg_obj({"pretrained": str(arms.adapted), "batch_size": 4}, own)
    assert model.batch_size == 4
    assert AdaptLM.create_from_arg_string(f"pretrained={arms.adapted}", own | {"batch_size": 3}).batch_size == 3


def test_a_canvas_without_room_for_a_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="max_gen_toks=9: leaves no room"):
        AdaptLM(loaded, max_length=9, progress=False).generate_until([generation("a:", max_gen_toks=9)])


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_lm_evals_command_line_runs_a_task_with_our_model(arms, capsys):
    sampler = "threshold=0.95,order=left_to_right,canvas_length=8"  # the quickstart's
    arguments = f"pretrained={arms.adapted},mc_samples=2,{sampler},batch_size=2"  # --device is cuda:0 by default
    main(["--model", "adapt", "--model_args", arguments, "--include_path", str(arms.tasks),
          "--tasks", "tiny_shout,tiny_last", "--limit", "3"])  # fmt: skip
    table = capsys.readouterr().out
    assert "adapt ({" in table
    for words in ("tiny_shout", "exact_match", "tiny_last", "perplexity"):
        assert words in table
    assert float(re.search(r"\|perplexity *\|\S+ *\| *([0-9.e+]+) *\|", table)[1]) > 1
