"""A diffusion checkpoint becomes a folder that works without this package: weights, tokenizer, model card, decoding code.

    export("runs/mine/model", "out/mine")

`out` appears when all of it is there. What is in out/custom_generate/ is copied from this package, so it writes the same tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from .. import progress
from ..conversion.base_model import fetch
from ..conversion.copy_weights import Copy
from ..conversion.weight_plan import kept_in_float32, stored_dtype
from ..decoding.settings import SamplerConfig
from ..files.adapters import base_and_adapter, merge_folder
from ..files.finite import check_folder_finite
from ..files.loading import config_of, model_of, skeleton
from ..files.model_folder import check_model_folder, copy_extras
from ..files.outputs import scratch_beside
from ..files.safetensors_folder import read_shards
from ..files.staging import check_space, publish
from ..lm import spec_and_tokenizer
from ..model.precision import DTYPES
from ..probe.in_place import probe_in_place
from ..spec import DiffusionSpec
from ..tokens import pad_token_id
from .bundle import bundle, flat_name
from .model_card import hub_base, license_of, read_report, write_card
from .settings import check_settings

REQUIREMENTS = ("torch>=2.9", "transformers>=5.20")  # tests/test_packaging.py holds them against pyproject.toml
_ENTRY = "export.custom_generate"
MAX_NEW_TOKENS = 64  # what `adapt generate` writes by default


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    adapter: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    report: str | Path | None = None,
    license: str | None = None,
    sampler: SamplerConfig | None = None,
) -> Path:
    """Writes the checkpoint to the new folder `out` as plain transformers load it; returns its path.

    Weights go from file to file, and meanwhile the attention pattern is proved on them where they lie. Loaded as a whole are models
    with an adapter that is more than LoRA on layers (`adapters.merge_folder`), and those of another max_shard_size.
    adapter: a PEFT folder to merge in. dtype: of the weights, after merging; default as in the checkpoint. max_shard_size: of
    one safetensors file; default as in the checkpoint. report: the report.json of a comparison of this checkpoint, for the model
    card. license: as the Hub spells it; default is what the card of the checkpoint or of its base says. sampler: what OUT decodes
    with where the caller says nothing. Raises ValueError if `out` exists, and for what `load` refuses.
    """
    out = Path(out)
    check_settings(out, format, dtype, max_shard_size)
    checkpoint, adapter = base_and_adapter(checkpoint, adapter)
    check_model_folder(checkpoint)
    figures = None if report is None else read_report(report, Path(checkpoint))
    sampler = sampler or SamplerConfig()
    with scratch_beside(out) as scratch:
        with progress.doing(f"reading {checkpoint}"):
            folder, _ = fetch(checkpoint, scratch)
        todo = "an export loads with transformers alone, so its architecture has to be one of theirs"
        config = config_of(folder, f"checkpoint={checkpoint}", todo=todo)
        spec, tokenizer = spec_and_tokenizer(folder)
        named = hub_base(spec) or Path(spec.base_model).name  # a stranger has no use for a path of this machine
        source = folder
        if adapter is not None:
            source = merge_folder(source, adapter, scratch / "merged")
        if max_shard_size is not None:
            with progress.doing(f"cutting the weights into files of {max_shard_size}"):
                source = _in_shards(source, scratch / "shards", max_shard_size, dtype)
        staged = scratch / "export"
        staged.mkdir()
        _write_model(source, staged, out, config, replace(spec, base_model=named), dtype)
        _generation_config(tokenizer, spec, sampler).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        _write_code(staged / "custom_generate")
        copy_extras(folder, staged, trust_remote_code=False)
        license = license or license_of(folder, spec)
        about = {"license": license, "report": figures, "has_chat_template": bool(tokenizer.chat_template)}
        write_card(staged / "README.md", out.name, replace(spec, base_model=named), sampler, **about)
        publish(staged, out)
    return out


def _in_shards(source: Path, made: Path, max_shard_size: str, dtype: str | None) -> Path:
    model = model_of(source, f"checkpoint={source}", dtype=dtype or "auto")
    model.save_pretrained(made, max_shard_size=max_shard_size)
    return made


def _write_model(
    source: Path, staged: Path, out: Path, config: PretrainedConfig, spec: DiffusionSpec, dtype: str | None
) -> None:
    """Config and weights; the attention pattern is proved on them meanwhile."""
    what = f"checkpoint={source}"
    shards = read_shards(source, what)
    stored_as, cast = stored_dtype(shards), DTYPES[dtype] if dtype else None
    loaded_as: Any = cast or config.dtype or stored_as
    config.dtype = loaded_as
    model = skeleton(config, what, shards, more_rows=False)
    config.architectures = [type(model).__name__]
    spec.write_to(config)
    config.save_pretrained(staged)
    names = {name for shard in shards.values() for name in shard.tensors}
    copy = Copy(shards, staged, {}, dtype=cast, keep_dtype=kept_in_float32(model, names, loaded_as))
    check_space(out, copy.num_bytes)
    with copy.writing(out) as (readable, copy_done):
        written = config_of(staged, what)
        probe_in_place(type(model), written, readable, spec, what, copy_done, writing=staged, dtype=loaded_as)
    with progress.doing("checking that the weights are numbers"):  # the probe has not read every row of the embedding
        check_folder_finite(staged, what)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, spec: DiffusionSpec, sampler: SamplerConfig
) -> GenerationConfig:
    """What `adapt generate` decodes with by default, for callers who say nothing; the base's own is for another way of writing."""
    known: Any = tokenizer  # transformers types its token ids as anything
    config = GenerationConfig(
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=pad_token_id(known),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=sampler.temperature > 0,
    )
    chosen = {name: value for name, value in dataclasses.asdict(sampler).items() if value is not None}
    if sampler.temperature == 0:
        del chosen["temperature"], chosen["top_p"]
    if spec.noise == "uniform":
        chosen["vocabulary_size"] = len(tokenizer)
    for name, value in chosen.items():
        setattr(config, name, value)
    return config


def _write_code(folder: Path) -> None:
    folder.mkdir()
    for name, source in bundle(_ENTRY).items():
        name = "generate" if name == flat_name(_ENTRY) else name  # transformers looks for this name
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS))
