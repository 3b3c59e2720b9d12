"""What a recipe will cost before it starts: memory of each GPU for each ZeRO stage, the largest micro-batch, the time.

    adapt plan --config recipes/qwen3-0.6b/block.yaml --gpus 8 --gpu_memory 80
    adapt plan --config recipes/qwen3-0.6b/block.yaml --gpus 8 --tokens_per_s 9000 --train_tokens 1e9
    adapt plan --config recipes/qwen3-0.6b/block.yaml --model_config recipes/qwen3-0.6b/config.json --training.micro_batch_size 8

Only the model's config.json is read, from its folder, the Hub or --model_config; no weights are loaded and no memory is taken.
Activations and logits are those of the step itself, run on tensors without data (`activations.py`); weights, optimizer and
DeepSpeed's copies are counted (`zero.py`). GB are 1e9 bytes. Rows are taken to be full, of text that is all target:
the most that data.seq_len allows. Not seen: CUDA's context, NCCL, kernels' workspaces and fragmentation, for which
--reserve is kept free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..arguments import CommandParser
from ..files.model_folder import check_model_folder
from ..files.user_text import check_user_file
from ..settings.bounds import Bounds, Ranks, one_of
from ..training.recipe import Recipe, RecipeFile

if TYPE_CHECKING:
    from .planner import Planner
    from .zero import Zero

_Gigabytes = Annotated[float, Bounds(0, 1e6, low_is_open=True)]
_Rate = Annotated[float, Bounds(0, 1e12, low_is_open=True)]
_TokensOfRun = Annotated[float, Bounds(0, 1e18, low_is_open=True)]


def main(argv: list[str]) -> None:
    """The `adapt plan` command."""
    given, recipe = _read(argv)
    # Here, because torch takes seconds, and what is refused above needs none.
    from .measured_rate import benchmark_rate
    from .planner import Planner, model_config, plan, resolved
    from .table import plan_json, plan_table

    config = model_config(recipe, given.model_config, [Path(str(file)) for file in given.config or []])
    planner = Planner(resolved(recipe, config), config, gpus=given.gpus, device=given.device)
    memory = None if given.gpu_memory is None else given.gpu_memory * 1e9 * (1 - given.reserve)
    rows = plan(planner, memory=memory)
    rate, source = given.tokens_per_s, "given"
    if given.benchmark is not None:
        rate, source = benchmark_rate(given.benchmark, planner.recipe, planner.weights(False).count, given.device)
    cost = _cost(planner, rows[0].zero, rate, source, given.train_tokens)
    print(json.dumps(plan_json(rows, cost), indent=1) if given.json else plan_table(planner, rows, cost, given))


def _read(argv: list[str]) -> tuple[Any, Recipe]:
    """(options, recipe) of a command line; all that can be refused without the model's config is refused."""
    parser = CommandParser(prog="adapt plan", description=__doc__)
    parser.add_argument("--config", action=RecipeFile, help="a recipe; later arguments override it")
    parser.option("--gpus", type=Ranks, default=1, help="ranks of the run, over all nodes")
    parser.option(
        "--gpu_memory", type=_Gigabytes | None, default=None, help="GB of each; finds the largest micro-batch"
    )
    parser.option(
        "--reserve",
        type=Annotated[float, Bounds(0, 1, high_is_open=True)],
        default=0.1,
        help="share of gpu_memory that is kept free",
    )
    parser.option("--tokens_per_s", type=_Rate | None, default=None, help="clean tokens/s of one GPU")
    parser.option("--benchmark", type=Path | None, default=None, help="take it from a result of benchmarks/train.py")
    parser.option("--train_tokens", type=_TokensOfRun | None, default=None, help="clean tokens of the run")
    parser.option("--model_config", type=Path | None, default=None, help="config.json, if model.base is not at hand")
    parser.option("--device", type=str, default="cuda", help="cuda or cpu")
    parser.option("--json", type=bool, default=False, help="print JSON instead")
    parser.settings_of(Recipe)
    given = parser.parse_args(argv)
    made = parser.instantiate(given)
    _check(given)
    recipe = Recipe(made.model, made.data, made.training, made.noise, made.objective)
    recipe.training.accumulation_steps(given.gpus)
    if given.model_config is None and not recipe.model.base.endswith(".gguf"):
        check_model_folder(recipe.model.base, "model.base")
    return given, recipe


def _check(given: Any) -> None:
    one_of("device", given.device, ("cpu", "cuda"))
    if given.benchmark is not None and given.tokens_per_s is not None:
        raise ValueError("benchmark and tokens_per_s: both say how fast it is; give one of them")
    if given.benchmark is not None:
        check_user_file(given.benchmark, "benchmark", "a report of benchmarks/train.py")
    if given.model_config is not None and not given.model_config.is_dir():
        check_user_file(given.model_config, "model_config", "a model's config.json")
    if given.train_tokens is not None and given.benchmark is None and given.tokens_per_s is None:
        raise ValueError(f"train_tokens={given.train_tokens}: a time needs --tokens_per_s or --benchmark too")


def _cost(planner: Planner, zero: Zero, rate: float | None, source: str, train_tokens: float | None) -> dict[str, Any]:
    ours = planner.recipe.training
    timeline = planner.timeline(zero.stage, ours.micro_batch_size)
    clean = timeline.text_tokens // ours.micro_batch_size * ours.global_batch_size
    cost: dict[str, Any] = {
        "positions_per_step": ours.global_batch_size * planner.recipe.data.seq_len,
        "clean_tokens_per_step": clean,
        "accumulation_steps": ours.accumulation_steps(planner.gpus),
    }
    if rate is None:
        return cost
    cost |= {"clean_tokens_per_s_of_one": rate, "rate_source": source, "seconds_per_step": clean / rate / planner.gpus}
    tokens = train_tokens or (ours.num_steps and ours.num_steps * clean)
    return cost | ({"hours": tokens / rate / planner.gpus / 3600, "train_tokens": tokens} if tokens else {})
