"""Time and peak memory of `adapt convert` on a checkpoint of many gigabytes, beside `cp -r` of the same folder, in turn.

    python benchmarks/convert.py --gigabytes 8 --rounds 3 --work some/disk --out benchmarks/results/convert-8gb-cpu.json

Makes a sharded bfloat16 Llama of about that size (Llama 3's vocabulary and width, untied embeddings, as many layers as fit;
random weights out of one pool of numbers, written as they are drawn). A round is `cp -r` and `adapt convert`, in changing order,
each as a process of its own. Both end on disk: every file that `cp` wrote is brought there with fsync inside of the timing, which
`convert` does by itself. Both start alike: what is written and dirty is brought to disk first, and then with `--cache cold` the
source is dropped from the page cache (posix_fadvise, and what mincore still sees is recorded), with `--cache warm` read once.
Output of the round before is gone from disk and cache. Peak memory is the child's ru_maxrss, mapped files included; a child's begins
at what its parent holds, so this process imports no torch.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

_WIDTH, _INNER, _VOCABULARY, _SHARD = 4096, 14336, 128_256, 2 << 30
_POOL = (64 << 20) + 2 * 4099  # bytes; no multiple of a row, so that no two rows are alike for thousands of rows


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Writes the base model, tensor by tensor."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    def config(layers: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_INNER, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype=torch.bfloat16,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip

    with torch.device("meta"):
        one, two = (
            _bytes(AutoModelForCausalLM.from_config(config(n), trust_remote_code=False).state_dict()) for n in (1, 2)
        )
        layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
        tensors = AutoModelForCausalLM.from_config(config(layers), trust_remote_code=False).state_dict()
    folder.mkdir(parents=True)
    config(layers).save_pretrained(folder)
    words = {f"w{i}": i for i in range(2, _VOCABULARY)} | {"<|start|>": 0, "<|end|>": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>").save_pretrained(
        folder
    )

    pool = memoryview((torch.randn(_POOL // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
                      .view(torch.uint8).numpy())  # fmt: skip
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and _bytes({n: tensors[n] for n in [*shards[-1], name]}) > _SHARD:
            shards.append([])
        shards[-1].append(name)
    weight_map, at = {}, 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            size = _bytes({name: tensors[name]})
            shape = list(tensors[name].shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                weight_map[name] = file
                left = _bytes({name: tensors[name]})
                if tensors[name].dim() == 1:  # norms
                    out.write(torch.ones(tensors[name].shape, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
                    continue
                while left:
                    piece = pool[at : at + min(left, _POOL - at)]
                    out.write(piece)
                    left, at = left - len(piece), (at + len(piece)) % _POOL
    total = _bytes(tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _bytes(tensors: dict[str, Any]) -> int:
    return sum(math.prod(tensor.shape) * 2 for tensor in tensors.values())


def run(command: list[str], out: Path, *, sync: bool) -> dict[str, Any]:
    """Seconds until what the command made is on disk, and what its process took."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    done = time.perf_counter()
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{shlex.join(command)} failed: {said[-2000:]}")
    if sync:
        for path in [*out.iterdir(), out, out.parent]:
            _fsync(path)
    return {
        "seconds": time.perf_counter() - started,
        "seconds_to_exit": done - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "load": os.getloadavg()[0],
    }


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def settle(folder: Path, cache: str) -> float:
    """Brings the machine to the same state before each run; the share of the source that is in the page cache then."""
    os.sync()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(64 << 20):
                    pass
    return _resident(folder)


def _resident(folder: Path) -> float:
    libc = ctypes.CDLL(None, use_errno=True)
    seen, total = 0, 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = -(-len(mapped) // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * pages)()
            start = (ctypes.c_char * len(mapped)).from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), flags) != 0:
                return math.nan
            seen += sum(byte & 1 for byte in bytes(flags))
            total += pages
            del start
    return seen / max(total, 1)


def main(argv: list[str]) -> None:
    """Measures, prints, and writes the report."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoint, 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=str, default="cold", help="cold or warm")
    parser.add_argument(
        "--work", type=Path, required=True, help="new folder on the disk to measure; removed afterwards"
    )
    parser.add_argument("--out", type=Path, required=True, help="the report, JSON")
    parser.add_argument("--attention", type=str, default="bidirectional")
    given = parser.parse_args(argv)
    if given.cache not in ("cold", "warm"):
        raise SystemExit(f"cache={given.cache}: choose one of cold, warm")
    if shutil.disk_usage(given.work.parent).free < 2.3e9 * given.gigabytes:
        raise SystemExit(f"work={given.work}: needs {2.3 * given.gigabytes:.0f} GB free, for the model and one copy")
    given.work.mkdir()
    try:
        report = measure(given)
    finally:
        shutil.rmtree(given.work)
    report["command"] = shlex.join(["python", "benchmarks/convert.py", *argv])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


def measure(given: Any) -> dict[str, Any]:
    """All rounds, and their summary."""
    base, out = given.work / "base", given.work / "out"
    maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(base, given.gigabytes))
    maker.start()
    maker.join()
    if maker.exitcode != 0:
        raise SystemExit("the checkpoint could not be made")
    num_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    adapt_cli = [sys.executable, "-m", "adapt.cli", "convert", str(base), str(out), "--attention", given.attention]
    commands = {"cp": ["cp", "-r", str(base), str(out)], "convert": adapt_cli}
    rounds = []
    for number in range(given.rounds):
        row: dict[str, Any] = {}
        for name in sorted(commands, reverse=number % 2 == 0):
            resident = settle(base, given.cache)
            row[name] = {**run(commands[name], out, sync=name == "cp"), "source_in_page_cache": resident}
            shutil.rmtree(out)
        rounds.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    from adapt.training.checkpoints.seal import versions  # after the last measurement: it imports torch

    ratios = [row["cp"]["seconds"] / row["convert"]["seconds"] for row in rounds]
    return {
        "summary": {
            "bytes": num_bytes,
            "speed_relative_to_cp": {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            },
            "peak_rss_bytes": max(row["convert"]["peak_rss_bytes"] for row in rounds),
            "cp_seconds": [row["cp"]["seconds"] for row in rounds],
            "convert_seconds": [row["convert"]["seconds"] for row in rounds],
            "cp_cpu_seconds": [row["cp"]["cpu_seconds"] for row in rounds],
            "convert_cpu_seconds": [row["convert"]["cpu_seconds"] for row in rounds],
            "load": [row["convert"]["load"] for row in rounds],
            "cache": given.cache,
        },
        "rounds": rounds,
        "date": date.today().isoformat(),
        "hardware": {"machine": platform.processor() or platform.machine(), "cpu": _cpu(), "cores": os.cpu_count()},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {**versions(), "cp": _cp_version()},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _cp_version() -> str:
    return subprocess.run(["cp", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
