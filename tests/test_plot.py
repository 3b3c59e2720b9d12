"""`adapt plot`: the curves that were reported, over each other, and one line for what cannot be drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from adapt import cli
from adapt.training.watch import figure, plot, run_lines


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, **more: float) -> dict:
    counts = {"tokens_seen": 200 * step, "clean_tokens_seen": 100 * step, "elapsed_s": 0.5 * step}
    return {"step": step, "nelbo": 4.0 / step, "loss": 5.0 / step, **counts, **more}


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/a and runs/b in the current folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "a", [line(step, nelbo=6.0 - step) for step in (1, 2, 3, 4)])
    write(tmp_path / "runs" / "b", [line(step, grad_norm=1.0) for step in (1, 2, 3)])


def drawn(monkeypatch: pytest.MonkeyPatch, *argv: str):
    """The axes of the figure that the command saves."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: kept.append(self) or save(self, *args, **how))
    assert cli.main(["plot", *argv]) == 0
    return kept[0].axes[0]


def test_curves_are_what_was_reported_against_clean_tokens(two, monkeypatch, capsys) -> None:
    axes = drawn(monkeypatch, "runs/a", "second=runs/b/metrics.jsonl")
    found = {curve.get_label(): (list(curve.get_xdata()), list(curve.get_ydata())) for curve in axes.lines}
    assert found == {"a": ([100, 200, 300, 400], [5, 4, 3, 2]), "second": ([100, 200, 300], [4, 2, 4 / 3])}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("clean tokens seen", "nelbo (nats/token)")
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["a", "second"]
    colours = [curve.get_color() for curve in axes.lines]
    assert len(set(colours)) == 2
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == [
        "run",
        "steps",
        "clean",
        "tokens",
        "last",
        "nelbo",
        "(nats/token)",
        "lowest",
        "clean",
        "tokens/s",
        "curve",
    ]
    assert table[1].split() == ["a", "4", "400", "2", "2", "200", "█▆▄▂"]
    assert table[2].split() == ["second", "3", "300", "1.3333", "1.3333", "200", "▆▂▁"]
    assert table[3] == "runs/a/nelbo.png"


@pytest.mark.parametrize(
    "x, values, label",
    [
        ("step", [1, 2, 3, 4], "optimizer steps"),
        ("tokens", [200, 400, 600, 800], "positions computed, padding and noisy copies included"),
        ("clean_tokens", [100, 200, 300, 400], "clean tokens seen"),
        ("time", [0.5, 1, 1.5, 2], "training time (s)"),
    ],
)
def test_x_is_a_choice(two, monkeypatch, x, values, label) -> None:
    axes = drawn(monkeypatch, "runs/a", "--x", x)
    assert (list(axes.lines[0].get_xdata()), axes.get_xlabel()) == (values, label)


@pytest.mark.parametrize(
    "x, largest, scale, unit",
    [
        ("clean_tokens", 1999, 1, ""),
        ("clean_tokens", 2e3, 1e3, "thousands"),
        ("tokens", 3e6, 1e6, "millions"),
        ("tokens", 2.5e9, 1e9, "billions"),
        ("time", 119, 1, "s"),
        ("time", 7199, 60, "min"),
        ("time", 7200, 3600, "h"),
    ],
)
def test_large_numbers_are_given_in_a_unit_that_the_axis_names(x, largest, scale, unit) -> None:
    assert figure._scale(x, largest) == (scale, unit)


def test_smoothing_is_a_debiased_exponential_mean_that_steps_over_nan() -> None:
    assert run_lines.smoothed([4.0, 2.0, math.nan, 1.0], 0.0)[:2] == [4, 2]
    found = run_lines.smoothed([4.0, 2.0, math.nan, 1.0], 0.5)
    assert found[0] == 4
    assert found[1] == pytest.approx((0.5 * 4 + 2) / 1.5)
    assert math.isnan(found[2])
    assert found[3] == pytest.approx((0.25 * 4 + 0.5 * 2 + 1) / 1.75)
    assert run_lines.smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)


def test_smoothed_curves_keep_what_was_reported_faintly_behind(two, monkeypatch) -> None:
    axes = drawn(monkeypatch, "runs/a", "--smooth", "0.9")
    faint, strong = axes.lines
    assert list(faint.get_ydata()) == [5, 4, 3, 2]
    assert list(strong.get_ydata()) == run_lines.smoothed([5, 4, 3, 2], 0.9)
    assert faint.get_alpha() < 0.5
    assert "smoothed, weight 0.9 per logged line" in axes.get_title(loc="right")


def test_the_table_names_the_unit_of_what_is_drawn_and_how_it_was_smoothed(two, capsys) -> None:
    assert cli.main(["plot", "runs/a", "--y", "loss", "--smooth", "0.5"]) == 0
    assert "  last loss (nats/token), smoothed 0.5  " in capsys.readouterr().out


def test_help_shows_choices_and_no_objects(capsys) -> None:
    with pytest.raises(SystemExit):
        plot.main(["--help"])
    shown = capsys.readouterr().out
    assert "--x {clean_tokens,step,time,tokens}" in shown
    assert " at 0x" not in shown


