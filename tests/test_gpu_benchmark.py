"""benchmarks/gpu.py rehearsed without a GPU: what a part finds is kept, whatever becomes of it, and the next one begins."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu
import gpu_checks
import gpu_parts
import psutil
import pytest
import torch
from gpu_checks import NotPossible, Setting
from machine import machine

FOUND = {"status": "unfinished", "reason": "", "figures": {"rows": [{"run": "a | b", "loss": 1.25}]}}
PROGRAMS = {  # of processes that stand in for parts; argv[1] is their folder
    "fails": "raise MemoryError('no room')",
    "hangs": f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(pathlib.Path(sys.argv[1]).parents[1] / "child").write_text(str(child.pid))
(pathlib.Path(sys.argv[1]) / "result.json").write_text({json.dumps(FOUND)!r})
time.sleep(600)
""",
    "works": f"""
import pathlib, sys
(pathlib.Path(sys.argv[1]) / "result.json").write_text({json.dumps({**FOUND, "status": "ok"})!r})
""",
}


def nothing(setting: Setting) -> Iterator[dict]:
    yield {}


def run(tmp_path: Path, names: list[str], seconds: float) -> dict:
    (tmp_path / "scratch").mkdir()
    parts = {name: gpu_parts.Part(1, f"that one {name}", nothing) for name in names}
    report = {"provenance": machine("gpu.py"), "parts": []}

    def command(name: str, folder: Path) -> list[str]:
        return [sys.executable, "-c", PROGRAMS[name], str(folder)]

    gpu.run_all(
        parts, command, seconds=seconds, report=report, out=tmp_path / "gpu", scratch=tmp_path / "scratch", shortest=1
    )
    return json.loads((tmp_path / "gpu.json").read_text())


def test_a_part_that_fails_or_hangs_is_told_and_the_others_run(tmp_path: Path) -> None:
    report = run(tmp_path, ["fails", "hangs", "works"], seconds=8)
    fails, hangs, works = report["parts"]
    assert (fails["status"], hangs["status"], works["status"]) == ("failed", "failed", "ok")
    assert "its process ended with 1" in fails["reason"]
    assert "MemoryError: no room" in fails["log"]
    assert "ended after its" in hangs["reason"]
    assert hangs["figures"] == works["figures"] == FOUND["figures"]
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert {"cpu", "command", "versions", "driver", "gpu", "git_revision"} <= set(report["provenance"])
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("| a \\| b | 1.25 |") == 2
    assert "| fails | that one fails | failed |" in page


def test_what_there_is_no_time_for_is_skipped_and_told(tmp_path: Path) -> None:
    report = run(tmp_path, ["fails", "works"], seconds=0)
    assert [part["status"] for part in report["parts"]] == ["skipped (time)"] * 2
    assert not list((tmp_path / "scratch").iterdir())


def test_a_part_keeps_what_it_found_before_it_failed(tmp_path: Path) -> None:
    def differs(setting: Setting) -> Iterator[dict]:
        yield {"rows": [{"loss": 1.0}]}
        raise ValueError("losses\ndiffer")

    def has_no_gpu(setting: Setting) -> Iterator[dict]:
        yield {}
        raise NotPossible("needs a CUDA device")

    setting = Setting("cpu", True, tmp_path)
    outcome = gpu_parts.run_part(differs, setting, tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text()) == outcome
    assert (outcome["status"], outcome["reason"]) == ("failed", "ValueError: losses differ")
    assert outcome["figures"] == {"rows": [{"loss": 1.0}]}
    assert "in differs" in outcome["traceback"]
    outcome = gpu_parts.run_part(has_no_gpu, setting, tmp_path / "two.json")
    assert (outcome["status"], outcome["reason"]) == ("not possible here", "needs a CUDA device")


def test_kernels_are_held_against_eager_and_flex_attention_is_not_faked_on_a_cpu(tmp_path: Path) -> None:
    patterns = {"block": gpu_checks.PATTERNS["block"]}
    *_, found = gpu_checks.kernels(Setting("cpu", True, tmp_path), patterns)
    flex, pieces, sdpa = found["rows"]
    assert flex["loss"] == "not possible on a CPU"
    assert flex["gradient difference"] is None
    for row in (pieces, sdpa):
        assert row["loss"] > 1
        assert 0 < row["gradient difference"] < 1e-5


def test_gradients_that_are_a_tenth_off_are_a_tenth_off() -> None:
    one, other = gpu_checks.KeepStep(), gpu_checks.KeepStep()
    one.gradients, other.gradients = {"a": torch.ones(4), "b": torch.ones(4)}, {"a": torch.ones(4), "b": torch.ones(4)}
    one.gradients = {name: 1.1 * gradient for name, gradient in one.gradients.items()}
    assert one.difference(other) == pytest.approx(0.1)


def test_decoding_is_measured_beside_ar_with_tokens_per_forward_as_set(tmp_path: Path) -> None:
    outcome = gpu_parts.run_part(gpu_parts.decoding, Setting("cpu", True, tmp_path), tmp_path / "result.json")
    assert outcome["status"] == "ok", outcome
    rows = {(row["arm"], row["batch_size"]): row for row in outcome["figures"]["rows"]}
    assert set(rows) == {(arm, size) for arm in ("AR", "prefix", "block 32") for size in (1, 8)}
    for (arm, _), row in rows.items():
        assert row["nfe"] == (8 if arm == "AR" else 2)
        assert row["tokens_per_s"] > 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--parts", "kernels,nothing"], "parts=nothing: choose of suites, kernels"),
        (["--device", "tpu"], "device=tpu"),
        (["--device", "cpu", "--minutes", "0"], "minutes=0.0"),
        (["--device", "cuda"], "torch sees no GPU; --device cpu rehearses"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=said):
        gpu.main(arguments)
