"""The whole comparison on tiny arms, and the ways in which it refuses to start."""

from __future__ import annotations

import json
import shlex

import pytest

from adapt.cli import main as adapt_main
from adapt.model.precision import compute_dtype_of
from adapt_eval.compare import compare
from adapt_eval.report.caveats import caveats

QUALITY_KEYS = {"task", "metric", "higher_is_better", "n", "base", "adapted", "control", "delta", "ci95", "p_value"}


@pytest.fixture(scope="module")
def report(arms, tmp_path_factory):
    return compare(
        arms.base, arms.adapted, control=arms.control, tasks=["tiny_shout", "tiny_last", "tiny_choice"],
        include_path=arms.tasks, out=tmp_path_factory.mktemp("compare") / "out", limit=6, base_num_fewshot=1,
        mc_samples=2, speed_prompts=2, speed_batch_sizes=(1, 2, 4), speed_repeats=2, sweep=(0.3,), device="cpu",
        progress=False,
    )  # fmt: skip


def test_the_report_has_the_keys_of_the_contract(report):
    assert set(report) == {"provenance", "quality", "likelihood", "speed", "pareto", "warnings"}
    for row in report["quality"]:
        assert set(row) >= QUALITY_KEYS
        assert set(row["base"]) >= {"value", "stderr"}
    assert {(r["task"], r["metric"]) for r in report["quality"]} == {
        ("tiny_shout", "exact_match,none"), ("tiny_last", "loglikelihood,none"), ("tiny_last", "acc,none"),
        ("tiny_choice", "acc,none"), ("tiny_choice", "acc_norm,none"),
    }  # fmt: skip
    assert {(r["arm"], r["batch_size"]) for r in report["speed"]} == {
        (arm, size) for arm in ("base", "control", "adapted") for size in (1, 2)
    }
    for point in report["pareto"]:
        assert set(point) >= {"sampler", "quality", "tokens_per_s"}
    assert [p["sampler"] for p in report["pareto"]] == ["greedy", "greedy", "threshold=0.9", "threshold=0.3"]
    json.dumps(report)


def test_every_arm_was_scored_on_the_same_items(report):
    assert {r["n"] for r in report["quality"]} == {6}
    assert all(r["control"] is not None for r in report["quality"])


def test_the_originals_own_speed_is_one_token_per_forward(report):
    for row in report["speed"]:
        if row["arm"] != "adapted":
            assert row["tpf"] <= 1.0
            assert row["nfe"] == pytest.approx(row["new_tokens"], abs=1.5)


def test_few_shot_examples_go_to_the_original_alone_and_lengthen_its_prompts(report):
    assert report["provenance"]["tasks"]["tiny_shout"]["num_fewshot"] == {"base": 1, "control": 0, "adapted": 0}
    lengths = {r["arm"]: r["prompt_tokens"] for r in report["speed"] if r["batch_size"] == 1}
    assert lengths["base"] > lengths["control"] == lengths["adapted"]


def test_warnings_name_what_weakens_the_comparison(report):
    said = " ".join(report["warnings"])
    for words in ("limit=6", "1 examples in its prompt", "6 items only", "Monte-Carlo", "Multiple choice", "tiny_last",
                  "serving engine", "on a CPU", "2 prompts only", "Batch sizes 4 were left out"):  # fmt: skip
        assert words in said, words
    assert "no control" not in said


def test_provenance_pins_arms_versions_and_settings(report, arms):
    sources = report["provenance"]
    assert set(sources["arms"]) == {"base", "control", "adapted"}
    base, control = sources["arms"]["base"]["safetensors"], sources["arms"]["control"]["safetensors"]
    assert base["model.safetensors"]["header_sha256"] == control["model.safetensors"]["header_sha256"]
    assert base["model.safetensors"]["sha256"] != control["model.safetensors"]["sha256"]
    assert sources["arms"]["adapted"]["diffusion"]["attention"] == "prefix"
    assert sources["dtype"] == str(compute_dtype_of("cpu")).removeprefix("torch.")
    assert sources["sampler"]["threshold"] == 0.9
    assert sources["versions"]["torch"].startswith("2.")


