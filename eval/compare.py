"""An adapted model beside its original: quality by lm-eval, speed measured side by side, one report.

compare("base", "out/adapted", tasks=["gsm8k"], out="out/report")
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import adapt
from adapt.files import loading
from adapt.files.provenance import git_revision
from adapt.progress import doing, say

from .arms import choose_prompts, model_of, speed_arm
from .causal_lm import CausalLM
from .checks import check_folder, check_settings, chosen_device, chosen_dtype
from .lm import AdaptLM
from .measure import provenance, speed
from .measure.corpus import texts_of
from .measure.hardware import hardware
from .measure.likelihood import likelihood_row
from .measure.pareto import arm_points, sweep_point
from .measure.quality import evaluate, find_tasks, quality_rows, quiet
from .report.caveats import caveats
from .report.page import refuse_existing, write_report
from .report.words import headline, terminal_table


def compare(
    base: str | Path,
    adapted: str | Path,
    *,
    tasks: Sequence[str],
    out: str | Path,
    control: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    base_num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 8,
    sampler: adapt.SamplerConfig | None = None,
    sweep: Sequence[float] = (),
    mc_samples: int = 32,
    corpus: str | Path | None = None,
    corpus_tokens: int = 4096,
    speed_prompts: int = 16,
    speed_batch_sizes: Sequence[int] = (1, 8),
    speed_repeats: int = 3,
    speed_until: float | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attn_implementation: str = "sdpa",
    seed: int = 1234,
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
    notice: str | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The report (what is in it: docs/guide.md), which is also written to `out` as JSON, Markdown and HTML with lm-eval's samples.

    base, control: causal LMs; adapted: a diffusion checkpoint. All arms stand in one process with one dtype, device and
    attention kernel. base_num_fewshot: examples in the original's prompt alone. sweep: more thresholds for the
    quality-speed curve. speed_repeats: rounds, 0 = do not measure. speed_until: time.monotonic() after which no
    further round begins. dtype: default bfloat16 where the device computes it
    natively, else float32. notice: the first sentence of the report and its first warning. notes: warnings before its own.
    Raises ValueError for what the user can mend, before any model is loaded where that can be known.
    """
    started, sampler = time.time(), sampler or adapt.SamplerConfig()
    check_settings(
        {
            "limit": limit, "num_fewshot": num_fewshot, "base_num_fewshot": base_num_fewshot, "batch_size": batch_size,
            "apply_chat_template": apply_chat_template, "sweep": list(sweep), "mc_samples": mc_samples,
            "corpus_tokens": corpus_tokens, "speed_prompts": speed_prompts, "seed": seed, "overwrite": overwrite,
            "speed_batch_sizes": list(speed_batch_sizes), "speed_repeats": speed_repeats,
        }
    )  # fmt: skip
    refuse_existing(out, overwrite)
    folders = {"base": base, "control": control, "adapted": adapted}
    folders = {arm: str(folder) for arm, folder in folders.items() if folder is not None}
    for arm, folder in folders.items():
        check_folder(arm, folder)
        loading.check_weights(folder, f"{arm}={folder}")
    if corpus is not None:
        next(texts_of(corpus), None)  # refuses a missing file now, not after an hour
    where, as_dtype = chosen_device(device), chosen_dtype(dtype, device)
    with doing("finding the tasks", shown=progress):
        manager = find_tasks(tasks, include_path)

    def announce_step(what: str) -> None:
        if progress:
            say(f"compare: {what}")

    # 1. Load all arms: they take turns later, so they stand side by side.
    announce_step(f"loading {', '.join(folders)} ({str(as_dtype).removeprefix('torch.')}, {where})")
    options = {"dtype": as_dtype, "attn_implementation": attn_implementation}
    lms: dict[str, Any] = {}
    for arm, folder in folders.items():
        if arm == "adapted":
            lm = adapt.load(folder, dtype=as_dtype, device=where, attn_implementation=attn_implementation)
            lms[arm] = AdaptLM(
                lm, batch_size=batch_size, sampler=sampler, mc_samples=mc_samples, seed=seed, progress=progress
            )
        else:
            with doing(f"loading {folder}", shown=progress), quiet("lm_eval"):
                model = loading.model_of(folder, f"{arm}={folder}", **options).eval().to(where)
                tokenizer = loading.tokenizer_of(folder, f"{arm}={folder}")
                lms[arm] = CausalLM(model, name=arm, shown=progress, tokenizer=tokenizer, batch_size=batch_size)

    # 2. Quality: each arm through lm-eval.
    shots = {"base": num_fewshot if base_num_fewshot is None else base_num_fewshot}
    settings = {"limit": limit, "seed": seed, "apply_chat_template": apply_chat_template}
    results: dict[str, dict[str, Any]] = {}
    for number, (arm, lm) in enumerate(lms.items(), 1):
        announce_step(f"quality of {arm} ({number} of {len(lms)}) on {', '.join(tasks)}")
        with doing(f"{arm}: preparing and scoring the items", shown=progress):
            results[arm] = evaluate(lm, manager, tasks, num_fewshot=shots.get(arm, num_fewshot), **settings)
    with doing("pairing the items", shown=progress):
        quality, warnings = quality_rows(results, seed=seed)

    # 3. Speed: all arms take turns on the same items' prompts.
    prompts = choose_prompts(results, speed_prompts, lms["adapted"])
    rows: list[dict[str, Any]] = []
    tokenizer = lms["base"].tokenizer
    if speed_repeats and prompts is not None:
        announce_step(f"speed at batch size {', '.join(map(str, speed_batch_sizes))}, {speed_repeats} rounds")
        arms = [speed_arm(arm, lm, prompts, sampler, seed) for arm, lm in lms.items()]
        rows = speed.measure(
            arms,
            tokenizer=tokenizer,
            batch_sizes=speed_batch_sizes,
            repeats=speed_repeats,
            until=speed_until,
            progress=progress,
        )

    # 4. The quality-speed curve, and the likelihood of held-out text.
    report: dict[str, Any] = {"quality": quality, "speed": rows}
    pareto = arm_points(report)
    for threshold in sweep if prompts is not None else ():
        assert prompts is not None
        announce_step(f"sweep, threshold={threshold:g}")
        pareto += sweep_point(report, lms["adapted"], threshold, prompts, results, manager, settings, num_fewshot,
                               tokenizer, speed_repeats, progress)  # fmt: skip
    likelihood = []
    if corpus is not None:
        likelihood.append(
            likelihood_row(
                corpus, lms["base"].model, lms["adapted"].lm, tokenizer, max_tokens=corpus_tokens,
                num_samples=mc_samples, seed=seed, progress=progress,
            )
        )  # fmt: skip

    # 5. What the numbers are worth, where they come from, and the report.
    measured = {r["batch_size"] for r in rows}
    warnings = [*([notice] if notice else []), *notes] + caveats(
        quality=quality,
        speed=rows,
        results=results,
        limit=limit,
        device=where.type,
        threads=torch.get_num_threads(),
        mc_samples=mc_samples,
        temperature=sampler.temperature,
        sampled_tasks=_sampled(results),
        untemplated_chat=not apply_chat_template and bool(getattr(tokenizer, "chat_template", None)),
        speed_prompts=len(prompts.texts["adapted"]) if prompts else 0,
        skipped_batch_sizes=[b for b in speed_batch_sizes if rows and b not in measured],
        fallback_prompts=bool(prompts and prompts.fallback),
    ) + _tokenizers_differ(results, lms) + warnings  # fmt: skip
    sources = {
        "command": command or "adapt_eval.compare.compare(...)",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": provenance.versions(),
        "hardware": hardware(where),
        "device": str(where),
        "dtype": str(as_dtype).removeprefix("torch."),
        "attention_kernel": attn_implementation,
        "seed": seed,
        "sampler": dataclasses.asdict(sampler),
        "mc_samples": mc_samples,
        "batch_size": batch_size,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "tasks": provenance.task_settings(results),
        "arms": {a: provenance.checkpoint(f, model_of(lms[a])) for a, f in folders.items()},
        "speed_settings": None if prompts is None else {**prompts._asdict(), "texts": len(prompts.texts["adapted"])},
        "adapted_counters": dict(lms["adapted"].counters),
        "notice": notice,
        "wall_seconds": round(time.time() - started, 1),
    }
    report = {
        "provenance": sources, "quality": quality, "likelihood": likelihood, "speed": rows, "pareto": pareto,
        "warnings": warnings,
    }  # fmt: skip
    with doing("writing the report", shown=progress):
        write_report(report, out, samples={arm: r["samples"] for arm, r in results.items()}, overwrite=overwrite)
    return report


def _sampled(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    configs = results["adapted"]["configs"]
    return [t for t in results["adapted"]["samples"] if (configs[t].get("generation_kwargs") or {}).get("do_sample")]


def _tokenizers_differ(results: Mapping[str, Mapping[str, Any]], lms: Mapping[str, Any]) -> list[str]:
    task, samples = next(iter(results["adapted"]["samples"].items()))
    text = str(samples[0]["arguments"][0][0])
    ours = lms["adapted"].tok_encode(text)
    return [
        f"The tokenizer of {arm} cuts the first prompt of {task} into other tokens than the adapted model's."
        for arm, lm in lms.items()
        if lm.tok_encode(text) != ours
    ]


def announce(report: Mapping[str, Any], out: str | Path) -> None:
    """Prints what a reader in a hurry needs: the warnings, the headline, the table and where the report is."""
    print()
    for warning in report["warnings"]:
        print(f"note: {warning}")
    print(f"\n{headline(report)}\n\n{terminal_table(report)}\n")
    print(f"report: {Path(out) / 'report.html'}")
