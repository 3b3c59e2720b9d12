"""`generate` for a diffusion language model that transformers has loaded: it refines blanks instead of writing left to right.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=64)

`adapt export` writes this module and what it needs of this package into FOLDER/custom_generate/. Settings are keywords, else
those of the generation_config that was passed, else of the model's (generation_config.json):

    max_new_tokens (or max_length), eos_token_id, pad_token_id, do_sample, temperature, top_p, return_dict_in_generate
                                        as in transformers; what a row has behind its end is end-of-text, or pad_token_id if given
    threshold, tokens_per_step, order, canvas_length        which guesses are kept in a round, see sampler.py
    generator, seed                     a torch.Generator, or its seed; neither: torch's global one
    streamer                            transformers' streamers: tokens come out once everything to their left is settled
    infill=True                         fills the mask tokens in input_ids instead of writing after them
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..decoding.decoder import Decoder
from ..decoding.rounds import GenerateOutput
from ..decoding.sampler import generate as write_after
from ..decoding.sampler import infill as fill_blanks
from ..decoding.settings import SETTINGS as SAMPLER_SETTINGS
from ..decoding.settings import SamplerConfig
from ..probe.probe import probe
from ..spec import DiffusionSpec

_SETTINGS = {*SAMPLER_SETTINGS, "do_sample", "eos_token_id", "max_length", "max_new_tokens", "pad_token_id"}
_SETTINGS |= {"return_dict_in_generate", "vocabulary_size"}
_INPUTS = {"attention_mask", "generator", "infill", "input_ids", "seed"}
# What tokenizers and transformers hand over as well, and what makes no difference here.
_IGNORED = {"bos_token_id", "token_type_ids", "tokenizer", "transformers_version", "use_cache"}
_NEUTRAL = {"length_penalty": 1, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "top_k": 0}
_mask_free: WeakKeyDictionary[PreTrainedModel, dict[tuple, bool]] = WeakKeyDictionary()


def generate(
    inputs: Tensor | None = None, *, model: PreTrainedModel, generation_config: Any = None, streamer: Any = None, **more
) -> Tensor | GenerateOutput:
    """The token ids [B, P + max_new_tokens], prompt and what was written; a GenerateOutput with return_dict_in_generate.

    ValueError for a setting that decoding by refinement does not have (beams, logits processors, ...), and, on the first
    call, if the model does not attend as its config promises under its attention kernel.
    """
    given = {name: value for name, value in more.items() if value is not None}
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    settings = _settings(given, [vars(config) for config in configs])
    input_ids = given.get("input_ids", inputs)
    if input_ids is None:
        raise ValueError("input_ids: none given; pass what the tokenizer returns, model.generate(**inputs, ...)")

    lm = _diffusion_lm(model, settings)
    generator = given.get("generator")
    if generator is None and "seed" in given:
        generator = torch.Generator(model.device).manual_seed(given["seed"])
    options: dict[str, Any] = {"attention_mask": given.get("attention_mask"), "generator": generator}
    options["sampler"] = _sampler(settings)
    if given.get("infill"):
        num_prompt = int((input_ids == lm.spec.mask_token_id).long().argmax())
        options["streamer"] = None if streamer is None else _FromTheLeft(streamer, lm, input_ids, num_prompt, end=False)
        output = fill_blanks(lm, input_ids, **options)
    else:
        num_prompt = input_ids.shape[1]
        options["streamer"] = None if streamer is None else _FromTheLeft(streamer, lm, input_ids, num_prompt, end=True)
        output = write_after(lm, input_ids, max_new_tokens=_max_new_tokens(settings, num_prompt), **options)
        if "pad_token_id" in given:
            _pad(output.sequences[:, num_prompt:], cast(int, lm.end_of_text), given["pad_token_id"])
    return output if settings.get("return_dict_in_generate") else output.sequences


def _refuse_unknown(values: dict[str, Any]) -> None:
    known = _SETTINGS | _INPUTS
    for name, value in sorted(values.items()):
        if name in known | _IGNORED or name.startswith("_") or value is None or value is False:
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise ValueError(
                f"{name}: decoding by refinement has no such setting; leave it out "
                f"(it has {', '.join(sorted(known))} and streamer)"
            )


def _settings(given: dict[str, Any], configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each setting from the first that has it: the keywords, the config that was passed, the model's."""
    settings: dict[str, Any] = {}
    for values in (given, *configs):
        _refuse_unknown(values)
        found = {name: values[name] for name in _SETTINGS if values.get(name) is not None}
        # Alternatives: who sets the one has unset the other.
        for one, other in (("threshold", "tokens_per_step"), ("max_new_tokens", "max_length")):
            if one in settings or other in settings:
                found = {name: value for name, value in found.items() if name not in (one, other)}
        settings = found | settings
        if values is given and "temperature" in given:
            settings.setdefault("do_sample", True)
    return settings


