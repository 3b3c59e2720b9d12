"""How fast work like a recipe's was measured to be: from a report of benchmarks/train.py.

A rate is taken only from the same work on the same kind of device: objective, attention, checkpointing, adapters and precision
agree, and model and rows are of about the recipe's size. It is not scaled to another size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from ..files.user_text import user_json
from ..settings.bounds import Bounds, Tokens, check_settings
from ..training.recipe import Recipe

SAME_SIZE = 1.1
"""factor between the parameters of two models that are taken for one"""
SAME_ROWS = 2.0
"""factor between two lengths of rows; from 1,024 to 2,048 tokens a 5M model lost 11 % of its rate, with block attention 21 %
(benchmarks/results/length-cpu.json), and attention's share falls with size"""
_PLAIN = "AR by transformers.Trainer"


@dataclass(frozen=True)
class Measured:
    """One arm of a report on one model and one workload."""

    clean_tokens_per_s: Annotated[float, Bounds(0, 1e12, low_is_open=True)]
    """of one process, the median over rounds"""
    work: str
    parameters: Annotated[int, Bounds(1, 10**15)]
    row: Tokens
    """tokens of a packed row, all copies counted"""
    shortest: Tokens
    longest: Tokens
    """tokens of a document"""

    def __post_init__(self) -> None:
        check_settings(self, "")

    def __str__(self) -> str:
        return f"{self.work} at {self.parameters / 1e6:.0f}M on rows of {self.row}"


def benchmark_rate(path: Path, recipe: Recipe, parameters: int, device: str) -> tuple[float, str]:
    """(clean tokens/s of one process, where and on what it was measured) for work like the recipe's.

    Of several that fit, the nearest in rows and model. ValueError if none does, with what the report holds.
    """
    rates, is_gpu, hardware = _read(path)
    row, work = recipe.data.seq_len, work_of(_settings(recipe))
    fitting = [
        rate
        for rate in rates
        if rate.work == work
        and _factor(rate.parameters, parameters) <= SAME_SIZE
        and _factor(rate.row, row) <= SAME_ROWS
    ]
    if not fitting:
        raise ValueError(
            f"benchmark={path}: has no {work} at {parameters / 1e6:.0f}M on rows of about {row} (found: {_found(rates)}); measure it "
            "with benchmarks/train.py, or give --tokens_per_s instead"
        )
    if is_gpu != (device == "cuda"):
        other = "--device cpu" if device == "cuda" else "--device cuda"
        raise ValueError(
            f"benchmark={path}: was measured on {hardware}, and the plan is for device={device}; add {other}, or give a report "
            "from such a machine, or --tokens_per_s"
        )

    def distance(rate: Measured) -> tuple[float, int]:
        size = _factor(rate.row, row) * _factor(rate.parameters, parameters)
        return size, rate.longest - rate.shortest  # the plan's rows are full

    best = min(fitting, key=distance)
    of_row = "" if best.row == row else f", the recipe's are {row}"
    return best.clean_tokens_per_s, f"{best}{of_row}, measured on {hardware}"


def work_of(settings: dict[str, Any]) -> str:
    """What decides about the speed of a model of given size, in words. settings: dotted keys of a recipe."""
    given = settings.get
    if given("objective.name") == "ar":
        words = ["AR"]
    else:
        attention = given("model.attention") or "prefix"
        views = given("objective.views", 1)
        words = [f"block {given('model.block_size')}" if attention == "block" else attention]
        words += ["AR loss"] * bool(given("objective.ar_weight")) + ["distillation"] * bool(
            given("objective.distill_weight")
        )
        words += [f"{views} views"] * (views > 1)
    words += ["LoRA"] * any(value for key, value in settings.items() if key.startswith("model.lora"))
    words += [given("model.quantization")] * bool(given("model.quantization"))
    words += ["checkpointing"] * bool(given("model.gradient_checkpointing"))
    words += ["compiled"] * bool(given("model.torch_compile"))
    words += ["fp32"] * (given("training.precision") == "fp32")
    return " + ".join(words)


def _settings(recipe: Recipe) -> dict[str, Any]:
    sections = asdict(recipe).items()
    return {f"{section}.{key}": value for section, fields in sections for key, value in fields.items()}


def _read(path: Path) -> tuple[list[Measured], bool, str]:
    """(the rates, whether on a GPU, the hardware and the day)."""
    report = user_json(path, "benchmark", "a report of benchmarks/train.py")
    try:
        about = report["provenance"]
        rates = []
        for result in report["results"]:
            lengths = result["workload"]["shortest"], result["workload"]["longest"]
            for name, summary in result["summary"].items():
                settings = result["arms"][name]["settings"]
                copies = 1 if settings is None else _copies(settings)
                rate = summary["clean_tokens_per_s"]["median"]
                work = _PLAIN if settings is None else work_of(settings)
                rates.append(Measured(rate, work, result["sizes"]["parameters"], copies * lengths[1], *lengths))
        on = about["gpu"] or f"{about['cpu']}, {about['threads']} threads"
        return rates, about["gpu"] is not None, f"{on}, {about['date'][:10]}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"benchmark={path}: not written by benchmarks/train.py ({type(error).__name__}: {error})"
        ) from error


def _found(rates: list[Measured]) -> str:
    parts = []
    for work in dict.fromkeys(rate.work for rate in rates):
        alike = [rate for rate in rates if rate.work == work]
        sizes = ", ".join(dict.fromkeys(f"{size / 1e6:.0f}M" for size in sorted(r.parameters for r in alike)))
        parts.append(f"{work} at {sizes} on rows of {', '.join(map(str, sorted({r.row for r in alike})))}")
    return "; ".join(parts) or "nothing"


def _copies(settings: dict[str, Any]) -> int:
    """Rows that benchmarks/arms.py makes as long as a document's noisy views, with a clean copy for block attention."""
    return int(settings.get("objective.views", 1)) + (settings.get("model.attention") == "block")


def _factor(a: float, b: float) -> float:
    return math.exp(abs(math.log(a / b)))
