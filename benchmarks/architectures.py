"""Which architectures can be adapted: converts a tiny random model of every causal LM of the installed transformers.

    python benchmarks/architectures.py --out docs/architectures.md
    python benchmarks/architectures.py --only llama4_text,bloom

Each ends as converted, refused with the reason, or not tried with the reason. A conversion counts only if experiments that share
nothing with the converter's own probe agree with it (`architecture_checks.py`).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from architecture_checks import ATTENTIONS, check, kinds_of
from architecture_sizes import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import adapt
from adapt.conversion import _check_base

LARGEST = 20_000_000
"""Parameters above which a config did not shrink and no model of it is made."""


class Outcome(NamedTuple):
    model_type: str
    name: str
    outcome: str
    """converted, refused, not tried; or WRONG, where the experiments disprove a conversion that passed"""
    reason: str
    kinds: str = ""
    kernels: str = ""


def try_all(model_types: Iterable[str]) -> Iterator[Outcome]:
    """One Outcome per architecture."""
    with tempfile.TemporaryDirectory() as scratch:
        for model_type in model_types:
            yield try_one(model_type, Path(scratch) / model_type)
            shutil.rmtree(Path(scratch) / model_type, ignore_errors=True)


def try_one(model_type: str, scratch: Path) -> Outcome:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        config = tiny_config(model_type)
        obstacle = None
    except Exception as error:  # each config class has its own way to say no
        config, obstacle = _plain_config(model_type), error
    try:
        if config is not None:
            _check_base(config, model_type)
    except ValueError as error:
        return Outcome(model_type, name, "refused", _reason(error, model_type))
    if config is not None and obstacle is None:
        try:
            model = tiny_model(config)
        except Exception as error:  # and each model class
            obstacle = error
    if obstacle is not None:
        return Outcome(model_type, name, "not tried", f"no tiny config: {_one_line(obstacle)}")
    return convert_and_check(model_type, name, model, scratch)


def _plain_config(model_type: str) -> PretrainedConfig | None:
    try:
        return transformers.CONFIG_MAPPING[model_type]()
    except Exception:  # the obstacle to the tiny one is what is told
        return None


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random model that runs. Raises whatever it does where it does not."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones and biases of zeros hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model(input_ids=torch.arange(1, 17)[None], use_cache=False)
    return model


def convert_and_check(model_type: str, name: str, model: PreTrainedModel, scratch: Path) -> Outcome:
    base = scratch / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    kinds = ", ".join(dict.fromkeys(kinds_of(model)))
    kernels = ""
    for attention in ATTENTIONS:
        options = {"block_size": 4} if attention == "block" else {}
        try:
            out = adapt.convert(base, scratch / attention, attention=attention, verify=False, **options)
            lm = adapt.load(out, device="cpu")
        except ValueError as error:
            return Outcome(model_type, name, "refused", _reason(error, model_type), kinds)
        except Exception as error:  # a crash is no refusal
            return Outcome(model_type, name, "WRONG", f"{attention}: {type(error).__name__} {_one_line(error)}", kinds)
        try:
            kernels = check(model, lm)
        except (AssertionError, RuntimeError) as error:
            return Outcome(model_type, name, "WRONG", f"{attention}: {_one_line(error)}", kinds)
    return Outcome(model_type, name, "converted", "", kinds, kernels)


def _reason(error: ValueError, model_type: str) -> str:
    return _one_line(error).removeprefix(f"base={model_type}: ")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{error}".split())[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--only", help="model types, comma-separated; default: every one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_types = arguments.only.split(",") if arguments.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    outcomes = []
    for outcome in try_all(model_types):
        outcomes.append(outcome)
        print(*outcome, sep=" | ", flush=True)
    print(Counter(outcome.outcome for outcome in outcomes))


if __name__ == "__main__":
    main()
