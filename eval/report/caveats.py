"""Every way in which a comparison is weaker than it looks, as sentences for the report's warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FEW_ITEMS = 100
FEW_PROMPTS = 8
UNEVEN_LENGTHS = 1.25


def caveats(
    *,
    quality: Sequence[Mapping[str, Any]],
    speed: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    limit: int | None,
    device: str,
    threads: int,
    mc_samples: int,
    temperature: float,
    sampled_tasks: Sequence[str],
    untemplated_chat: bool,
    speed_prompts: int,
    skipped_batch_sizes: Sequence[int],
    fallback_prompts: bool,
) -> list[str]:
    """Sentences, the gravest first."""
    said: list[str] = []
    tasks = list(results["adapted"]["samples"])
    shots = {arm: {t: r.get("n-shot", {}).get(t) for t in tasks} for arm, r in results.items()}
    for arm in shots:
        uneven = [t for t in tasks if shots[arm][t] != shots["adapted"][t]]
        if uneven:
            theirs, ours = (sorted({shots[a][t] for t in uneven}) for a in (arm, "adapted"))
            said.append(
                f"The {'original' if arm == 'base' else arm} was shown {_list(theirs)} examples in its prompt, the "
                f"adapted model {_list(ours)} ({_list(uneven)}): they were not asked alike, and a longer prompt costs "
                "time."
            )
    if "control" not in results:
        said.append(
            "There is no control (--control): what the adapted model gained or lost by further training alone cannot "
            "be told from what diffusion brought."
        )
    if limit is not None:
        said.append(f"limit={limit}: only the first {limit} items of each task were asked.")
    few = sorted({r["n"] for r in quality if r["n"] < FEW_ITEMS})
    if few:
        said.append(f"Some rows rest on {_list(few)} items only; their intervals are wide.")
    kinds = {t: _kind(r) for t, r in results["adapted"]["configs"].items() if t in tasks}
    likelihood = [t for t in tasks if kinds.get(t) in ("loglikelihood", "loglikelihood_rolling", "multiple_choice")]
    if likelihood:
        said.append(
            f"Likelihoods of the adapted model are Monte-Carlo estimates ({mc_samples} samples) of a bound, the "
            f"original's are exact: in {_list(likelihood)} the adapted model's true log-likelihoods are higher than "
            "shown."
        )
    choice = [t for t in tasks if kinds.get(t) == "multiple_choice"]
    if choice:
        said.append(
            f"Multiple choice ({_list(choice)}) ranks those bounds: options whose bound is looser lose unfairly."
        )
    single = [t for t in tasks if kinds.get(t) == "loglikelihood"]
    if single:
        said.append(
            f"acc of {_list(single)} asks whether the greedy continuation is the target. The adapted model writes it "
            "on a canvas of the target's length, so it is told that length; the original is not."
        )
    if temperature > 0 or sampled_tasks:
        what = f" ({_list(sampled_tasks)})" if sampled_tasks else ""
        said.append(
            f"Answers were sampled{what}, one per item: another seed gives other scores than these intervals say."
        )
    if len(quality) > 1:
        said.append(f"{len(quality)} differences were tested, and their p-values are not corrected for that.")
    if untemplated_chat:
        said.append("The tokenizer has a chat template, and it was not applied (--apply_chat_template true).")
    if not speed:
        said.append("Speed was not measured.")
        return said
    said.append(
        "All arms run in transformers, in this process. A serving engine runs the original faster, and speculative "
        "decoding faster still: read the speed-up as one of the method on equal ground, not of a deployment."
    )
    if device == "cpu":
        said.append(
            f"Speed was measured on a CPU ({threads} thread{'s' * (threads != 1)}); on a GPU a forward's cost hardly "
            "grows with the canvas, and the ratios differ. Peak memory is that of the whole process, all arms in it."
        )
    if fallback_prompts:
        said.append("No task of the list generates text: speed was measured on the tasks' contexts, 64 tokens at most.")
    if speed_prompts < FEW_PROMPTS:
        said.append(f"Speed rests on {speed_prompts} prompts only.")
    if skipped_batch_sizes:
        said.append(
            f"Batch sizes {_list(skipped_batch_sizes)} were left out: there are only {speed_prompts} prompts for speed."
        )
    smallest = min(r["batch_size"] for r in speed)
    lengths = {r["arm"]: r["new_tokens"] for r in speed if r["batch_size"] == smallest}
    shortest, longest = min(lengths.values()), max(lengths.values())
    if longest > UNEVEN_LENGTHS * shortest:
        told = ", ".join(f"{'original' if arm == 'base' else arm} {n:.0f}" for arm, n in lengths.items())
        said.append(f"The arms wrote texts of different length (tokens: {told}): compare latency as well as tokens/s.")
    said.append(
        "First token: for the adapted model, the moment from which the first token cannot change any more (of the "
        "first row that has one); its samplers settle tokens out of order."
    )
    return said


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("output_type", ""))


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
