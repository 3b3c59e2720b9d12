"""The report: what it says is computed from the numbers, and its files are complete or not there."""

from __future__ import annotations

import copy
import json
import re

import pytest

from adapt_eval.report import page as report_module
from adapt_eval.report.page import write_report
from adapt_eval.report.words import headline, number, primary, speed_ratio, terminal_table


def cell(value, low, high):
    return {"value": value, "stderr": 0.03, "ci95": [low, high]}


def speed(arm, size, rates, **more):
    return {
        "arm": arm, "sampler": "greedy", "batch_size": size, "prompt_tokens": 30.0, "new_tokens": 20.0,
        "tokens_per_s": sorted(rates)[len(rates) // 2], "latency_p50_s": 0.2, "latency_p95_s": 0.3, "ttft_s": None,
        "nfe": 20.0, "tpf": 1.0, "peak_memory_bytes": 3 * 2**20, "runs": len(rates), "tokens_per_s_runs": rates, **more,
    }  # fmt: skip


@pytest.fixture
def report():
    return {
        "provenance": {"command": "adapt compare <x>", "seed": 7, "versions": {"torch": "2.13.0"}},
        "quality": [
            {"task": "lam", "metric": "loglikelihood,none", "higher_is_better": True, "n": 50, "control": None,
             "base": cell(-2.0, -2.5, -1.5), "adapted": cell(-3.0, -3.5, -2.5), "delta": -1.0, "ci95": [-1.2, -0.8],
             "p_value": 0.0002, "vs_control": None},
            {"task": "shop", "metric": "exact_match,none", "higher_is_better": True, "n": 200,
             "base": cell(0.4, 0.33, 0.47), "adapted": cell(0.62, 0.55, 0.68), "control": cell(0.65, 0.58, 0.71),
             "delta": 0.22, "ci95": [0.14, 0.30], "p_value": 1e-6,
             "vs_control": {"delta": -0.03, "ci95": [-0.08, 0.02], "p_value": 0.31}},
        ],
        "likelihood": [],
        "speed": [
            speed("base", 8, [100.0]), speed("base", 1, [10.0, 20.0, 30.0]), speed("control", 1, [20.0, 20.0, 20.0]),
            speed("adapted", 1, [30.0, 40.0, 45.0], sampler="threshold=0.9", tpf=3.25, nfe=6.0),
            speed("adapted", 8, [150.0]),
        ],
        "pareto": [],
        "warnings": ["limit=200: only the first <200> items."],
    }  # fmt: skip


def test_headline_says_what_the_numbers_say(report):
    said = headline(report)
    assert "On shop (exact_match, n = 200) the adapted model scores 62.0 %" in said
    assert "the original 40.0 % and the control 65.0 %" in said
    assert "+22.0 points (95 % interval +14.0 to +30.0) against the original" in said
    assert "-3.0 points (95 % interval -8.0 to +2.0) against the control" in said
    assert "show it better than the original and do not tell it from the control" in said
    assert "At batch size 1 it writes 40.0 tokens/s, 2.00 times the original's and 2.00 times the control's" in said
    assert "3.25 tokens per forward" in said


def test_headline_turns_with_the_direction_of_the_metric(report):
    row = report["quality"][0] | {"metric": "bits_per_byte,none", "higher_is_better": False}
    assert "show it better than the original" in headline(report | {"quality": [row]})


def test_speed_ratio_pairs_the_rounds(report):
    assert speed_ratio(report, "base") == (2.0, 1.5, 3.0)  # 45/30, 40/20, 30/10
    assert speed_ratio(report, "base", 8) == (1.5, 1.5, 1.5)
    assert speed_ratio(report, "control", 8) is None


def test_headline_is_about_exact_match_before_other_metrics(report):
    assert primary(report)["task"] == "shop"
    assert primary(report | {"quality": []}) is None


def test_terminal_table_has_every_arm_with_interval_and_ratios(report):
    lines = terminal_table(report).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["original", "control", "adapted"]
    assert re.search(r"adapted +62\.0 % \[55\.0, 68\.0\] +40\.0 +6\.00 +3\.25 +2\.00 +2\.00$", lines[4])


@pytest.mark.parametrize(
    ("value", "words"), [(0.04567, "0.0457"), (12345.6, "12,346"), (98.76, "98.8"), (0, "0"), (None, "–")]
)
def test_numbers_have_three_digits(value, words):
    assert number(value) == words


def test_files_hold_the_same_numbers_and_html_needs_nothing_from_outside(report, tmp_path):
    samples = {"adapted": {"shop": [{"doc_id": 0, "filter": "none", "arguments": [["Q <b>", {}]], "target": "T",
                                     "resps": [["answer"]], "exact_match": 1.0}]}}  # fmt: skip
    out = write_report(report, tmp_path / "out", samples=samples)
    assert json.loads((out / "report.json").read_text()) == report
    markdown, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    for text in (markdown, html):
        assert "62.0 %" in text
        assert "points" in text
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", html)
    assert "http" not in re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", html)
    assert html.count("data:image/svg+xml;base64,") == 2  # quality and speed; no curve without points
    assert "Q &lt;b&gt;" in html
    assert "only the first &lt;200&gt; items" in html
    assert json.loads((out / "samples/adapted/shop.jsonl").read_text())["resps"] == [["answer"]]


def test_markdown_tables_are_rectangular(report):
    markdown = report_module.render_markdown(report)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert len(re.findall(r"(?:^\|.*\n)+", markdown, re.M)) == 2


def test_report_without_control_speed_or_quality_is_still_written(report, tmp_path):
    bare = report | {"quality": [], "speed": [], "warnings": []}
    out = write_report(bare, tmp_path / "out")
    assert "Nothing was measured" in (out / "report.md").read_text()


def test_not_a_number_becomes_null(report, tmp_path):
    report["speed"][0]["ttft_s"] = float("nan")
    out = write_report(report, tmp_path / "out")
    assert json.loads((out / "report.json").read_text())["speed"][0]["ttft_s"] is None


def test_an_existing_folder_is_refused_and_kept(report, tmp_path):
    out = write_report(report, tmp_path / "out")
    before = (out / "report.json").read_bytes()
    with pytest.raises(ValueError, match=r"out=.*exists already.*--overwrite"):
        write_report(report | {"warnings": []}, out)
    assert (out / "report.json").read_bytes() == before
    write_report(report | {"warnings": []}, out, overwrite=True)
    assert json.loads((out / "report.json").read_text())["warnings"] == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_leaves_a_folder_alone_that_is_no_report(report, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is no report that we wrote"):
        write_report(report, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_failure_leaves_no_half_written_folder_and_what_was_measured_is_kept(report, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(report_module, "render_html", fail)
    with pytest.raises(OSError, match=r"out=.*: could not be written \(no ink\); what was measured is in ") as failed:
        write_report(report, tmp_path / "out", samples={"base": {"task": [{"doc_id": 1}]}})
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    (kept,) = (tmp_path / "temporary").iterdir()
    assert str(kept) in str(failed.value)
    assert (kept / "samples" / "base" / "task.jsonl").is_file()
    monkeypatch.undo()
    write_report(json.loads((kept / "report.json").read_text()), tmp_path / "again")


def test_overwrite_takes_no_notes_along_and_no_page_that_was_edited(report, tmp_path):
    out = write_report(report, tmp_path / "out", samples={"base": {"one": [{"doc_id": 1}]}})
    (out / "notes.md").write_text("mine")
    (out / "samples" / "notes.md").write_text("mine")
    write_report(report, out, samples={"base": {"two": [{"doc_id": 1}]}}, overwrite=True)
    assert (out / "notes.md").read_text() == (out / "samples" / "notes.md").read_text() == "mine"
    assert [path.name for path in (out / "samples" / "base").iterdir()] == ["two.jsonl"]
    (out / "report.md").write_text("my conclusions")
    with pytest.raises(ValueError, match=r"report\.md there is not of this run, or was changed since"):
        write_report(report, out, overwrite=True)
    assert (out / "report.md").read_text() == "my conclusions"


def test_a_section_that_is_missing_is_named(report, tmp_path):
    short = copy.copy(report)
    del short["likelihood"]
    with pytest.raises(ValueError, match="lacks likelihood"):
        write_report(short, tmp_path / "out")
