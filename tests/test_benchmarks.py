"""The benchmark measures the real training loops, and counts tokens as it says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def _benchmark(*arguments: object) -> subprocess.CompletedProcess:
    root = BENCHMARKS.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, BENCHMARKS / "train.py", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=root, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two workloads, two arms, two rounds."""
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    options = ["--shape", "tiny", "--workload", "3x16/prompt,4x8-32", "--arms", "ar,prefix"]
    done = _benchmark(*options, "--rounds", 2, "--peak_tflops", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| prefix |") == 2, done.stdout
    return json.loads(out.read_text())


@pytest.mark.exhaustive
def test_report_holds_every_raw_timing_and_where_it_comes_from(report: dict) -> None:
    provenance = report["provenance"]
    assert {"cpu", "cores", "command", "git_revision", "threads", "versions", "load_at_start"} <= set(provenance)
    assert [r["workload"]["batch"] for r in report["results"]] == [3, 4]
    for result in report["results"]:
        assert list(result["arms"]) == ["ar", "prefix"]
        for name, arm in result["arms"].items():
            assert [step["round"] for step in arm["steps"]] == [0, 1], name
            assert all(step["seconds"] > 0 and step["cpu_seconds"] > 0 for step in arm["steps"])
            assert arm["peak_memory_bytes"] > 50e6


@pytest.mark.exhaustive
def test_documents_of_one_length_are_the_same_tokens_in_every_arm(report: dict) -> None:
    for name, arm in report["results"][0]["arms"].items():
        for step in arm["steps"]:
            counted = step["clean_tokens"], step["useful_tokens"], step["positions"]
            assert counted == (3 * 16, 3 * 16, 3 * 16), name


@pytest.mark.exhaustive
def test_head_rows_are_all_positions_for_plain_ar_and_answer_tokens_at_most_for_ours(report: dict) -> None:
    arms = report["results"][0]["arms"]
    assert {step["head_rows"] for step in arms["ar"]["steps"]} == {3 * 16}
    assert all(0 < step["head_rows"] <= 3 * 9 for step in arms["prefix"]["steps"])


@pytest.mark.exhaustive
def test_padding_is_no_useful_token(report: dict) -> None:
    mixed = report["results"][1]
    for name, arm in mixed["arms"].items():
        for step in arm["steps"]:
            assert step["clean_tokens"] == step["useful_tokens"] <= step["positions"], name
    # Four lengths drawn from 8 to 32 fill two thirds of a padded batch on average; two packed rows are nearly full.
    assert mixed["summary"]["prefix"]["useful_share"] > 0.9 > mixed["summary"]["ar"]["useful_share"]
    assert all(step["positions"] % 4 == 0 for step in mixed["arms"]["ar"]["steps"])


@pytest.mark.exhaustive
def test_ratios_are_taken_inside_a_round(report: dict) -> None:
    for result in report["results"]:
        ar, ours = (result["arms"][name]["steps"] for name in ("ar", "prefix"))
        ratios = [
            (a["clean_tokens"] / a["seconds"]) / (b["clean_tokens"] / b["seconds"])
            for a, b in zip(ours, ar, strict=True)
        ]
        of_prefix = result["summary"]["prefix"]["ratio"]
        assert (of_prefix["min"], of_prefix["max"]) == pytest.approx((min(ratios), max(ratios)))
        assert result["summary"]["ar"]["ratio"] == {"median": 1, "min": 1, "max": 1}


@pytest.mark.exhaustive
def test_mfu_counts_what_ar_training_needs_for_a_token(report: dict) -> None:
    result = report["results"][0]
    sizes, ar = result["sizes"], result["summary"]["ar"]
    per_token = 6 * sizes["parameters"] + 12 * 2 * 4 * 64 * 16  # tied; 2 layers of 4 heads of 64, length 16
    assert ar["mfu"] == pytest.approx(ar["clean_tokens_per_s"]["median"] * per_token / 1e12)


@pytest.mark.exhaustive
def test_sweep_is_drawn_as_it_grows(report: dict, tmp_path: Path) -> None:
    draw_sweep = _module().figures.draw_sweep
    points = [{"length": length, **result} for length, result in zip((256, 512), report["results"], strict=True)]
    for count in (1, 2):
        draw_sweep("length", points[:count], tmp_path / "plot.svg")
        drawn = (tmp_path / "plot.svg").read_text()
        assert ("<!-- 512 -->" in drawn) == (count == 2)
        assert all(f"<!-- {text} -->" in drawn for text in ("256", "ar", "prefix", "peak memory, GB"))


@pytest.mark.exhaustive
def test_profile_gives_the_operators_of_a_step_to_its_parts(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    _module().main(["--shape", "tiny", "--workload", "2x64", "--profile", "bidirectional", "--out", str(out)])
    (step,) = json.loads(out.read_text())["results"][0]["arms"]["bidirectional"]["steps"]
    calls = step["profile"]["calls"]
    for part in ("attention", "body", "head+loss", "optimizer", "data", "mask", "grad accumulation"):
        assert calls[part] > 0, part
    # What no part claims is the Trainer's own bookkeeping; a backward pass that found no part would be half of the operators.
    assert calls["other"] < 0.25 * sum(calls.values())
    assert step["profile"]["parts"].keys() == calls.keys()


@pytest.mark.exhaustive
def test_arm_that_a_recipe_refuses_is_left_out_with_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--shape", "tiny", "--workload", "2x16", "--arms", "prefix", "--set", "data.too_long=never"]
    _module().main([*options, "--rounds", "1", "--warmup", "0", "--out", str(out)])
    (result,) = json.loads(out.read_text())["results"]
    assert "data.too_long=never" in result["arms"]["prefix"]["error"]
    assert result["summary"] == {}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--arms", "ar,nothing"], "arms=nothing"),
        (["--workload", "4by512"], "workload=4by512"),
        (["--shape", "huge"], "shape=huge"),
        (["--sweep", "depth"], "sweep=depth"),
        (["--rounds", "0"], "rounds=0"),
        (["--set", "model.lora"], "set=model.lora"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        _module().main(["--shape", "tiny", *arguments])
    assert said in str(stopped.value)


def _module():
    """benchmarks/train.py, imported as a script's neighbours see it."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_train", BENCHMARKS / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
