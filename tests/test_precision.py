"""training.precision=auto: bf16 where the machine computes it, fp32 where it emulates it; obeyed, kept and said."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_fixtures import recipe_argv, write_base, write_pairs

from adapt.model import precision
from adapt.model.precision import CpuSpeed, about_precision, compute_dtype_of, default_dtype, has_native_bf16
from adapt.training.recipe import parse_recipe
from adapt.training.train import train

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks which precision a CPU gets")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("precision")
    return write_base(folder / "base"), write_pairs(folder / "data.jsonl")


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_speed", lambda: CpuSpeed(bf16=20.0, fp32=97.0))


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_speed", lambda: CpuSpeed(bf16=204.0, fp32=97.0))


def argv_of(material: tuple[Path, Path], out: Path, asked: str, **overrides: object) -> list[str]:
    base, data = material
    settings = {"objective__name": "ar", "training__num_steps": 2, "training__precision": asked}
    return recipe_argv(base, data, out, **(settings | overrides))


def used(out: Path) -> str:
    return yaml.safe_load((out / "config.yaml").read_text())["training"]["precision"]


@on_cpu
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the environment variables are x86's")
def test_a_cpu_with_avx2_alone_trains_in_fp32(material: tuple[Path, Path], tmp_path: Path) -> None:
    # Its own process: the libraries read the variables once.
    code = "import sys; from adapt.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *argv_of(material, tmp_path / "out", "auto")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert used(tmp_path / "out") == "fp32"
    assert "precision auto: fp32 (a core computes" in done.stderr


@on_cpu
def test_auto_is_bf16_where_it_is_native(
    native: None, material: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(parse_recipe(argv_of(material, tmp_path / "out", "auto")))
    assert used(tmp_path / "out") == "bf16"
    assert "precision auto: bf16 (a core computes 204 GFLOP/s in bf16 and 97 in fp32)" in capfd.readouterr().err


@on_cpu
def test_a_resumed_run_keeps_its_precision_on_another_machine(
    native: None, material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    train(parse_recipe(argv_of(material, out, "auto", training__save_steps=1)))
    (out / "model").rename(tmp_path / "first")
    monkeypatch.setattr(precision, "cpu_speed", lambda: CpuSpeed(bf16=20.0, fp32=97.0))
    train(parse_recipe(argv_of(material, out, "auto", training__save_steps=1, training__num_steps=3)))
    assert used(out) == "bf16"
    assert "precision auto: bf16, as this run began" in capfd.readouterr().err


@on_cpu
def test_bf16_is_obeyed_where_it_is_emulated_and_warned_of_with_the_factor(
    emulating: None, material: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(parse_recipe(argv_of(material, tmp_path / "out", "bf16")))
    assert used(tmp_path / "out") == "bf16"
    assert "precision bf16: is emulated here, about 4.8 times slower than fp32" in capfd.readouterr().err


def test_fp32_needs_no_word_and_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_speed", lambda: pytest.fail("measured for nothing"))
    assert about_precision("fp32", "cpu") is None


def test_weights_are_loaded_in_what_the_machine_computes(emulating: None) -> None:
    assert not has_native_bf16("cpu")
    assert compute_dtype_of("cpu") == torch.float32
    for stored in ("bfloat16", torch.bfloat16, torch.float16, torch.float32, None):
        assert default_dtype(stored, "cpu") == torch.float32


def test_weights_keep_their_dtype_where_it_is_native(native: None) -> None:
    assert compute_dtype_of("cpu") == torch.bfloat16
    assert default_dtype(torch.bfloat16, "cpu") == torch.bfloat16
    assert default_dtype("torch.float32", "cpu") == torch.float32  # half of its bits are not given away unasked
    assert default_dtype(torch.float16, "cpu") == torch.float32  # no CPU here computes it


def test_the_speed_of_this_cpu_is_measured_once() -> None:
    first = precision.cpu_speed()
    assert first.bf16 > 0
    assert first.fp32 > 0
    assert precision.cpu_speed() is first
