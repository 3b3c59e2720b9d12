"""The whole path once, for real, on a laptop CPU: a causal LM becomes a diffusion LM and is compared with the original.

    adapt quickstart                     # SmolLM2-135M-Instruct, in 20 minutes on 2 cores; a GPU is used if there is one
    adapt quickstart --minutes 60        # more examples where the machine does not manage all 2,600 in 20
    adapt quickstart --fast              # the same on a tiny random model, under 2 minutes: proves the path, not the method

The task is structured extraction: a sentence or two in, a JSON object out. Three arms stand in the report: the original with
examples in its prompt; the original fine-tuned autoregressively on the training data (control); and the adapted model, which
is the control converted to a diffusion LM and trained on the same data. Recipes: control.yaml and adapted.yaml. How many examples
the minutes buy on this machine is measured first (budget.py). The same command, started again, goes on where it was.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from adapt import progress
from adapt.arguments import CommandParser
from adapt.decoding.settings import SamplerConfig
from adapt.files import marks
from adapt.files.outputs import check_adoptable, check_folder, locked
from adapt.files.user_text import user_json
from adapt.settings.bounds import Minutes, Seed

from . import budget
from .arms import outcome, train
from .budget import Plan
from .extraction import TASK, write_dataset
from .smollm2 import fetch_smollm2

SAMPLER = SamplerConfig(threshold=0.95, order="left_to_right", canvas_length=8)
_FAST_ITEMS = 16
_FAST = Plan(num_train=200, num_items=_FAST_ITEMS, speed_rounds=1)
_FAST_OVERRIDES = ("--training.num_epochs", "1", "--model.torch_compile", "false")
_FAST_NOTICE = (
    "This run proves the path and not the method: its model is random and tiny (0.1M parameters), so its scores and its "
    "speeds mean nothing."
)
_PLAN = "quickstart.json"
_MADE = ("base", "data", "control", "adapted-init", "adapted", "report")


def quickstart(out: Path, *, fast: bool = False, minutes: float = 20.0, seed: int = 1) -> dict:
    """Runs all steps into the folder `out`, which a later run continues or reuses, and returns the report."""
    # Here, because torch takes seconds, and what `main` refuses needs none.
    from adapt.conversion.convert import convert
    from adapt.conversion.gguf import gguf_to_folder

    started = time.perf_counter()

    def spent() -> float:
        return time.perf_counter() - started

    def step(number: int, what: str) -> None:
        progress.say(f"\n== {number}/6 {what}   [{int(spent()) // 60}:{int(spent()) % 60:02d}]")

    settings = {"fast": fast, "minutes": None if fast else minutes, "seed": seed}
    plan = _kept_plan(out, settings)
    if fast:
        progress.say(f"note: {_FAST_NOTICE}")

    step(1, "the base model")
    base = out / "base"
    if not (base / "config.json").is_file():
        _write_tiny_base(base) if fast else gguf_to_folder(fetch_smollm2(), base)
    if plan is None:
        plan = _FAST if fast else _measured_plan(base, minutes, spent)
        _keep(out, settings, plan)
    if not fast:
        progress.say(budget.in_words(plan))

    num_test = _FAST_ITEMS if fast else budget.ALL_ITEMS
    step(2, f"the data: {plan.num_train:,} training and {num_test} test examples of sentence -> JSON")
    data = write_dataset(out / "data", train=plan.num_train, test=num_test, seed=seed)

    step(3, "train the control arm: the original, fine-tuned autoregressively")
    begun = spent()
    control = _train("control", base, out, plan, seed, fast)
    trained = {"control": outcome(out / "control")}
    around = max(spent() - begun - trained["control"].training_seconds, 0.0)

    step(4, "convert the control: prefix attention, a mask token")
    init = out / "adapted-init"
    if not (init / "config.json").is_file():
        convert(control, init, attention="prefix", shift_logits=True)

    if plan.adapted_minutes is None and not fast:
        plan = budget.with_adapted(plan, trained["control"].positions_per_s, around, spent())
        _keep(out, settings, plan)
    step(5, "train the adapted arm: masked diffusion on the same data")
    adapted = _train("adapted", init, out, plan, seed, fast)
    trained["adapted"] = outcome(out / "adapted")

    if plan.num_items is None:
        plan = budget.with_comparison(plan, trained["adapted"].positions_per_s, spent())
        _keep(out, settings, plan)
    step(6, f"compare: original, control and adapted, quality on {plan.num_items} items and speed")
    # adapt_eval sits beside adapt, and brings lm-eval with it: only this step needs it.
    comparison = importlib.import_module("adapt_eval.compare")
    report = comparison.compare(
        base,
        adapted,
        control=control,
        tasks=[TASK],
        include_path=data,
        out=out / "report",
        limit=None if fast or plan.num_items == budget.ALL_ITEMS else plan.num_items,
        base_num_fewshot=1 if fast else 4,
        num_fewshot=0,
        batch_size=8 if fast else 32,  # a forward on a CPU costs little more for 32 rows than for 8
        sampler=SAMPLER,
        speed_prompts=4 if fast else 8,
        speed_repeats=plan.speed_rounds,
        speed_until=None if fast else time.monotonic() + 60 * minutes - spent(),
        seed=seed,
        overwrite=True,
        notice=_FAST_NOTICE if fast else None,
        notes=[] if fast else budget.warnings(plan, trained),
        command="adapt quickstart" + (" --fast" if fast else f" --minutes {minutes:g}"),
    )
    comparison.announce(report, out / "report")
    print(f"everything is in {out}; it took {int(spent()) // 60} min {int(spent()) % 60} s")
    return report


def _kept_plan(out: Path, settings: dict) -> Plan | None:
    """The plan that a quickstart in `out` made; ValueError if it was one with other settings, whose parts cannot be reused, or if
    there is something in the way that no quickstart wrote."""
    check_adoptable(out, "out")
    marks.check_ours(out, (*_MADE, _PLAN), "out")
    marks.adopt(out)
    if not (out / _PLAN).is_file():
        marks.write(out, _PLAN, json.dumps(settings) + "\n")
        return None
    wanted = "what a quickstart wrote there, add --fresh, or choose another --out"
    found = user_json(out / _PLAN, "out", wanted)
    plan = found.pop("plan", None)
    if found != settings:
        raise ValueError(
            f"out={out}: holds a quickstart with {found}, not {settings}; add --fresh, or choose another --out"
        )
    try:
        return None if plan is None else Plan(**plan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"out={out / _PLAN}: is not what a quickstart wrote ({error}); give {wanted}") from None


def _keep(out: Path, settings: dict, plan: Plan) -> None:
    marks.write(out, _PLAN, json.dumps(settings | {"plan": dataclasses.asdict(plan)}, indent=2) + "\n")


def _measured_plan(base: Path, minutes: float, spent: Callable[[], float]) -> Plan:
    from adapt.model.precision import DTYPES, compute_dtype_of

    dtype = compute_dtype_of()
    with progress.doing("measuring how fast this machine trains"):
        rate = budget.measured_rate(base, dtype)
    precision = {DTYPES["bfloat16"]: "bf16", DTYPES["float32"]: "fp32"}[dtype]
    return budget.planned(minutes, rate, spent(), precision)


def _write_tiny_base(base: Path) -> None:
    """The tokenizer is trained on the task's own text."""
    from .tiny_base import write_tiny_base

    text = (write_dataset(base.with_name("data"), train=500, test=1, seed=0) / "train.jsonl").read_text()
    write_tiny_base(base, text)


