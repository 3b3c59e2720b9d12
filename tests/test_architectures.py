"""Every causal language model of transformers, in miniature: converted and right, or refused with a reason; never a wrong mask."""

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

from architecture_checks import SPAN, check  # noqa: E402
from architecture_sizes import tiny_config, tiny_tokenizer  # noqa: E402
from architectures import MODEL_TYPES, Outcome, class_of, tiny_model, try_one, write_table  # noqa: E402

import adapt  # noqa: E402
from adapt.model.head import output_head  # noqa: E402
from adapt.model.kernels import default_kernel  # noqa: E402
from adapt.probe.probe import probe  # noqa: E402

# transformers and torch warn of deprecations inside their own models.
pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = BENCHMARKS.parent / "docs" / "architectures.md"
PROMISED = (
    *("llama", "llama4_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "ministral", "gemma2"),
    *("gemma3_text", "gemma4_text", "phi3", "smollm3", "olmo2", "olmo3", "granite", "gpt2", "gpt_neox", "opt", "gptj"),
    *("falcon", "stablelm", "starcoder2", "deepseek_v3", "gpt_oss", "glm4"),
)
WINDOWED = (
    *("gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "ministral", "mistral", "mixtral", "olmo3", "phi3", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
)
EAGER_ONLY = ("gemma2", "gpt_oss", "gptj")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    logging.getLogger("adapt.probe.probe").setLevel(logging.ERROR)  # that a plain load stays causal, for some
    yield
    logging.getLogger("adapt.probe.probe").setLevel(logging.NOTSET)
    transformers.logging.enable_progress_bar()


def _on_the_page(model_type: str) -> str:
    """converted, refused or not tried, as the page in docs/ says."""
    return _line_on_the_page(model_type)[0]


def _line_on_the_page(model_type: str) -> tuple[str, str]:
    """(converted, refused or not tried; the last cell of its line)"""
    section = ""
    for line in PAGE.read_text().splitlines():
        section = line.removeprefix("## ").lower() if line.startswith("## ") else section
        if line.startswith(f"| {model_type} | "):
            return section, line.split(" | ")[-1].removesuffix(" |")
    return "not on the page", ""


def _check_default_kernel(outcome: Outcome) -> None:
    """A run without a kernel in its recipe takes one that was shown to be right, and the page says which."""
    agree = outcome.kernels.split(", ")
    assert default_kernel(tiny_config(outcome.model_type), "cpu") == agree[-1]
    assert default_kernel(tiny_config(outcome.model_type), "cpu", compiled=True) == (
        "sdpa" if "sdpa" in agree else "eager"
    )
    assert outcome.on_gpu in ("flex_attention", agree[-1])
    assert _line_on_the_page(outcome.model_type) == ("converted", outcome.on_gpu)


@pytest.mark.parametrize("model_type", PROMISED)
def test_it_converts_and_in_all_patterns_each_token_moves_exactly_those_that_see_it(model_type, tmp_path):
    outcome = try_one(model_type, tmp_path)
    assert outcome.outcome == "converted", outcome.reason
    assert outcome.kernels.startswith("eager" if model_type in EAGER_ONLY else "eager, sdpa")
    assert ("sliding_attention" in outcome.kinds) == (model_type in WINDOWED)
    assert ("chunked_attention" in outcome.kinds) == (model_type == "llama4_text")
    _check_default_kernel(outcome)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in PROMISED])
def test_it_is_converted_and_right_or_refused_in_one_line_as_the_page_says(model_type, tmp_path):
    outcome = try_one(model_type, tmp_path)
    assert outcome.outcome == _on_the_page(model_type), outcome.reason
    if outcome.outcome == "refused":
        assert class_of(outcome.reason)
        assert "\n" not in outcome.reason
    if outcome.outcome == "converted":
        _check_default_kernel(outcome)


def test_the_page_counts_what_it_lists():
    text = PAGE.read_text()
    said = [int(n) for n in re.findall(r"\*\*(\d+) converted, (\d+) refused, (\d+) not tried", text)[0]]
    listed = [
        sum(_on_the_page(name) == section for name in MODEL_TYPES) for section in ("converted", "refused", "not tried")
    ]
    assert said == listed
    assert sum(said) == len(MODEL_TYPES)


@pytest.mark.parametrize(
    "model_type, changes, said",
    [
        ("bloom", {}, "does not take an explicit attention mask"),
        ("falcon", {"alibi": True}, "does not take an explicit attention mask"),
        ("mpt", {}, "goes by the column in which a token stands"),
        (
            "gpt_neo",
            {},
            r"in layers \[0, 1\] \(GPTNeoBlock\) the token at place 0 does not see, but should, the one at 1",
        ),
        ("roberta", {}, "its layers or its positions are not what its config says"),
        ("longcat_flash", {}, "has no list of its 4 layers"),
    ],
)
def test_what_only_an_experiment_can_refuse_is_refused_with_the_reason(model_type, changes, said):
    config = tiny_config(model_type)
    config.update(changes)
    with pytest.raises(ValueError, match=said):
        probe(tiny_model(config), "bidirectional")


def test_alibi_of_transformers_rewards_later_keys_the_more_the_farther_they_are():
    bias = build_mpt_alibi_tensor(num_heads=4, sequence_length=8)
    assert (bias.diff(dim=-1) > 0).all()  # one row for all queries: no query in the middle sees a penalty on both sides


def test_a_conversion_that_passed_wrongly_would_be_found(tmp_path):
    """The checks do not lean on the probe: a model with a wrong window in one layer fails them."""
    model = tiny_model(tiny_config("gemma3_text"))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    lm = adapt.load(adapt.convert(tmp_path / "base", tmp_path / "out", verify=False), device="cpu")
    assert check(model, lm).startswith("eager, sdpa")
    lm.model.config.sliding_window = SPAN + 1
    with pytest.raises(AssertionError):
        check(model, lm)


@pytest.mark.parametrize("model_type", ["cohere", "gemma2", "granite", "hyperclovax", "llama", "minicpm3", "nanochat"])
@torch.no_grad()
def test_the_scale_and_cap_of_the_head_are_those_of_the_model_whatever_its_config_calls_them(model_type):
    model = tiny_model(tiny_config(model_type))
    tokens = torch.arange(5, 15)[None]
    hidden = model.base_model(tokens).last_hidden_state
    torch.testing.assert_close(output_head(model)(hidden), model(tokens).logits, rtol=1e-5, atol=1e-5)
    raw = model.get_output_embeddings()(hidden)
    assert torch.allclose(raw, model(tokens).logits, rtol=1e-3) == (model_type == "llama")


def test_the_page_is_written_by_reason(tmp_path):
    outcomes = [
        Outcome("llama", "LlamaForCausalLM", "converted", "", "full_attention", "eager, sdpa", "flex_attention"),
        Outcome("gptj", "GPTJForCausalLM", "converted", "", "full_attention", "eager", "eager"),
        Outcome("bart", "BartForCausalLM", "refused", "is an encoder-decoder (bart)"),
        Outcome("odd", "OddForCausalLM", "not tried", "no tiny config: ?"),
    ]
    write_table(outcomes, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "**2 converted, 1 refused, 1 not tried.**" in text
    assert "| llama | LlamaForCausalLM | full_attention | eager, sdpa | flex_attention |" in text
    assert "(flex_attention 1, eager 1)" in text
    assert "| encoder-decoder | 1 |" in text
    with pytest.raises(ValueError, match="no kind for the reason"):
        class_of("because")
