"""What `--model adapt` takes as `--model_args`, as its help says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from docstring_parser import parse_from_object

from adapt.decoding.settings import SamplerConfig, changed
from adapt.settings.bounds import Device, Rows, Samples, Seed, Spelled, Tokens, check_value, hints, one_of, shown
from adapt.spec import DTYPE_NAMES

SAMPLER_ARGS = {
    field.arg_name: " ".join((field.description or "").split()) for field in parse_from_object(SamplerConfig).params
}
"""Every setting of the sampler, as its docstring says it."""
MODEL_ARGS = {
    "pretrained": "a diffusion checkpoint; needed",
    "adapter": "a LoRA folder on top of it",
    "dtype": "bfloat16, float16 or float32; default: as saved, or float32 where that is emulated",
    "device": "cpu, cuda or cuda:N; default: a GPU if there is one",
    "attn_implementation": "the attention kernel, by its name in transformers",
    "batch_size": "requests in a forward; default 1",
    "max_length": "tokens of prompt and canvas; default: what the model has positions for",
    "max_new_tokens": "tokens of the canvas where a task names none; default 256",
    **SAMPLER_ARGS,
    "mc_samples": "noised copies that a likelihood is estimated on; default 32",
    "seed": "of the masks and of drawn tokens; default 1234",
    "greedy": "always: compute is_greedy for multiple choice too; default auto",
    "progress": "True or False: draw bars; default True",
    "chat_template_args": "keywords of the chat template; a dict, so write all of --model_args as JSON",
}


class _ModelArgs(TypedDict):
    """What each may be, besides those of the sampler."""

    pretrained: str
    adapter: str | None
    dtype: str | None
    device: Device | None
    attn_implementation: str | None
    batch_size: Rows | Annotated[str, Spelled(r"0*[1-9]\d{0,5}", "a whole number above 0")]  # a text, from lm-eval
    max_length: Tokens | None
    max_new_tokens: Tokens
    mc_samples: Samples
    seed: Seed
    greedy: Literal["always", "auto"]
    progress: bool
    chat_template_args: dict[str, Any] | None


HINTS = get_type_hints(_ModelArgs, include_extras=True) | hints(SamplerConfig)


def model_args_help() -> str:
    """The lines that `adapt lm_eval --help` adds to lm-eval's own."""
    width = max(map(len, MODEL_ARGS))
    lines = [f"  {name:<{width}}  {what}" for name, what in MODEL_ARGS.items()]
    example = "adapt lm_eval --model adapt --model_args pretrained=out/smollm2,threshold=0.8 --tasks gsm8k"
    return "\n".join(
        ["--model_args of --model adapt, name=value with commas between them:", *lines, "", f"  {example}"]
    )


def check_model_args(given: Mapping[str, Any]) -> None:
    """ValueError for a name that is unknown, and for a value that is not allowed."""
    if unknown := given.keys() - MODEL_ARGS.keys():
        raise ValueError(
            f"model_args: unknown {', '.join(sorted(map(shown, unknown)))}; `adapt lm_eval` knows {', '.join(sorted(MODEL_ARGS))}"
        )
    for name, value in given.items():
        check_value(name, value, HINTS[name])
    if given.get("dtype") is not None:
        one_of("dtype", given["dtype"], ("auto", *DTYPE_NAMES))
    changed(SamplerConfig(), **{name: given[name] for name in SAMPLER_ARGS.keys() & given.keys()})
