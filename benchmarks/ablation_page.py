"""The document: one section a base, each written by its own command, and what is written by hand between and after them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ablation_arms import REFERENCE
from ablation_figures import plot, table, tuning_table
from ablation_plan import Plan, slug
from ablation_texts import Chunk

FOLLOWS = "## What follows"  # written by hand; stays last


class Asked(NamedTuple):
    """Texts that are answers to prompts, and the model that gave them."""

    title: str
    """name of the model: the heading of its section"""
    file: Path
    column: str
    max_new_tokens: int
    parameters: int
    """of the model"""


def section_plot(out: Path, asked: Asked | None) -> Path:
    """Where the plot of a section lies."""
    return out.with_suffix(".png") if asked is None else out.with_name(f"{out.stem}-{slug(asked.title)}.png")


def write(
    out: Path,
    names: list[str],
    rows: list[dict[str, Any]],
    plan: Plan,
    training: list[Chunk],
    about: dict[str, Any],
    asked: Asked | None,
) -> None:
    """Puts the section, and beside the document its plot, in the place of an older one; all other sections are kept."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plot(section_plot(out, asked), rows)
    section = "\n".join(_section(out, names, rows, plan, training, about, asked)) + "\n"
    out.write_text(put(section, out.read_text() if out.exists() else ""))


def put(section: str, document: str) -> str:
    """The document with that section, which is found by its first line; a new one stands before FOLLOWS.

    Sections begin at "## "; the one that begins otherwise is the first.
    """
    parts = [part.rstrip("\n") for part in re.split(r"(?m)^(?=## )", document) if part.strip()]
    heading = section.splitlines()[0]
    if not heading.startswith("## "):
        parts = [section, *(part for part in parts if part.startswith("## "))]
    elif any(part.splitlines()[0] == heading for part in parts):
        parts = [section if part.splitlines()[0] == heading else part for part in parts]
    else:
        at = next((i for i, part in enumerate(parts) if part.startswith(FOLLOWS)), len(parts))
        parts.insert(at, section)
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _section(
    out: Path,
    names: list[str],
    rows: list[dict[str, Any]],
    plan: Plan,
    training: list[Chunk],
    about: dict[str, Any],
    asked: Asked | None,
) -> list[str]:
    trained = {"fp32": "fp32", "bf16": "trained in bf16 autocast, sampled and scored in fp32"}[plan.precision]
    walk = "all of a short ladder tried" if plan.rates else "along a ladder until the neighbours of the best are worse"
    error = max((row["mc_stderr"] for row in rows if "mc_stderr" in row), default=0)
    return [
        f"## {asked.title}: answers to prompts" if asked else "# What works best: one model, one text, equal tokens",
        "",
        f"{', '.join(about['dates'])}; {'; '.join(about['hardware'])}; {trained}; revision {', '.join(about['revisions'])}; "
        f"{about['num_runs']} runs, {about['failed']} of them failed. Written by",
        "",
        f"    python {_command(out, names, plan, asked)}",
        "",
        _text(plan, training, about, asked),
        "",
        "**Bound.** NELBO minus the base's NLL of the same texts, nats/token: an upper bound on what adaptation lost. Block arms are "
        "scored block by block, with the last block full of end-of-text. Bidirectional arms are told a text's length, so "
        f"-log p(length) under the training texts' histogram is added to theirs ({about['length_cost']:.4f} nats/token). "
        f"{plan.samples} Monte-Carlo samples a text, from one seed for all arms (standard error of a bound at most, its strata "
        f"taken for independent, {error:.4f}). Interval: 95 %, bootstrap over {plan.heldout} texts "
        f"of the mean of {plan.seeds} seed{'s' * (plan.seeds > 1)}; the seeds stand beside it. *Drift*: NLL of the same weights read "
        "left to right, minus the base's.",
        "",
        f"**Training.** {plan.tokens:,} clean tokens{' of answers' if asked else ''}, each read once, about {plan.row_tokens} or a "
        "little fewer in a step; the same "
        f"texts in every arm. The learning rate is tuned with seed 0 on {plan.tune_tokens:,} tokens and {plan.tune_heldout} texts, "
        f"{walk}; ! marks an end of the ladder. *Positions*: computed for each clean token"
        f"{', prompts and' if asked else ','} padding included. *CPU s*: of one training. *Against*: difference to "
        f"{REFERENCE}, paired; = where texts or seeds do not separate the two.",
        *(["", _how_small(rows, plan, asked)] if asked else []),
        "",
        *table(rows),
        "",
        f"![bounds of all arms]({section_plot(out, asked).name})",
        "",
        "Learning rates tried, nats/token of NELBO:",
        "",
        *tuning_table(rows),
    ]


def _text(plan: Plan, training: list[Chunk], about: dict[str, Any], asked: Asked | None) -> str:
    sampled, kept = sum(c.sampled for c in training), sum(len(c.kept) for c in training)
    ended, share = sum(c.ended for c in training), kept / sampled
    of_them = (
        f"{about['mean_length']:.0f} tokens on average, are scored and never trained on. The base's own NLL of them is "
        f"{about['base_nll']:.4f} nats/token."
    )
    if asked is None:
        selection = np.log(share) / about["mean_length"]
        return (
            f"**Text.** What the base wrote at temperature 1: {sampled} samples, of which {ended / sampled:.1%} ended within the "
            f"context and {share:.1%} did and tokenise back to the same tokens; those are kept. {plan.heldout} further ones, {of_them} "
            f"Keeping a share Z makes their entropy the NLL plus log Z, {selection:+.4f} nats/token, so that KL(kept texts || adapted) "
            f"is at most the bound below {-selection:+.4f}, the same for all arms."
        )
    tokens, seconds = sum(len(ids) for c in training for ids in c.kept), sum(c.cpu_s for c in training)
    return (
        f"**Text.** What the base answers at temperature 1 to rows of {asked.file.name} (column {asked.column}, as a user's turn in "
        f"its chat template where it has one): {sampled} answers, {tokens:,} tokens, {tokens / max(seconds, 1e-9):.0f} a CPU second. "
        f"{ended / sampled:.1%} ended; the others are cut where a block ends, within {asked.max_new_tokens} tokens. All are kept, as "
        "token ids, so that the base's NLL is their entropy: no constant is left out. The prompt is context: never noised, never "
        f"scored. {plan.heldout} answers to further prompts, {of_them}"
    )


def _how_small(rows: list[dict[str, Any]], plan: Plan, asked: Asked) -> str:
    steps = [row["steps"] for row in rows if "steps" in row]
    of_steps = f" in {min(steps)} to {max(steps)} optimizer steps" if steps else ""
    return (
        f"**How small this is.** {plan.tokens:,} tokens{of_steps}, {plan.seeds} seed{'s' * (plan.seeds > 1)}: one token for every "
        f"{asked.parameters / plan.tokens:,.0f} of the model's {asked.parameters / 1e6:.0f}M weights. It shows which arm starts best "
        "from this base, and nothing of where one ends."
    )


def _command(out: Path, names: list[str], plan: Plan, asked: Asked | None) -> str:
    """What leads to these figures, without what changes none of them (folders, workers, calls that were cut short)."""
    words = ["benchmarks/ablations.py", "--base", "path/to/base", "--out", str(out)]
    if asked:
        words += ["--title", asked.title, "--prompts", f"path/to/{asked.file.name}", "--prompt_column", asked.column]
        words += ["--max_new_tokens", str(asked.max_new_tokens), "--arms", "; ".join(names)]
    return shlex.join([*words, *plan.arguments()])
