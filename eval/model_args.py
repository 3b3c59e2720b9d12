"""What `--model adapt` takes as `--model_args`, as its help says it."""

from __future__ import annotations

from docstring_parser import parse_from_object

from adapt.decoding.settings import SamplerConfig

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


def model_args_help() -> str:
    """The lines that `adapt lm_eval --help` adds to lm-eval's own."""
    width = max(map(len, MODEL_ARGS))
    lines = [f"  {name:<{width}}  {what}" for name, what in MODEL_ARGS.items()]
    example = "adapt lm_eval --model adapt --model_args pretrained=out/smollm2,threshold=0.8 --tasks gsm8k"
    return "\n".join(
        ["--model_args of --model adapt, name=value with commas between them:", *lines, "", f"  {example}"]
    )


def check_model_args(batch_size: int | str, greedy: str, mc_samples: int) -> None:
    """ValueError for a value that is not allowed."""
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size}: give a whole number above 0")
    if greedy not in ("always", "auto"):
        raise ValueError(f"greedy={greedy}: choose one of always, auto")
    if mc_samples < 1:
        raise ValueError(f"mc_samples={mc_samples}: give a whole number above 0")