@pytest.mark.parametrize("name, magic", [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("sub/a.pdf", b"%PDF")])
def test_the_ending_chooses_the_format(two, tmp_path: Path, name: str, magic: bytes) -> None:
    (tmp_path / "sub").mkdir()
    assert cli.main(["plot", "runs/a", "runs/b", "--y", "loss", "--out", name]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert not list(tmp_path.rglob(".*incomplete"))


def test_a_png_has_300_dots_an_inch(two, tmp_path: Path) -> None:
    from PIL import Image

    assert cli.main(["plot", "runs/a"]) == 0
    with Image.open(tmp_path / "runs" / "a" / "nelbo.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert image.size == (1920, 1200)


def test_a_run_that_still_writes_its_last_line_is_drawn_up_to_it(two, tmp_path: Path, monkeypatch) -> None:
    with (tmp_path / "runs" / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "nel')
    assert list(drawn(monkeypatch, "runs/a", "--x", "step").lines[0].get_xdata()) == [1, 2, 3, 4]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for arm in ("prefix", "control"):
        write(tmp_path / arm / "out", [line(1)])
    assert cli.main(["plot", "prefix/out", "control/out"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:3]] == ["prefix/out", "control/out"]


def test_many_runs_have_a_colour_and_dash_each(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        write(tmp_path / f"run{i}", [line(1), line(2)])
    axes = drawn(monkeypatch, *(f"run{i}" for i in range(12)))
    assert len({(curve.get_color(), curve.get_linestyle()) for curve in axes.lines}) == 12


def test_a_sparkline_shows_stretches_between_the_common_bounds() -> None:
    assert plot.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 8) == "▁▂▃▄▅▆▇█"
    assert plot.sparkline([0, 0, 8, 8], 0, 8, width=2) == "▁█"
    assert plot.sparkline([1, math.nan], 1, 1) == "▁ "


@pytest.mark.parametrize(
    "argv, message",
    [
        (["runs/c"], "RUN=runs/c: no such file or folder; give a run's folder (training.output_dir) or its metrics.jsonl"),
        (["x=runs/c"], "RUN=runs/c: no such file or folder; give"),
        (["runs"], "RUN=runs: holds no metrics.jsonl; give a run's folder"),
        (["runs/a", "--y", "nelb"], "y=nelb: a does not report it; choose one of clean_tokens_seen, elapsed_s, loss, nelbo, step, "),
        (["runs/a", "runs/b", "--y", "grad_norm"], "y=grad_norm: a does not report it; choose one of clean_tokens_seen, elapsed_s"),
        (["runs/a", "other/strange.jsonl"], "y: the runs have no loss in common; choose one of step"),
        (["runs/a", "other/old", "--y", "loss"], "x=clean_tokens: old does not report clean_tokens_seen; choose one of step, tokens"),
        (["other/empty.jsonl"], "RUN=other/empty.jsonl: holds no line yet; wait for the run's first log"),
        (["other/broken.jsonl"], "RUN=other/broken.jsonl: line 1 is no JSON (Expecting value); is it a metrics.jsonl?"),
        (["other/data.jsonl"], "RUN=other/data.jsonl: has no step in any line; give the metrics.jsonl that a run wrote"),
        (["runs/a", "--out", "a.jpg"], "out=a.jpg: its ending must be one of pdf, png, svg, such as a.png"),
        (["runs/a", "--out", "none/a.png"], "out=none/a.png: no such folder none; make it first"),
        (["runs/a", "--smooth", "1"], "smooth=1.0: must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_in_one_line(two, tmp_path: Path, capsys, argv, message) -> None:
    write(tmp_path / "other" / "old", [{"step": 1, "loss": 2.0, "tokens_seen": 5}])
    (tmp_path / "other" / "strange.jsonl").write_text('{"step": 1, "colour": "red"}\n')
    (tmp_path / "other" / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "other" / "empty.jsonl").touch()
    (tmp_path / "other" / "broken.jsonl").write_text("nothing\n{}\n")
    assert cli.main(["plot", *argv]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"adapt plot: error: {message}")
    assert not list(tmp_path.glob("*.png"))


def test_what_a_run_writes_can_be_drawn(tmp_path: Path, monkeypatch, capsys) -> None:
    from training_fixtures import metrics, recipe_argv, write_base, write_pairs

    from adapt.training import train
    from adapt.training.recipe import parse_recipe

    base, data = write_base(tmp_path / "base"), write_pairs(tmp_path / "pairs.jsonl")
    out = train.train(parse_recipe(recipe_argv(base, data, tmp_path / "run"))).parent
    monkeypatch.chdir(tmp_path)
    for key in metrics(out)[0].keys() - {"step"}:
        assert cli.main(["plot", str(out), "--y", key]) == 0
        assert (out / f"{key}.png").stat().st_size > 10_000


def test_scores_on_held_out_rows_are_rings_in_the_colour_of_their_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        {"step": k, "clean_tokens_seen": k, "nelbo": 5 - k, **({"eval_nelbo": 4.5} if k > 1 else {})} for k in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve, rings = drawn(monkeypatch, "run=metrics.jsonl").lines
    assert (list(rings.get_xdata()), list(rings.get_ydata()), rings.get_label()) == (
        [2, 3],
        [4.5, 4.5],
        "run, held out",
    )
    assert curve.get_color() == rings.get_color()


def test_follow_prints_the_table_again_until_ctrl_c(two, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.yaml").touch()
    seconds: list[float] = []

    def sleep(time: float) -> None:
        seconds.append(time)
        if len(seconds) == 2:
            (tmp_path / "runs" / "begun" / "metrics.jsonl").write_text(
                (tmp_path / "runs" / "a" / "metrics.jsonl").read_text()
            )
        if len(seconds) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(plot.time, "sleep", sleep)
    assert cli.main(["plot", "runs/begun", "--follow"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["RUN=runs/begun: holds no line yet; wait for the run's first log"] * 2
    assert [line.split()[0] for line in said[2:]] == ["run", "begun"] * 2
    assert not list(tmp_path.rglob("*.png"))
