"""training.max_minutes: the run ends in time with its learning rate decayed, and is untouched where time is not scarce."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_fixtures import losses, recipe_argv, write_base, write_pairs

from adapt.training import time_limit
from adapt.training.engine.arguments import check_schedule
from adapt.training.recipe import parse_recipe
from adapt.training.sections import TrainingConfig
from adapt.training.time_limit import TimeLimit
from adapt.training.train import train
from adapt.training.watch.metrics import drop_lines_after


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("time_limit")
    return write_base(folder / "base"), write_pairs(folder / "data.jsonl")


def run(material: tuple[Path, Path], out: Path, **overrides: object) -> list[dict]:
    base, data = material
    argv = recipe_argv(base, data, out, objective__name="ar", training__num_steps=20, **overrides)
    train(parse_recipe(argv))
    return drop_lines_after(out / "metrics.jsonl", 1000)


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: Iterator[float]) -> None:
    """The clock of the limit goes on so many seconds from one look to the next; it is looked at once a step."""
    moments = itertools.accumulate(itertools.chain([0.0], seconds))

    def limit(minutes: float, num_steps: int, warmup_steps: int) -> TimeLimit:
        return TimeLimit(minutes, num_steps, warmup_steps, clock=lambda: next(moments))

    monkeypatch.setattr("adapt.training.trainer.TimeLimit", limit)


def test_a_run_with_time_enough_is_the_run_without_a_limit(material: tuple[Path, Path], tmp_path: Path) -> None:
    plain = run(material, tmp_path / "plain")
    limited = run(material, tmp_path / "limited", training__max_minutes=1e6)
    assert losses(tmp_path / "limited") == losses(tmp_path / "plain")
    assert [line["learning_rate"] for line in limited] == [line["learning_rate"] for line in plain]


def test_a_run_ends_in_time_with_its_rate_decayed(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # 0 s to the first step, which takes 30 (compiling), and 10 for each that follows: 9 steps end by 110 s, the 10th by 120.
    ticking(monkeypatch, itertools.chain([0.0, 30.0], itertools.repeat(10.0)))
    lines = run(material, tmp_path / "out", training__max_minutes=2, training__warmup_steps=2)
    assert len(lines) == 10
    rates = [line["learning_rate"] for line in lines]
    assert rates[:3] == [0.0, 0.5e-3, 1e-3]  # the warm-up is one of steps
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1e-3
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert "training.max_minutes=2: ended after 10 of 20 steps" in capfd.readouterr().err


def test_a_machine_that_slows_down_on_the_way_ends_sooner(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, itertools.chain([0.0], itertools.repeat(5.0, 8), itertools.repeat(20.0)))
    lines = run(material, tmp_path / "out", training__max_minutes=2)
    assert 10 <= len(lines) <= 12  # 40 s for 8 steps, 80 s for 4
    assert lines[-1]["learning_rate"] < 0.15e-3


def test_a_resumed_run_has_the_time_that_was_left(
    material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State:
        log_history = ({"step": 1, "elapsed_s": 40.0}, {"step": 2, "elapsed_s": 70.0}, {"train_runtime": 1.0})
        global_step, max_steps = 2, 20

    class Args:
        world_size = 1

    moments = iter([1000.0, 1000.0, 1010.0, 1020.0])
    limit = TimeLimit(2, 20, 1, clock=lambda: next(moments))
    limit.on_train_begin(Args, State, None)
    for State.global_step in (2, 3, 4):
        limit.on_step_begin(Args, State, None)
    assert limit.begun_at[-1] == (4, 90.0)
    assert State.max_steps == 4 + 3  # 30 s are left, a step takes 10


@pytest.mark.parametrize("value", ["0", "-1", ".inf", ".nan"])
def test_a_limit_that_is_none_is_refused(material: tuple[Path, Path], tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match=r"training\.max_minutes="):
        run(material, tmp_path / "out", training__max_minutes=value)
    assert not (tmp_path / "out").exists()


def test_a_schedule_that_cannot_be_paced_is_refused() -> None:
    ours = TrainingConfig("out", num_steps=10, max_minutes=1, lr_scheduler="greedy")
    with pytest.raises(ValueError, match=r"training.lr_scheduler=greedy: is no function of the step"):
        check_schedule(ours, 10, is_main=True)


def test_rank_zeros_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Args:
        world_size, device = 2, "cpu"

    monkeypatch.setattr(time_limit.dist, "broadcast", lambda number, source: number.fill_(7.0 + source))
    assert time_limit._on_all_ranks(3.0, Args) == 7.0