def _sampler(settings: dict[str, Any]) -> SamplerConfig:
    chosen = {name: settings[name] for name in SAMPLER_SETTINGS if name in settings}
    if not settings.get("do_sample"):
        chosen |= {"temperature": 0.0, "top_p": 1.0}
    else:
        chosen.setdefault("temperature", 1.0)
    return SamplerConfig(**chosen)


def _max_new_tokens(settings: dict[str, Any], num_prompt: int) -> int:
    if "max_new_tokens" in settings:
        return settings["max_new_tokens"]
    if "max_length" not in settings:
        raise ValueError("max_new_tokens: not given, nor in generation_config.json; say how many tokens to write")
    return settings["max_length"] - num_prompt


def _diffusion_lm(model: PreTrainedModel, settings: dict[str, Any]) -> Decoder:
    spec = DiffusionSpec.of(model.config, str(model.name_or_path))
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if len(ends) != 1:
        raise ValueError(
            f"eos_token_id={list(ends)}: a diffusion model ends with one token; give the one it was taught"
        )
    if spec.noise == "uniform" and "vocabulary_size" not in settings:
        raise ValueError("generation_config.vocabulary_size: missing, uniform noise is drawn from that many tokens")
    known = _mask_free.setdefault(model, {})
    how = (model.config._attn_implementation, model.dtype, model.device)
    if how not in known:
        known[how] = probe(model, spec.attention, spec.clean_context)
    return _Loaded(model, spec, ends[0], settings.get("vocabulary_size", 0), known[how])


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model that transformers has loaded, as the sampler takes it: there is no tokenizer here."""

    model: PreTrainedModel
    spec: DiffusionSpec
    end_of_text: int | None
    vocab_size: int
    mask_free: bool
    start_token_id: None = None

    @property
    def device(self) -> torch.device:
        return self.model.device


class _FromTheLeft:
    """Passes rounds on as transformers' streamers expect tokens: the prompt, then one after the other, the first end last."""

    def __init__(self, streamer: Any, lm: Decoder, input_ids: Tensor, num_prompt: int, *, end: bool) -> None:
        if len(input_ids) != 1:
            raise ValueError(
                f"streamer: streams one row, but input_ids has {len(input_ids)}; pass one prompt at a time"
            )
        self.streamer, self.column, self.blank = streamer, num_prompt, lm.spec.mask_token_id
        self.end_of_text = cast(int, lm.end_of_text) if end else None
        streamer.put(input_ids[:, :num_prompt].cpu())

    def put(self, value: Tensor) -> None:
        for token in value[0, self.column :].cpu():
            if token == self.blank:
                return
            self.streamer.put(token[None])
            self.column += 1
            if token == self.end_of_text:
                self.column = value.shape[1]
                return

    def end(self) -> None:
        self.streamer.end()


def _pad(written: Tensor, end_of_text: int, pad_token_id: int) -> None:
    ends = (written == end_of_text).long()
    written[ends.cumsum(1) - ends > 0] = pad_token_id
