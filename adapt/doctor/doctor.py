"""What this machine can run, what is missing, and the command that mends it.

    adapt doctor
    adapt doctor --ranks 2                                  and an all-reduce between two processes here
    deepspeed --hostfile hostfile recipes/doctor.py         the same over all ranks of a cluster

Exits with 1 only if the core cannot run, or if an all-reduce that was asked for fails.
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

from ..arguments import CommandParser, wait_for_rank_zero
from ..settings.bounds import Bounds
from ..training.engine import build_locks, shared_buffers
from .all_reduce import all_reduce_line, launch_ranks

_CORE = ("torch", "transformers", "huggingface_hub", "jsonargparse", "numpy", "yaml", "safetensors", "tqdm")
# import name: (the extra that brings it, what it is for)
_EXTRAS = {
    "accelerate": ("train", "training"),
    "datasets": ("train", "training data"),
    "deepspeed": ("train", "ZeRO and several GPUs"),
    "peft": ("train", "LoRA"),
    "bitsandbytes": ("quant", "NF4 QLoRA, 8-bit AdamW"),
    "lm_eval": ("eval", "comparison with the original"),
    "matplotlib": ("report", "plots"),
}
_DISTRIBUTION = {"yaml": "PyYAML"}
_MAX_RANKS = 256  # each is a process with torch in it
_MAX_TIMEOUT = 86_400  # seconds
_MIN_FREE_GB, _MIN_SHM_GB, _MIN_OPEN_FILES = 20, 1, 4096


class Check(NamedTuple):
    name: str
    ok: bool
    found: str
    mend: str = ""
    is_core: bool = False


def checks() -> Iterator[Check]:
    """Every check of this machine, in the order in which they are printed."""
    found = platform.python_version()
    yield Check("python", sys.version_info >= (3, 10), found, "install Python 3.10 or newer", is_core=True)
    for module in _CORE:
        yield _package(module, "pip install --upgrade adapt-dlm", is_core=True)
    for module, (extra, purpose) in _EXTRAS.items():
        yield _package(module, f"pip install 'adapt-dlm[{extra}]'    ({purpose})")
    yield from _devices()
    yield from _build_tools()
    yield from _deepspeed_ops()
    yield _flex_attention()
    yield from _limits()
    yield from _leftovers()


def _package(module: str, mend: str, *, is_core: bool = False) -> Check:
    name = _DISTRIBUTION.get(module, module)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        found = "not installed" if error.name == module else f"needs {error.name}, which is not installed"
        return Check(name, False, found, mend, is_core)
    except Exception as error:  # a broken install fails in as many ways as there are packages
        found = f"does not import: {' '.join(str(error).split())[:120]}"
        return Check(name, False, found, f"pip install --force-reinstall {name}", is_core)
    return Check(name, True, metadata.version(name), is_core=is_core)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # said already
        return
    from ..model.precision import about_precision

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    if not torch.cuda.is_available():
        if driver:
            build = torch.version.cuda or "none (a CPU build)"
            found = f"driver {driver[0]}, but torch sees no GPU; torch's CUDA: {build}"
            yield Check(
                "GPU", False, found, "pip install --force-reinstall torch, for this driver: https://pytorch.org"
            )
        else:
            yield Check("GPU", True, f"none; runs on {os.cpu_count()} CPU cores, {about_precision('auto', 'cpu')}")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if device.major >= 8 else "no bf16"
        version = driver[0] if driver else "unknown"
        found = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}, CUDA {torch.version.cuda}, driver {version}"
        )
        yield Check(f"GPU {index}", device.major >= 8, found, "set training.precision=fp32 on this GPU")


def _build_tools() -> Iterator[Check]:
    compiler = os.environ.get("CXX", "c++")
    version = _output(compiler, "--version").splitlines()
    yield Check("C++ compiler", bool(version), version[0] if version else f"no {compiler}", "apt-get install g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    yield Check("Python.h", header.is_file(), str(header), "apt-get install python3-dev")
    for name, extra in (("ninja", "train"), ("deepspeed", "train")):
        path = shutil.which(name)
        what = f"{name} command"
        yield Check(
            what, path is not None, path or "not on PATH", f"pip install 'adapt-dlm[{extra}]', activate the environment"
        )


def _deepspeed_ops() -> Iterator[Check]:
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]

        from ..training.engine.nvme import missing_for_nvme
    except Exception:  # said already
        return
    with _silence():
        adam = CPUAdamBuilder().is_compatible(verbose=False)
        missing = missing_for_nvme()
    yield Check(
        "op cpu_adam", adam, "compatible (offload to CPU memory)" if adam else "not compatible", "ds_report says why"
    )
    yield Check(
        "op async_io",
        missing is None,
        "no libaio (offload to NVMe)" if missing else "compatible (offload to NVMe)",
        "apt-get install libaio-dev",
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, nothing is said: not by Python, nor by compilers and linkers that it starts."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        said = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(said, 2)
            os.close(said)


def _flex_attention() -> Check:
    try:
        from torch.nn.attention.flex_attention import flex_attention  # noqa: F401
    except ImportError:
        return Check("FlexAttention", False, "not in this torch", "pip install --upgrade torch")
    return Check("FlexAttention", True, "in torch")


def _limits() -> Iterator[Check]:
    free = shutil.disk_usage(".").free / 1e9
    yield Check(
        "disk", free >= _MIN_FREE_GB, f"{free:.0f} GB free in {Path.cwd()}", "set training.output_dir to a larger disk"
    )
    if os.path.isdir("/dev/shm"):
        usage = shutil.disk_usage("/dev/shm")
        found = f"{usage.total / 1e9:.1f} GB, {usage.free / 1e9:.1f} GB free"
        mend = "remove what nobody needs there, or start the container with --shm-size=16g"
        yield Check("/dev/shm", usage.free / 1e9 >= _MIN_SHM_GB, found, mend)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Check("open files", soft >= _MIN_OPEN_FILES, f"{soft} (hard limit {hard})", f"ulimit -n {min(hard, 65536)}")


def _leftovers() -> Iterator[Check]:
    """What killed processes leave: locks that make every later build wait for ever, and shared memory that nobody frees."""
    locks = list(build_locks.abandoned())
    for lock, age in locks:
        yield Check("build lock", False, f"{lock}, {age / 3600:.1f} h old: launches wait for it", f"rm {lock}")
    if not locks:
        yield Check("build locks", True, f"none left in {build_locks.folder()}")
    yield from _shared_memory(shared_buffers.buffers())


def _shared_memory(buffers: list[shared_buffers.Buffer]) -> Iterator[Check]:
    """Whose the buffers of DeepSpeed on CPU are: in use, this user's, or another's, who alone may remove them."""

    def summed(some: list[shared_buffers.Buffer]) -> str:
        return f"{len(some)} buffers of DeepSpeed on CPU, {sum(buffer.num_bytes for buffer in some) / 1e9:.1f} GB"

    if held := [buffer for buffer in buffers if buffer.is_held]:
        pids = ", ".join(map(str, sorted({pid for buffer in held for pid in buffer.pids}))) or "in another container"
        yield Check("shared memory", True, f"{summed(held)}, in use by process {pids}")
    left = [buffer for buffer in buffers if not buffer.is_held]
    if own := [buffer for buffer in left if buffer.uid == os.getuid()]:
        paths = " ".join(str(buffer.path) for buffer in own)
        found = f"{summed(own)}, yours, whose processes have ended; they go at the next start"
        yield Check("shared memory", False, found, f"rm {paths}")
    if others := [buffer for buffer in left if buffer.uid != os.getuid()]:
        users = ", ".join(sorted({buffer.user for buffer in others}))
        yield Check("shared memory", True, f"{summed(others)}, of {users}, in use by nobody that you may see")


def _output(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _line(check: Check) -> str:
    status = "ok" if check.ok else "missing"
    mend = "" if check.ok else f"  ->  {check.mend}"
    return f"{status:<8} {check.name:<16} {check.found}{mend}"


def main(argv: list[str]) -> int:
    """The `adapt doctor` command; what `recipes/doctor.py` runs on every rank."""
    parser = CommandParser(prog="adapt doctor", description=__doc__)
    parser.option(
        "--ranks",
        type=Annotated[int, Bounds(1, _MAX_RANKS)],
        default=1,
        help="processes here that add up numbers with each other",
    )
    parser.option(
        "--timeout",
        type=Annotated[int, Bounds(1, _MAX_TIMEOUT)],
        default=60,
        help="seconds until a rank counts as unreachable",
    )
    parser.add_argument("--all_reduce_only", action="store_true", help="leave out what this machine can run")
    parser.option(
        "--local_rank", type=Annotated[int, Bounds(-1, 2**16)], default=-1, help="set by the deepspeed launcher"
    )
    options = parser.parse_args(argv)
    # Before torch is imported: its C++ prints a stack for each address that does not answer, around our one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    core_runs = True
    if os.environ.get("RANK", "0") == "0" and not options.all_reduce_only:
        for check in checks():
            print(_line(check), flush=True)
            core_runs &= check.ok or not check.is_core
    if not core_runs:
        return 1
    if not launched:
        return launch_ranks(options.ranks, options.timeout) if options.ranks > 1 else 0
    try:
        line = all_reduce_line(options.timeout)
    except ValueError:
        wait_for_rank_zero()
        raise
    if line is not None:
        print(line, flush=True)
    return 0
