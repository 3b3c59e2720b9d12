"""What a run reports: counts that compare between objectives, a readable line or bar, and trackers that hold it all."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import select
import sqlite3
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import metrics, recipe_argv, tiny_tokenizer, write_base, write_pairs
from transformers import TrainerControl, TrainerState

from adapt import cli, progress
from adapt.training import train
from adapt.training.recipe import parse_recipe
from adapt.training.watch import metrics as reporting
from adapt.training.watch.progress import Progress

LINE = {
    **{"loss": 2.0, "nelbo": 1.5, "noised_nll": 3.25, "ar_nll": 0.875, "distill_kl": 0.25, "mask_ratio": 0.5},
    **{"grad_norm": 1.25, "learning_rate": 1e-4, "tokens_per_s": 4096.0, "clean_tokens_per_s": 2048.0},
    "peak_memory_gb": 3.5,
}
FIGURES = [
    *("nelbo=1.500", "ar_nll=0.875", "distill_kl=0.250", "tokens/s=2,048", "loss=2.000", "lr=1.0e-04"),
    "memory=3.5GB",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path):
    def run(name: str = "out", **overrides) -> Path:
        argv = recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / name, **overrides)
        return train.train(parse_recipe(argv)).parent

    return run


# --- counts

ANYWHERE = {"data__canvas_start": "anywhere", "data__canvas_length": 4}


@pytest.mark.parametrize(
    "objective",
    [
        {"objective__name": "ar"},
        {},
        {"data__canvas_length": 12},
        {"objective__views": 2, "objective__complementary": True, "data__seq_len": 64},
        {"model__attention": "bidirectional", "objective__views": 2, "data__seq_len": 64},
        {"objective__ar_weight": 0.5, "objective__views": 2, **ANYWHERE},
    ],
    ids=str,
)
def test_an_epoch_has_the_same_clean_tokens_under_every_objective(run, folder: Path, objective) -> None:
    one_epoch = {"training__num_steps": None, "training__num_epochs": 1, "training__logging_steps": 5}
    batch = {"training__global_batch_size": 1, "training__micro_batch_size": 1}
    last = metrics(run(**one_epoch, **batch, **objective))[-1]
    tokenizer, rows = tiny_tokenizer(), (folder / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(row) for row in rows]
    own = [len(tokenizer(pair["prompt"] + " " + pair["completion"])["input_ids"]) + 1 for pair in pairs]
    assert last["clean_tokens_seen"] == sum(own)
    assert last["tokens_seen"] >= sum(own)


def test_speeds_differ_by_padding_and_copies_and_belong_to_the_clock(run) -> None:
    lines = metrics(run(training__logging_steps=2))
    for before, line in itertools.pairwise(lines):
        seconds = line["elapsed_s"] - before["elapsed_s"]
        for rate, count in (("tokens_per_s", "tokens_seen"), ("clean_tokens_per_s", "clean_tokens_seen")):
            assert line[rate] * seconds == pytest.approx(line[count] - before[count])
        assert 0.8 < line["useful_tokens_per_s"] / line["tokens_per_s"] < 1  # rows are 92 % full
        assert line["useful_tokens_per_s"] == pytest.approx(line["clean_tokens_per_s"])  # one view: no copies
    doubled = metrics(run("views", objective__views=2, data__seq_len=64))[-1]  # of one time: tokens beside tokens
    assert doubled["clean_tokens_per_s"] / doubled["useful_tokens_per_s"] < 0.8


def test_ar_nll_is_reported_with_an_ar_loss_and_only_then(run) -> None:
    lines = metrics(run(objective__ar_weight=0.25, **ANYWHERE))
    for line in lines:
        assert line["loss"] == pytest.approx(line["nelbo"] + 0.25 * line["ar_nll"], rel=1e-5)
    assert "ar_nll" not in metrics(run("without", **ANYWHERE))[0]


def test_counts_are_summed_over_ranks_and_memory_is_the_largest_ranks(monkeypatch) -> None:
    def two_ranks(here: torch.Tensor) -> torch.Tensor:
        other = here.clone()
        other[:, -1] *= 3
        return torch.cat([here, other])

    now = [0.0]
    monkeypatch.setattr(reporting, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    running = reporting.RunningMetrics(torch.device("cpu"))
    running.add({name: torch.tensor(2.0) for name in reporting._SUMS if name != "num_tokens"}, num_tokens=7)
    running.end_step(torch.tensor(False))
    now[0] += 5
    running.leave_out(3)  # a sample
    line = running.drain(
        SimpleNamespace(gather=two_ranks), {"tokens_seen": 100, "clean_tokens_seen": 50, "elapsed_s": 9.0}
    )
    assert (line["tokens_seen"], line["clean_tokens_seen"], line["nelbo"]) == (114, 54, 1.0)
    assert (line["elapsed_s"], line["tokens_per_s"]) == (11.0, 7.0)
    assert line["peak_memory_gb"] == pytest.approx(3 * reporting._peak_memory_bytes() / 1e9, rel=0.1)
    now[0] += 1
    again = running.drain(SimpleNamespace(gather=two_ranks), line)
    assert again["tokens_seen"] == 114


# --- progress


def callback(max_steps: int = 200, is_main: bool = True):
    """(the state of a run, a function that calls an event of Progress as the Trainer does)."""
    callback, state = Progress(), TrainerState(max_steps=max_steps, is_world_process_zero=is_main)
    arguments, control = SimpleNamespace(), TrainerControl()

    def event(name: str, **more) -> None:
        getattr(callback, f"on_{name}")(arguments, state, control, **more)

    return state, event


def on_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal that wide is sent in two steps of a run."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    sent = b""
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        state, event = callback()
        event("train_begin")
        for step in (1, 2):
            state.global_step = step
            event("step_end")
            event("log", logs=LINE)
        event("train_end")
        terminal.flush()
        monkeypatch.undo()
        while select.select([ours], [], [], 0.2)[0]:
            sent += os.read(ours, 65536)
    os.close(ours)
    return sent.decode()


@pytest.mark.parametrize("columns, shown", [(200, 7), (120, 6), (80, 2), (60, 1), (40, 0)])
def test_a_narrow_terminal_drops_the_least_important_figures_and_wraps_no_line(monkeypatch, columns, shown) -> None:
    frames = [frame.rstrip() for frame in re.split(r"[\r\n]", on_terminal(columns, monkeypatch))]
    assert max(map(len, frames)) < columns
    last = [frame for frame in frames if re.match("train: .*%", frame)][-1]
    assert re.match(r"train:   1%\|.{10}\| 2/200 eta ", last)
    assert [figure for figure in FIGURES if f" {figure}" in last] == FIGURES[:shown]


@pytest.mark.parametrize("columns, ranks", [(200, 2), (0, 1)])
def test_ranks_that_share_a_terminal_and_one_without_a_size_draw_no_bar(monkeypatch, columns, ranks) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    sent = on_terminal(columns, monkeypatch)
    assert "nelbo=1.500" in sent
    assert "|" not in sent
    lines = sent.replace("\r", "").split("\n")
    assert [line[:12] for line in lines if "%" in line] == ["train:   0% ", "train:   1% "]


def test_a_log_file_gets_a_line_every_ten_seconds_the_first_and_the_last(monkeypatch, capsys) -> None:
    clock = [0.0]
    monkeypatch.setenv("ADAPT_PROGRESS_SECONDS", "10")
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    state, event = callback(max_steps=100)
    event("train_begin")
    for step in range(1, 101):
        clock[0] += 0.7
        state.global_step = step
        event("step_end")
        if step % 5 == 0 or step == 1:
            event("log", logs=LINE)
    event("train_end")
    first, legend, *later = capsys.readouterr().err.splitlines()
    lines = [first, *later]
    assert [figure.split(" = ")[0] for figure in legend.removeprefix("train: ").split("; ")] == [
        figure.split("=")[0] for figure in FIGURES
    ]
    assert [int(re.findall(r" (\d+)/100 ", line)[0]) for line in lines] == [1, 16, 31, 46, 61, 76, 91, 100]
    assert lines[1] == "train:  16% 16/100 eta 00:58 " + " ".join(FIGURES)
    assert re.fullmatch(r"train: 100% 100/100 eta 00:00 .*", lines[-1])


def test_other_ranks_say_nothing(capsys) -> None:
    state, event = callback(is_main=False)
    event("train_begin")
    state.global_step = 1
    event("log", logs=LINE)
    event("train_end")
    assert capsys.readouterr().err == ""


def test_progress_shows_noised_nll_where_nelbo_is_no_bound(run, capsys) -> None:
    out = run(noise__t_min=0.3, objective__weight="uniform", training__num_steps=1)
    assert "nelbo" not in metrics(out)[0]
    assert f" noised_nll={metrics(out)[0]['noised_nll']:.3f} " in capsys.readouterr().err


# --- trackers

TRACKED = {"training__num_steps": 4, "training__sample_steps": 4, "training__sample_prompt": "the cat"}


def sample(out: Path) -> str:
    line = json.loads((out / "samples.jsonl").read_text())
    return f"{line['prompt']} → {line['text']}"


def test_tensorboard_holds_the_figures_the_recipe_and_the_samples(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(training__report_to=["tensorboard"], **TRACKED)
    (events,) = (out / "runs").glob("*/events*")
    board = EventAccumulator(str(events)).Reload()
    for name in metrics(out)[0].keys() - {"step", "epoch"}:
        found = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in metrics(out)]

    def text(tag: str) -> str:
        (event,) = board.Tensors(f"{tag}/text_summary")
        return event.tensor_proto.string_val[0].decode()

    assert text("train/sample") == sample(out)
    assert "    sample_prompt: the cat\n" in text("recipe")


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_offline_holds_the_figures_the_recipe_and_the_samples(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("first", "second"):  # in one process: each is a run of its own
        out = run(name, training__report_to=["wandb"], **TRACKED)
        (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
        record = file.read_bytes()
        for line in metrics(out):
            assert all(
                json.dumps(line[key]).encode() in record for key in ("nelbo", "clean_tokens_per_s", "mask_ratio")
            )
        assert b"train/nelbo" in record
        assert b'"sample_prompt":"the cat"' in record
        assert sample(out).encode() in record.replace(b"\\u2192", "→".encode())
        assert b"adapt-dlm" in record


@pytest.mark.filterwarnings("ignore")  # trackio's own
def test_trackio_offline_holds_the_figures_the_recipe_and_the_samples(run, tmp_path, monkeypatch) -> None:
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    out = run(training__report_to=["trackio"], **TRACKED)
    with sqlite3.connect(tmp_path / "trackio" / "adapt-dlm.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
        ((config,),) = database.execute("SELECT config FROM configs")
    figures = [row for row in rows if "train/nelbo" in row]
    assert [row["train/nelbo"] for row in figures] == [line["nelbo"] for line in metrics(out)]
    assert [row["train/sample"] for row in rows if "train/sample" in row] == [sample(out)]
    assert json.loads(config)["recipe"]["training"]["sample_prompt"] == "the cat"


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_costs_one_line(folder, tmp_path, monkeypatch, capsys, tracker) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", tmp_path / "out", training__report_to=[tracker])
    assert cli.main(["train", *argv]) == 1
    error = capsys.readouterr().err
    assert (
        error == f"adapt train: error: needs {tracker}, which is not installed; run: pip install 'adapt-dlm[track]'\n"
    )
    assert not (tmp_path / "out").exists()
