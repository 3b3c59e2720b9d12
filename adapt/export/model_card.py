"""The model card of an export: what the model is, how to use it, and what it was measured to do, warnings included."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..decoding.settings import SamplerConfig, changed
from ..files.model_folder import licence_named
from ..files.provenance import checkpoint_sha256
from ..files.user_text import user_json
from ..spec import DiffusionSpec

TAGS = ["custom_generate", "diffusion", "masked-diffusion", "text-diffusion"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ATTENTION = {
    "bidirectional": "Every token sees every token; each round recomputes the prompt.",
    "prefix": "The prompt sees itself causally, the text being written sees the prompt and itself; the prompt is cached.",
    "block": "Text is written in blocks of {block_size} tokens; a block sees itself and all before it, which is cached.",
}


class Report(NamedTuple):
    """What `adapt compare` has written about a checkpoint: report.json, and report.md beside it."""

    figures: dict[str, Any]
    text: str


_WANTED = "the report.json that `adapt compare` has written"


def read_report(path: str | Path, checkpoint: Path) -> Report:
    """The report of this checkpoint by its report.json; ValueError where it is not one, or about other weights."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"report={path}: is no file; give {_WANTED}")
    report = user_json(Path(path), "report", _WANTED)
    try:
        adapted = _checked(report)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"report={path}: not a report.json of `adapt compare` ({error!r:.120})") from error
    here = checkpoint_sha256(checkpoint)
    if any(name in adapted and adapted[name] != here[name] for name in here):
        raise ValueError(
            f"report={path}: is about {adapted.get('path')}, whose files are not those of {checkpoint}; compare this one"
        )
    beside = Path(path).with_name("report.md")
    if not beside.is_file():
        raise ValueError(
            f"report={path}: has no report.md beside it; leave it in the folder that `adapt compare` has written"
        )
    return Report(report, _without_paths(beside.read_text(encoding="utf-8"), report["provenance"].get("command")))


def _checked(report: dict[str, Any]) -> dict[str, Any]:
    """The adapted arm of a report, all of whose values that a card shows are of their kinds."""
    provenance = report["provenance"]
    adapted = provenance["arms"]["adapted"]
    rows = [*report["quality"], *report["speed"], *report["likelihood"], *report["pareto"]]
    assert all(isinstance(row, dict) for row in [adapted, *rows])
    assert all(isinstance(warning, str) for warning in report["warnings"])
    for row in report["quality"]:
        assert all(isinstance(row[name], str) for name in ("task", "metric")), "a row of quality has no task or metric"
        value = row["adapted"]["value"]
        assert value is None or isinstance(value, int | float), "a row of quality has no number"
    changed(SamplerConfig(), **(provenance.get("sampler") or {}))
    shlex.split(provenance.get("command") or "")
    return adapted


def _without_paths(text: str, command: Any) -> str:
    """The report, in whose command files and folders of this machine stand by their names."""
    if not isinstance(command, str):
        return text

    def named(word: str) -> str:
        option, equals, value = word.rpartition("=")
        return option + equals + (Path(value).name if value.startswith(("/", "~")) else value)

    return text.replace(command, shlex.join(map(named, shlex.split(command))))


def hub_base(spec: DiffusionSpec) -> str | None:
    """The Hub id of the original model, None where it was a folder or file: only what came from the Hub has a revision."""
    return spec.base_model if spec.base_revision and _HUB_ID.fullmatch(spec.base_model) else None


def license_of(checkpoint: Path, spec: DiffusionSpec) -> str | None:
    """The licence that the checkpoint's card names, or its base's on the Hub; None where nobody says."""
    if (found := licence_named(checkpoint)) is not None:
        return found
    if (base := hub_base(spec)) is not None:
        try:
            return ModelCard.load(base, ignore_metadata_errors=True).data.to_dict().get("license")
        except Exception:  # offline, gone, private: a dozen unrelated types, and each means that nobody says
            return None
    return None


def write_card(
    path: Path,
    name: str,
    spec: DiffusionSpec,
    sampler: SamplerConfig,
    *,
    license: str | None,
    report: Report | None,
    has_chat_template: bool,
) -> None:
    """Writes README.md with the metadata that the Hub reads."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        license=license,
        base_model=hub_base(spec),
        model_name=name if report else None,
        eval_results=_eval_results(report.figures) if report else None,
    )
    parts = [
        f"# {name}",
        _about(spec),
        "## How to use",
        _usage(name, spec, report, has_chat_template),
        _settings(sampler),
    ]
    if report is not None:
        parts.append(re.sub(r"^#", "##", report.text.strip(), flags=re.MULTILINE))
    else:
        parts += [
            "## Comparison with the original",
            "Not measured: `adapt compare` does it, and `adapt export --report` shows it.",
        ]
    text = "\n\n".join(parts)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(path)


def _about(spec: DiffusionSpec) -> str:
    source = f"[{spec.base_model}](https://huggingface.co/{spec.base_model})" if hub_base(spec) else spec.base_model
    revision = f" at revision {spec.base_revision}" if spec.base_revision else ""
    shift = "the token after it" if spec.shift_logits else "the token in its place"
    return (
        f"A diffusion language model, made from {source}{revision} with adapt-dlm {__version__}: it writes by refining. All "
        "blanks are guessed at once, the sure guesses are kept, the others are blanked again.\n\n"
        f"- attention: {spec.attention}. {_ATTENTION[spec.attention].format(block_size=spec.block_size)}\n"
        f"- noise: {spec.noise}; mask token: id {spec.mask_token_id}; a hidden state predicts {shift}"
    )


def _usage(name: str, spec: DiffusionSpec, report: Report | None, has_chat_template: bool) -> str:
    measured = (report.figures["provenance"].get("sampler") if report else None) or {}
    chosen = {k: v for k, v in measured.items() if v is not None and v != getattr(SamplerConfig(), k, None)}
    more = "".join(f", {key}={value!r}" for key, value in sorted(chosen.items()))
    note = "\nThese are the settings that the figures below were measured with.\n" if chosen else ""
    prompt = (
        '    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
    )
    inputs = (
        f"inputs = tokenizer.apply_chat_template(\n{prompt})"
        if has_chat_template
        else 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    )
    return f"""\
With transformers alone (5.20 or newer). The decoding code is in `custom_generate/`, in plain sight; `trust_remote_code=True` runs it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}", padding_side="left")
{inputs}
output = model.generate(**inputs, custom_generate="{name}", trust_remote_code=True, max_new_tokens=64{more})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
{note}
`generate` without `custom_generate` writes left to right, which is not what these weights were trained to do.
`infill=True` fills the blanks in a text, each of them a `tokenizer.mask_token`; `streamer=TextStreamer(tokenizer)` shows what
is written as it settles."""


def _settings(sampler: SamplerConfig) -> str:
    rule = (
        f"`threshold={sampler.threshold}`"
        if sampler.tokens_per_step is None
        else f"`tokens_per_step={sampler.tokens_per_step}`"
    )
    return (
        f"Settings: `threshold` (keep guesses that are at least so probable) or `tokens_per_step` (keep so many a round), {rule} "
        "if not said; `order` (`confidence` or `left_to_right`), `canvas_length`, `do_sample`, `temperature`, `top_p`, `seed`. "
        "Defaults are in `generation_config.json`."
    )


def _eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=row["task"],
            metric_type=row["metric"].split(",")[0],
            metric_name=row["metric"],
            metric_value=round(row["adapted"]["value"], 6),
        )
        for row in report["quality"]
        if row["adapted"]["value"] is not None
    ]
