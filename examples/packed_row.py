"""One packed row of a run, token by token, as the model reads it.

python examples/packed_row.py runs/guide        # row 0; python examples/packed_row.py runs/guide 5: row 5
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from adapt import DiffusionSpec
from adapt.training.data.examples import load_examples
from adapt.training.data.run_rows import packed_rows
from adapt.training.data.views import Canvases
from adapt.training.recipe import parse_recipe

run, number = Path(sys.argv[1]), int([*sys.argv, "0"][2])
recipe = parse_recipe(["--config", str(run / "config.yaml")])
checkpoint = run / "converted" if (run / "converted").exists() else Path(recipe.model.base)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
data = recipe.data
canvases = Canvases(
    DiffusionSpec.of(AutoConfig.from_pretrained(checkpoint), checkpoint),
    recipe.noise,
    recipe.objective,
    data.canvas_length,
    data.canvas_start,
    tokenizer.eos_token_id,
    recipe.training.seed,
    data.seq_len,
    len(tokenizer),
)
examples = load_examples(data, tokenizer, piece_length=canvases.piece_length(data.seq_len))
row = packed_rows(recipe, canvases, examples)[0][number]

print(f"{'place':>5} {'document':>8} {'view':>4} {'position':>8}  {'x0':<16} {'xt':<16} {'t':>5} {'weight':>6}")
for i, (x0, xt) in enumerate(zip(row["x0"].tolist(), row["xt"].tolist(), strict=True)):
    clean, noised = (repr(tokenizer.decode([token]))[1:-1] for token in (x0, xt))
    weight = float(row["loss_weight"][i]) if row["is_noised"][i] else 0.0
    document, view, position = (int(row[key][i]) for key in ("document", "view", "position"))
    print(f"{i:5} {document:8} {view:4} {position:8}  {clean:<16} {noised:<16} {row['t'][i]:5.2f} {weight:6.2f}")
