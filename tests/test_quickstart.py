"""The quickstart's budget: what fits is done, what does not is cut and said; a second start keeps the plan."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adapt.files.marks import MARK
from adapt.training.recipe import parse_recipe
from adapt_eval.report.words import sentences
from adapt_recipes.quickstart import arms, budget, extraction, quickstart
from adapt_recipes.quickstart.arms import Outcome
from adapt_recipes.quickstart.budget import ALL_EXAMPLES, ALL_ITEMS, FEWEST_ITEMS, Plan, planned

SLOW, NATIVE = 95.0, 900.0  # positions/s: fp32 on two cores with AVX2; bf16 with AMX
RECIPES = Path(quickstart.__file__).parent


def seconds_of(plan: Plan, positions_per_s: float) -> float:
    """What training both arms and the comparison take at that rate, launches and the rest as planned."""
    training = plan.num_train * (budget._positions("control") + budget._positions("adapted"))
    comparison = (plan.num_items or 0) * budget._ITEM_POSITIONS + plan.speed_rounds * budget._ROUND_POSITIONS
    around = 60 + 2 * budget._AROUND_TRAINING + budget._AROUND_COMPARISON
    return around + (training + comparison) / positions_per_s


@pytest.mark.parametrize("minutes", [12, 20, 60])
@pytest.mark.parametrize("rate", [50.0, SLOW, 375.0, NATIVE])
def test_a_plan_fits_into_its_minutes(minutes: float, rate: float) -> None:
    plan = planned(minutes, rate, 60, "fp32")
    trained = seconds_of(plan, rate) - plan.speed_rounds * budget._ROUND_POSITIONS / rate
    plan = budget.with_comparison(plan, rate, trained - budget._AROUND_COMPARISON)
    assert seconds_of(plan, rate) <= 60 * minutes


def test_a_fast_machine_trains_on_everything_in_the_recipes_batches() -> None:
    plan = planned(20, NATIVE, 60, "bf16")
    assert plan.num_train == ALL_EXAMPLES
    for arm in ("control", "adapted"):
        recipe = yaml.safe_load((RECIPES / f"{arm}.yaml").read_text())
        assert plan.rows_per_step(arm) == recipe["training"]["global_batch_size"]
        assert budget._ROW[arm] == recipe["data"]["seq_len"]
    assert yaml.safe_load((RECIPES / "adapted.yaml").read_text())["training"]["num_epochs"] == budget._ADAPTED_PASSES
    assert budget.warnings(plan, {"control": Outcome(1.0, 60, NATIVE), "adapted": Outcome(1.2, 60, NATIVE)}) == []
    assert "20 minutes buy all 2,600 examples" in budget.in_words(plan)


def test_a_slow_machine_trains_on_fewer_in_smaller_batches_and_says_so() -> None:
    plan = planned(20, SLOW, 60, "fp32")
    assert 200 < plan.num_train < 600
    assert plan.rows_per_step("control") == plan.rows_per_step("adapted") == 2
    line = budget.in_words(plan)
    assert line.startswith("this CPU: fp32, 95 positions/s; 20 minutes buy ") or line.startswith("this GPU")
    more = int(line.split("--minutes ")[1].split()[0])
    assert planned(more, SLOW, 60, "fp32").num_train == ALL_EXAMPLES
    assert planned(more - 1, SLOW, 60, "fp32").num_train < ALL_EXAMPLES
    [cut] = budget.warnings(plan, {"control": Outcome(1.0, 60, SLOW), "adapted": Outcome(1.2, 60, SLOW)})
    assert f"both arms had {plan.num_train} of 2,600 examples to learn from" in cut


def test_a_clock_that_cut_an_arm_is_a_warning() -> None:
    plan = planned(20, SLOW, 60, "fp32")
    said = budget.warnings(plan, {"control": Outcome(0.8, 60, SLOW), "adapted": Outcome(1.2, 60, SLOW)})
    assert "ended the training of the control arm early, after 0.80 of 1.00 passes" in said[1]
    assert said[2] == "So the arms were not trained on the same tokens."


def test_too_few_minutes_are_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"minutes=2: buy 0 examples on this machine") as error:
        planned(2, SLOW, 60, "fp32")
    enough = int(str(error.value).split("--minutes ")[1].split()[0])
    assert planned(enough, SLOW, 60, "fp32").num_train >= budget.FEWEST_EXAMPLES


def test_a_machine_that_others_came_to_share_gets_a_smaller_rest() -> None:
    plan = planned(20, SLOW, 60, "fp32")
    alone, shared = (budget.with_adapted(plan, SLOW / k, 40 * k, 400 * k).adapted_minutes for k in (1, 1.5))
    assert alone is not None
    assert shared is not None
    assert 0 < shared < alone
    late = budget.with_comparison(plan, SLOW, 17 * 60)
    assert FEWEST_ITEMS <= (late.num_items or 0) < ALL_ITEMS


@pytest.mark.parametrize("arm", ["control", "adapted"])
def test_what_a_plan_overrides_is_a_recipe(arm: str) -> None:
    plan = budget.with_adapted(planned(20, SLOW, 60, "fp32"), SLOW, 40, 400)
    recipe = parse_recipe(["--config", str(RECIPES / f"{arm}.yaml"), *plan.overrides(arm)])
    assert recipe.training.accumulation_steps(1) == 1
    assert recipe.training.max_minutes is not None
    assert recipe.training.precision == "auto"


def test_a_second_start_keeps_the_plan_and_other_settings_are_refused(tmp_path: Path) -> None:
    settings = {"fast": False, "minutes": 20.0, "seed": 1}
    assert quickstart._kept_plan(tmp_path, settings) is None
    plan = planned(20, SLOW, 60, "fp32")
    quickstart._keep(tmp_path, settings, plan)
    assert quickstart._kept_plan(tmp_path, settings) == plan
    with pytest.raises(ValueError, match="add --fresh"):
        quickstart._kept_plan(tmp_path, settings | {"minutes": 40.0})


def test_fresh_refuses_a_folder_that_no_quickstart_made(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("thesis.txt", "data/train.jsonl", "quickstart.json"):
        (tmp_path / name).write_text("{}")
        for fresh in (["--fresh"], []):
            with pytest.raises(ValueError, match=r"is not a quickstart's folder|there is not of this run"):
                quickstart.main(["--fast", *fresh, "--out", str(tmp_path)])
        assert (tmp_path / name).read_text() == "{}"


def test_fresh_removes_what_a_quickstart_made_and_nothing_else(tmp_path: Path) -> None:
    quickstart._kept_plan(tmp_path, {})
    extraction.write_dataset(tmp_path / "data", train=2, test=1)
    quickstart._write_tiny_base(tmp_path / "base")
    mine = {tmp_path / "thesis.txt", tmp_path / "data" / "notes.md", tmp_path / "report" / "report.json"}
    (tmp_path / "report").mkdir()
    for path in mine:
        path.write_text("mine")
    quickstart._remove(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file() and path.name != MARK} == mine


@pytest.mark.parametrize("minutes", ["0", "-3"])
def test_minutes_that_are_none_are_refused(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes="):
        quickstart.main(["--minutes", minutes, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_report_begins_with_its_notice() -> None:
    report = {"quality": [], "speed": [], "provenance": {"notice": quickstart._FAST_NOTICE}}
    assert sentences(report)[0] == quickstart._FAST_NOTICE
    assert "its scores and its speeds mean nothing" in quickstart._FAST_NOTICE


def test_the_rate_of_a_run_is_that_of_its_second_half(tmp_path: Path) -> None:
    lines = [
        {"epoch": 0.25 * k, "elapsed_s": s, "tokens_seen": 100 * k, "tokens_per_s": 0.0}
        for k, s in ((1, 90.0), (2, 100.0), (3, 110.0), (4, 130.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert arms.outcome(tmp_path) == Outcome(1.0, 130.0, 200 / 30)


def test_what_was_launched_ends_with_us() -> None:
    before = signal.getsignal(signal.SIGTERM)
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    with pytest.raises(SystemExit) as stopped, arms._ended_with_us(process):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert process.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