def test_an_arm_against_itself_differs_nowhere(arms, tmp_path):
    report = compare(
        arms.base, arms.adapted, control=arms.base, tasks=["tiny_shout"], include_path=arms.tasks, out=tmp_path / "out",
        speed_repeats=0, device="cpu", progress=False,
    )  # fmt: skip
    (row,) = report["quality"]
    assert row["base"] == row["control"]
    assert row["delta"] == row["vs_control"]["delta"]
    assert report["speed"] == report["pareto"] == []
    assert "Speed was not measured." in report["warnings"]


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_the_command_ends_with_the_table_and_the_reports_path(arms, tmp_path, capsys):
    (tmp_path / "held.txt").write_text("abcdefgh" * 40)
    out = tmp_path / "out"
    argv = [
        "compare",
        "--base",
        arms.base,
        "--adapted",
        arms.adapted,
        "--tasks",
        "tiny_last",
        "--include_path",
        arms.tasks,
    ]
    argv += ["--out", out, "--limit", 3, "--sampler.threshold", 0.8, "--mc_samples", 2, "--speed_batch_sizes", "2"]
    argv += ["--speed_prompts", 2, "--speed_repeats", 1, "--corpus", tmp_path / "held.txt", "--device", "cpu"]
    assert adapt_main([str(a) for a in argv]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == f"report: {out / 'report.html'}"
    table = [line.split()[0] for line in printed if line.startswith(("arm ", "original ", "adapted "))]
    assert table == ["arm", "original", "adapted"]
    report = json.loads((out / "report.json").read_text())
    assert report["provenance"]["sampler"]["threshold"] == 0.8
    assert shlex.split(report["provenance"]["command"])[:2] == ["adapt", "compare"]
    assert report["likelihood"][0]["corpus"] == "held.txt"
    assert report["quality"][0]["control"] is None
    said = " ".join(report["warnings"])
    assert "no control" in said
    assert "No task of the list generates text" in said
    assert sorted(p.name for p in out.iterdir()) == [
        ".adapt.json",
        "report.html",
        "report.json",
        "report.md",
        "samples",
    ]
    assert len((out / "samples/base/tiny_last.jsonl").read_text().splitlines()) == 3


def test_a_task_that_samples_is_said_to(arms, tmp_path):
    report = compare(
        arms.base, arms.adapted, tasks=["tiny_hot"], include_path=arms.tasks, out=tmp_path / "out", limit=2,
        speed_prompts=1, speed_batch_sizes=(1,), speed_repeats=1, device="cpu", progress=False,
    )  # fmt: skip
    assert any("Answers were sampled (tiny_hot)" in w for w in report["warnings"])
    assert {r["sampler"] for r in report["speed"]} == {"temperature=1, top_p=1", "threshold=0.9, temperature=1"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--tasks": "tiny_shuot"}, "tasks=tiny_shuot: unknown task; did you mean tiny_shout"),
        ({"--tasks": ""}, "tasks='': is empty"),
        ({"--base": "./nowhere"}, "base=./nowhere: no such folder"),
        ({"--control": "EMPTY"}, "not a model folder"),
        ({"--adapted": "BASE"}, "no diffusion checkpoint; make one with `adapt convert"),
        ({"--base": "ADAPTED"}, "is a diffusion checkpoint; give the causal LM"),
        ({"--out": "EMPTY"}, "exists already"),
        ({"--include_path": "./nowhere"}, "include_path=./nowhere: no such folder"),
        ({"--limit": "0"}, "limit=0: must be from 1 to"),
        ({"--dtype": "int8"}, "dtype=int8: choose one of bfloat16, float16, float32"),
        ({"--device": "gpu9"}, "device=gpu9: give cpu, cuda or cuda:N"),
        ({"--corpus": "none.txt"}, "corpus=none.txt: no such file"),
        ({"--sweep": "0.5,high"}, "sweep=0.5,high: give numbers"),
        ({"--sweep": "1.5"}, "sweep=[1.5]: 1.5 in it must be above 0 and at most 1"),
        ({"--speed_batch_sizes": "0"}, "speed_batch_sizes=[0]: 0 in it must be from 1 to"),
        ({"--sampler.threshold": "1.5"}, "sampler.threshold=1.5"),
        ({"--limt": "3"}, "limt"),
        ({"--limit": "many"}, "limit"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(change, says, arms, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    options = {"--base": arms.base, "--adapted": arms.adapted, "--tasks": "tiny_shout", "--include_path": arms.tasks,
               "--out": tmp_path / "out"}  # fmt: skip
    words = {"EMPTY": str(tmp_path / "empty"), "BASE": str(arms.base), "ADAPTED": str(arms.adapted)}
    options |= {k: words.get(v, v) for k, v in change.items()}
    try:
        code = adapt_main(["compare", *(str(part) for pair in options.items() for part in pair)])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code in (1, 2)
    assert len(lines) == 1, lines
    assert lines[0].startswith("adapt compare: error: ")
    assert says in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_comparison_without_weaknesses_of_settings_says_so_little():
    speed = [{"arm": a, "batch_size": 1, "new_tokens": 20.0} for a in ("base", "control", "adapted")]
    one = {"samples": {"t": []}, "n-shot": {"t": 0}, "configs": {"t": {"output_type": "generate_until"}}}
    said = caveats(
        quality=[{"n": 500}], speed=speed, results=dict.fromkeys(("base", "control", "adapted"), one), limit=None,
        device="cuda", threads=1, mc_samples=32, temperature=0.0, sampled_tasks=[], untemplated_chat=False,
        speed_prompts=64, skipped_batch_sizes=[], fallback_prompts=False,
    )  # fmt: skip
    assert len(said) == 2  # transformers is no serving engine; what "first token" means
