"""Which architectures can be adapted: converts a tiny random model of every causal LM of the installed transformers.

    python benchmarks/architectures.py --out docs/architectures.md
    python benchmarks/architectures.py --only llama4_text,bloom

Each ends as converted, refused with the reason, or not tried with the reason. A conversion counts only if experiments that share
nothing with the converter's own probe agree with it (`architecture_checks.py`).
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from architecture_checks import ATTENTIONS, check, kinds_of
from architecture_sizes import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import adapt
from adapt.conversion.base_model import check_architecture
from adapt.model.kernels import _not_in_transformers, default_kernel

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
REASONS = {
    "is an encoder-decoder": "encoder-decoder",
    "is multimodal": "vision or audio inputs: its language model has to be saved apart",
    "for which a mask does not decide": "recurrent, convolution, compressed or indexed layers",
    "none of its layers is attention": "no attention layers",
    "does not take an explicit attention mask": "takes no 4-D mask",
    "goes by the column": "numbers tokens by column, not by the positions given",
    "under our causal mask it differs": "numbers positions, or masks, in its own way",
    "its logits are not its output embedding": "a head that is more than its output embedding",
    "cannot be shown": "layers that cannot be told apart",
    "a mask token cannot be added": "a vocabulary that is not one row per token",
    "does not see, but should": "layers with a causal mask of their own",
    "sees, but should not": "layers that see past the mask",
}
HELD = """
What is held true of each that is converted, for bidirectional, prefix and block attention, in float64 where the model knows it: a
token moves the logits of those that should see it and of no others (other document, padding, later block, outside the window or
chunk); a plain call with masks written by hand gives our logits; packed equals separate; the kernels named agree; and under the
causal mask the logits are the original's.
"""
ALIBI = """
ALiBi (Bloom, MPT, Falcon with `alibi: true`): transformers adds `slope * column of the key`, the same for every query. That is a
distance as long as keys lie in the past, because a softmax does not see a constant; for a key in the future it is a bonus that grows
with its distance, where ALiBi means a penalty. Bloom and Falcon make the columns from the two-dimensional mask and fail on any other;
MPT takes one, and numbers columns whatever positions say, so that the copies of block attention would stand apart from their place.
"""
KERNELS = """
`sdpa_pieces` is ours: SDPA on what is seen only. FlexAttention is not run here; it takes the same rule. "On a GPU" is what a run
takes there if its recipe names no `model.attn_implementation` ({counts}): FlexAttention where transformers says that the model
supports it, else the last of the kernels that agree, which is also what a run on a CPU takes (`sdpa` for `sdpa_pieces` with
`model.torch_compile`). FlexAttention has no dropout: a config.json with attention dropout, as BioGPT's has by default, goes without it.
"""
LARGEST = 20_000_000
"""parameters above which a config did not shrink and no model of it is made."""


class Outcome(NamedTuple):
    model_type: str
    name: str
    outcome: str
    """converted, refused, not tried; or WRONG, where the experiments disprove a conversion that passed"""
    reason: str
    kinds: str = ""
    kernels: str = ""
    on_gpu: str = ""
    """the kernel that a run on a GPU takes where its recipe names none"""


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
            check_architecture(config, model_type)
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
        size = sum(
            parameter.numel()
            for parameter in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters()
        )
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
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
        block_size = 4 if attention == "block" else None
        try:
            out = adapt.convert(base, scratch / attention, attention=attention, block_size=block_size, verify=False)
            lm = adapt.load(out, device="cpu")
        except ValueError as error:
            return Outcome(model_type, name, "refused", _reason(error, model_type), kinds)
        except Exception as error:  # a crash is no refusal
            return Outcome(model_type, name, "WRONG", f"{attention}: {type(error).__name__} {_one_line(error)}", kinds)
        try:
            kernels = check(model, lm)
        except (AssertionError, RuntimeError) as error:
            return Outcome(model_type, name, "WRONG", f"{attention}: {_one_line(error)}", kinds)
    return Outcome(model_type, name, "converted", "", kinds, kernels, kernel_on_gpu(model.config))


def kernel_on_gpu(config: PretrainedConfig) -> str:
    """The default kernel on a GPU for heads of real size: those of a tiny model are too narrow for FlexAttention."""
    return "flex_attention" if _not_in_transformers(config) is None else default_kernel(config, "cuda")


def _reason(error: ValueError, model_type: str) -> str:
    """What the user is told, without who is meant and without what to do instead."""
    said = re.sub(
        r"^base=\w+: |^attention=\w+: the probe failed on ", "", _one_line(error).replace(f"base={model_type}: ", "")
    )
    return said.split("; choose")[0].split("; try another")[0].split("; only decoder")[0].split("; save its")[0]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{error}".split())


def write_table(outcomes: list[Outcome], out: Path) -> None:
    """The Markdown page: counts, then one table each for converted, refused by reason, and not tried."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    by_reason: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.outcome == "refused":
            by_reason[class_of(outcome.reason)].append(outcome)
    refused = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    lines = [
        "# Architectures",
        "",
        f"Every causal language model of transformers ({len(outcomes)} model types), as a tiny random model: converted, probed, and "
        "checked by experiments apart from the probe. Written by",
        "",
        "    python benchmarks/architectures.py --out docs/architectures.md",
        "",
        f"on {date.today()} with {versions}. "
        f"**{counts['converted']} converted, {counts['refused']} refused, {counts['not tried']} not tried.**",
        "",
        *HELD.strip().splitlines(),
        "",
        "| refused because | model types |",
        "|---|--:|",
        *(f"| {reason} | {len(of)} |" for reason, of in refused),
        "",
        "## Converted",
        "",
        "| model type | class | layers | kernels | on a GPU |",
        "|---|---|---|---|---|",
        *(
            f"| {o.model_type} | {o.name} | {o.kinds} | {o.kernels} | {o.on_gpu} |"
            for o in outcomes
            if o.outcome == "converted"
        ),
        "",
        *_on_a_gpu(outcomes).splitlines(),
        "",
        "## Refused",
        "",
        "| model type | class | what is said |",
        "|---|---|---|",
        *(f"| {o.model_type} | {o.name} | {o.reason} |" for _, of in refused for o in of),
        "",
        *ALIBI.strip().splitlines(),
        "",
        "## Not tried",
        "",
        "| model type | class | why |",
        "|---|---|---|",
        *(f"| {o.model_type} | {o.name} | {o.reason} |" for o in outcomes if o.outcome not in ("converted", "refused")),
        "",
    ]
    out.write_text("\n".join(lines))


def _on_a_gpu(outcomes: list[Outcome]) -> str:
    counts = Counter(o.on_gpu for o in outcomes if o.outcome == "converted")
    return KERNELS.strip().format(counts=", ".join(f"{kernel} {count}" for kernel, count in counts.most_common()))


def class_of(reason: str) -> str:
    """The kind of a refusal, for the summary."""
    for sign, kind in REASONS.items():
        if sign in reason:
            return kind
    raise ValueError(f"no kind for the reason: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--only", help="model types, comma-separated; default: every one")
    arguments = parser.parse_args()
    if arguments.out and arguments.only:
        parser.error("--out is written from every architecture; leave --only out")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("adapt.probe.probe").setLevel(logging.ERROR)
    model_types = arguments.only.split(",") if arguments.only else MODEL_TYPES
    outcomes = []
    for outcome in try_all(model_types):
        outcomes.append(outcome)
        print(*outcome, sep=" | ", flush=True)
    print(*(f"{count} {outcome}" for outcome, count in Counter(o.outcome for o in outcomes).most_common()), sep=", ")
    if arguments.out:
        write_table(outcomes, arguments.out)
    if any(outcome.outcome == "WRONG" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
