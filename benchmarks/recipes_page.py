"""docs/recipes.md: the table of all recipes, from the lines on top of each and what it sets.

python benchmarks/recipes_page.py            # writes it again; tests/test_docs.py says when that is due
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
INTRO = """\
# Recipes

Copy one, change three lines, override the rest on the command line. The command that runs a recipe stands on top of it.
Every field, with its unit and default:

```bash
adapt train --help
```

Memory is that of each GPU, **computed and not measured**: the `adapt plan` command on top of each recipe prints it again, for other
numbers of GPUs and other settings too. How far such plans are off where they were measured: `benchmarks/README.md`. *Source* is where
the settings come from: a paper, or our own [ablations](ablations.md). A recipe without one has usual settings that nobody has tuned.
Every recipe takes two steps on a tiny model of its architecture in the tests; none has been run to its end.

| recipe | base | method | attention | GPUs | GB of each | source |
|---|---|---|---|--:|--:|---|
"""
OUTRO = """
The quickstart's recipes (`recipes/quickstart/`) are filled in by `adapt quickstart`; how they came about: [log.md](log.md).

Gemma and Llama are gated: accept the licence on the model's page, then `hf auth login`. No Hub on the node:
[multi_node.md](multi_node.md#nodes-without-internet).

`config.json` beside the recipes of a model holds its shape, so that planning needs no network:
`adapt plan --config recipes/qwen3-8b/block.yaml --model_config recipes/qwen3-8b/config.json`.
"""


def page() -> str:
    """The page's text."""
    files = [file for file in (ROOT / "recipes").glob("*/*.yaml") if file.parent.name != "quickstart"]
    rows = [_row(file) for file in sorted(files, key=lambda file: (_family(file), file.stem))]
    return INTRO + "\n".join(rows) + "\n" + OUTRO


def _family(file: Path) -> tuple[str, float]:
    """Models of a family by their size."""
    name, _, size = file.parent.name.rpartition("-")
    if size.startswith("a"):  # a mixture of experts names its active parameters last
        name, _, size = name.rpartition("-")
    return name, float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


def _row(file: Path) -> str:
    text = file.read_text()
    recipe = yaml.safe_load(text)
    model = recipe["model"]
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    memory = re.search(r"computed and not measured: ([\d.]+) GB", header)
    gpus = re.search(r"adapt plan .*--gpus (\d+)", header)
    assert memory, f"{file}: no line on top that says its memory"
    assert gpus, f"{file}: no line on top that plans it"
    name = file.relative_to(ROOT)
    cells = [
        f"[{file.parent.name}/{file.stem}](../{name})",
        f"[{model['base']}](https://huggingface.co/{model['base']})",
        _method(recipe),
        _attention(model, recipe["objective"]),
        gpus[1],
        memory[1],
        ", ".join(_sources(text)),
    ]
    return "| " + " | ".join(cells) + " |"


def _method(recipe: dict[str, Any]) -> str:
    if recipe["objective"].get("name") == "ar":
        return "AR control"
    model = recipe["model"]
    return "QLoRA" if "quantization" in model else "LoRA" if "lora" in model else "full"


def _attention(model: dict[str, Any], objective: dict[str, Any]) -> str:
    if objective.get("name") == "ar":
        return "causal"
    return f"block {model['block_size']}" if model["attention"] == "block" else model["attention"]


def _sources(text: str) -> list[str]:
    papers = [f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"arXiv:([\d.]+\d)", text)]
    return papers + (["[ablations](ablations.md)"] if "docs/ablations.md" in text else [])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