def _train(arm: str, init: Path, out: Path, plan: Plan, seed: int, fast: bool) -> Path:
    overrides: Sequence[str] = ("--training.seed", str(seed))
    if fast:
        overrides += _FAST_OVERRIDES
    else:
        overrides += plan.overrides(arm)
    return train(arm, init, out / "data" / "train.jsonl", out / arm, overrides)


def main(argv: list[str]) -> None:
    """The `adapt quickstart` command."""
    parser = CommandParser(prog="adapt quickstart", description=__doc__)
    parser.option("--out", type=str | None, default=None, help="folder for everything; default quickstart[-fast]")
    parser.option("--minutes", type=Minutes, default=20.0, help="that everything may take, the comparison included")
    parser.add_argument("--fast", action="store_true", help="a tiny random model instead of SmolLM2")
    parser.option("--seed", type=Seed, default=1, help="keys data, noise and sampling")
    parser.add_argument("--fresh", action="store_true", help="start again instead of reusing what an earlier run left")
    arguments = parser.parse_args(argv)
    default = "quickstart-fast" if arguments.fast else "quickstart"
    out = check_folder(default if arguments.out is None else arguments.out, "out")
    if arguments.fresh and out.exists():
        _remove(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"out={out}"):
        quickstart(out, fast=arguments.fast, minutes=arguments.minutes, seed=arguments.seed)


def _remove(out: Path) -> None:
    """What a quickstart has written into `out`, and the folder if nothing else is in it."""
    if any(out.iterdir()) and not marks.is_as_written(out, _PLAN):
        raise ValueError(f"out={out}: is not a quickstart's folder, so --fresh does not remove it")
    with locked(out / ".lock", f"out={out}"):
        for name in _MADE:
            marks.remove(out / name)
    marks.remove_listed(out)
    if left := [path.name for path in out.iterdir()] if out.exists() else []:
        progress.say(f"--fresh left what no quickstart wrote in {out}: {', '.join(sorted(left))}")
