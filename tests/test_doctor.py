"""`adapt doctor`: what it finds, the command that mends it, and the all-reduce that names a rank which does not answer."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapt.doctor import doctor
from adapt.doctor.all_reduce import all_reduce_line
from adapt.training.engine import shared_buffers


def run(*argv: str, **env: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adapt.cli", "doctor", *argv]
    place = {name: str(value) for name, value in env.items()}
    return subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=600)


def test_every_line_is_ok_or_says_what_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"python", "torch", "deepspeed", "disk", "op"} <= {line.split()[1] for line in lines}
    for line in lines:
        assert re.match(r"ok       \S", line) or re.match(r"missing  \S.*  ->  \S", line), line


@pytest.mark.parametrize("module, code", [("bitsandbytes", 0), ("transformers", 1)])
def test_a_missing_package_is_an_error_only_where_the_core_needs_it(
    module: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.importlib.import_module

    def import_module(name: str):
        if name == module:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    assert doctor.main([]) == code
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"missing  {module} ")]
    wanted = "pip install 'adapt-dlm[quant]'" if code == 0 else "pip install --upgrade adapt-dlm"
    assert line.startswith(f"missing  {module:<16} not installed  ->  {wanted}")


def test_a_broken_install_is_told_from_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_by_test.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor._package("broken_by_test", "pip install it")
    assert not check.ok
    assert check.found == "does not import: libfoo.so.1: cannot open shared object file"


def test_a_lock_that_a_killed_build_left_is_named_and_one_in_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (check,) = [check for check in doctor._leftovers() if check.name == "build lock"]
    assert (check.ok, check.mend) == (False, f"rm {lock}")
    with lock.open("w"):  # as torch does while it builds
        (check,) = [check for check in doctor._leftovers() if check.name == "build locks"]
        assert check.ok


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of /dev/shm, and this process as a rank that begins."""
    monkeypatch.setattr(shared_buffers, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_buffers, "_lock", None)
    monkeypatch.setattr(shared_buffers.atexit, "register", lambda function: None)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "own", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    shared_buffers.remove_own()


def buffer(shm: Path, name: str, *, is_old: bool = True) -> Path:
    path = shm / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{name}_0"
    path.write_bytes(bytes(4096))
    os.utime(path, (0, 0) if is_old else None)
    return path


def lock_of(path: Path) -> Path:
    return path.with_name(f"adapt-lock-of-{path.name}")


HOLDS = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"


def test_shared_memory_of_ended_jobs_is_told_from_that_in_use_and_goes_at_the_next_start(shm: Path) -> None:
    used, old, young = buffer(shm, "used"), buffer(shm, "old"), buffer(shm, "young", is_old=False)
    killed = buffer(shm, "killed", is_old=False)  # a rank of ours, a second ago
    lock_of(killed).touch()
    elsewhere = buffer(shm, "elsewhere")  # in a container whose processes are not seen
    (shm / "deepspeed_of_others").touch()
    with subprocess.Popen([sys.executable, "-S", "-c", HOLDS, lock_of(elsewhere)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with used.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            held, left = [check for check in doctor._leftovers() if check.name == "shared memory"]
            assert (held.ok, held.found) == (
                True,
                f"2 buffers of DeepSpeed on CPU, 0.0 GB, in use by process {os.getpid()}",
            )
            assert (left.ok, left.mend) == (False, f"rm {killed} {old} {young}")
            assert ", yours, whose processes have ended; they go at the next start" in left.found
            shared_buffers.make_room()
            own = shm / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_own_0"
            kept = {used, young, elsewhere, lock_of(elsewhere), lock_of(own), shm / "deepspeed_of_others"}
            assert set(shm.iterdir()) == kept
        holder.kill()
    own.touch()
    shared_buffers.make_room()  # a second run of this process: its own is in use
    assert own.exists()
    shared_buffers.remove_own()
    assert set(shm.iterdir()) == kept - {lock_of(own)}


def test_shared_memory_of_another_user_is_named_and_left(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = buffer(shm, "theirs")
    lock_of(path).touch()
    monkeypatch.setattr(shared_buffers.os, "getuid", lambda: 4242)
    (check,) = [check for check in doctor._leftovers() if check.name == "shared memory"]
    assert check.ok
    assert f", of {path.owner()}, in use by nobody that you may see" in check.found
    shared_buffers.make_room()
    assert path.exists()


def test_too_little_shared_memory_is_told_before_a_rank_dies_of_it(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setattr(shared_buffers.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with pytest.raises(
        ValueError, match=r"67 MB are free, and 4 ranks on CPU need 277 MB; `adapt doctor` says whose memory"
    ):
        shared_buffers.make_room()


def test_missing_libaio_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapt.training.engine import nvme

    monkeypatch.setattr(nvme, "missing_for_nvme", lambda: "DeepSpeed's async_io needs libaio")
    (check,) = [check for check in doctor._deepspeed_ops() if check.name == "op async_io"]
    assert not check.ok
    assert check.mend == "apt-get install libaio-dev"


def test_what_a_linker_says_stays_out_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")

    def missing() -> str:
        subprocess.run(["sh", "-c", "echo 'ld: cannot find -laio' >&2"], check=True)
        return "libaio"

    monkeypatch.setattr("adapt.training.engine.nvme.missing_for_nvme", missing)
    assert [check.ok for check in doctor._deepspeed_ops() if check.name == "op async_io"] == [False]
    assert "cannot find" not in "".join(capfd.readouterr())
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


@pytest.mark.distributed
def test_two_ranks_add_up_and_the_speed_is_told() -> None:
    done = run("--ranks", "2", "--all_reduce_only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(
        r"ok       all-reduce       2 ranks on \S+ over gloo: sums right, 1 MB in [\d.]+ ms \([\d.]+ GB/s\), "
        r"64 MB in [\d.]+ ms \([\d.]+ GB/s\)\n",
        done.stdout,
    )


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_the_deepspeed_launcher_starts_it_too(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).resolve().parents[1] / "recipes" / "doctor.py"
    launch = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port), str(script)]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok       python") == 1
    assert done.stdout.count("all-reduce       2 ranks on") == 1


@pytest.mark.parametrize(
    "rank, message",
    [
        (
            0,
            r"adapt doctor: error: all-reduce: rank 1, 2 of 3 did not reach 127.0.0.1:\d+ within 2 s; check that its.*\n",
        ),
        (
            2,
            r"adapt doctor: error: all-reduce: rank 2 on \S+ cannot reach rank 0 at 127.0.0.1:\d+ within 2 s; check.*\n",
        ),
    ],
)
def test_a_rank_that_does_not_answer_is_named_in_one_line(rank: int, message: str, free_port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    done = run("--all_reduce_only", "--timeout", "2", **place)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(message, done.stderr), done.stderr


def test_a_rank_without_a_gpu_of_its_own_is_told_before_nccl_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"^all-reduce: local rank 1 has no GPU, torch sees 1 here"):
        all_reduce_line(2)
