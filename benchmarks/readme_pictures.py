"""The two pictures of the README and the outputs of the notebook, all from a finished quickstart.

    python benchmarks/readme_pictures.py quickstart

Writes docs/refinement.png (one test example, round by round), docs/quality_speed.png (the report's curve in letters that a
phone shows) and runs examples/refinement.ipynb on the quickstart's model. What made them stands in docs/pictures.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from run_notebook import execute

import adapt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from rounds import Picture, pieces_of  # noqa: E402

COLOURS = {"base": "#64748b", "control": "#b45309", "adapted": "#0f766e"}
NAMES = {"base": "original", "control": "control", "adapted": "adapted"}
LONGEST = 56  # characters of an answer that a phone shows at a size to be read


def refinement(folder: Path, sampler: adapt.SamplerConfig, seed: int, file: Path) -> dict[str, Any]:
    """Draws the first short test example that the model answers rightly (or, where it answers none, the first)."""
    lm = adapt.load(folder / "adapted" / "model")
    examples = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()]
    short = [example for example in examples if len(example["completion"]) <= LONGEST]
    right, shown = [], None
    for example in short:
        prompt = lm.tokenizer(example["prompt"], return_tensors="pt").input_ids
        generator = torch.Generator(lm.device).manual_seed(seed)
        output = lm.generate(prompt, max_new_tokens=48, sampler=sampler, generator=generator, keep_history=True)
        text = lm.tokenizer.decode(output.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
        shown = shown or (example, prompt, output)
        right = [(example, prompt, output)] if text.strip() == example["completion"].strip() else []
        if right:
            break
    assert shown is not None, f"{folder}: no test example has an answer of at most {LONGEST} characters"
    example, prompt, output = right[0] if right else shown
    pieces, rounds = pieces_of(lm, output, prompt.shape[1])
    pieces, rounds = _first(pieces, rounds, LONGEST)
    num_rounds = len(rounds) - 1
    Picture(pieces, rounds, title=f"{len(pieces)} tokens in {num_rounds} rounds").save(file)
    return {"prompt": example["prompt"], "is_right": bool(right), "tokens": len(pieces), "rounds": num_rounds}


def _first(pieces: list[str], rounds: list[list[bool]], characters: int) -> tuple[list[str], list[list[bool]]]:
    """The first so many characters, and the rounds in which something of them changed."""
    count = next((i for i in range(len(pieces)) if len("".join(pieces[: i + 1])) > characters), len(pieces))
    kept = [settled[:count] for settled in rounds]
    return pieces[:count], [now for before, now in zip([None, *kept], kept, strict=False) if now != before]


def quality_speed(report: dict[str, Any], file: Path) -> None:
    """The report's points, quality over emitted tokens per second at batch size 1, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.3), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for point in report["pareto"]:
        arm = point.get("arm", "adapted")
        x, y, (low, high) = point["tokens_per_s"], 100 * point["quality"], point["ci95"]
        bars = [[max(0, y - 100 * low)], [max(0, 100 * high - y)]]
        axes.errorbar(x, y, yerr=bars, fmt="o", markersize=9, color=COLOURS[arm], capsize=4, linewidth=1.5)
        axes.annotate(NAMES[arm], (x, y), xytext=(9, 7), textcoords="offset points", fontsize=14, color=COLOURS[arm])
    axes.set_xlim(0, 1.35 * max(point["tokens_per_s"] for point in report["pareto"]))
    axes.set_ylim(-4, 104)
    axes.set_xlabel("tokens per second", fontsize=13)
    axes.set_ylabel("exact match (%)", fontsize=13)
    axes.tick_params(labelsize=12, length=0)
    axes.grid(color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=200, metadata={"Software": None})


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="QUICKSTART", help="folder of a finished `adapt quickstart`")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    parser.add_argument("--notebook", type=Path, default=ROOT / "examples" / "refinement.ipynb", help="to run in place")
    options = parser.parse_args(argv)
    report = json.loads((options.folder / "report" / "report.json").read_text())
    provenance = report["provenance"]
    sampler = adapt.SamplerConfig(**provenance["sampler"])
    options.out.mkdir(parents=True, exist_ok=True)
    example = refinement(options.folder, sampler, provenance["seed"], options.out / "refinement.png")
    quality_speed(report, options.out / "quality_speed.png")
    checkpoint = (options.folder / "adapted" / "model").resolve()
    executed = execute(options.notebook, {"CHECKPOINT": str(checkpoint)})
    options.notebook.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n")
    made = {key: provenance[key] for key in ("command", "date", "git_revision", "hardware", "dtype", "versions")}
    (options.out / "pictures.json").write_text(json.dumps({"refinement": example, "made_by": made}, indent=1) + "\n")
    print(f"{options.out}/refinement.png, quality_speed.png, pictures.json; {options.notebook}")


if __name__ == "__main__":
    main(sys.argv[1:])
