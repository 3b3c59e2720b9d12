"""Everything that only a GPU can show, in one command: most valuable first, each part with a time limit of its own.

    python benchmarks/gpu.py --minutes 9                              # results/gpu-NAME-DATE.json and .md
    python benchmarks/gpu.py --minutes 3 --parts kernels,zero --out some/folder/name
    python benchmarks/gpu.py --device cpu --minutes 20 --out /tmp/x   # a rehearsal on tiny shapes; proves nothing about speed

Each part is a process of its own: one that fails, or hangs until its time is over, is told and the next begins. Time that a part
leaves goes to those after it. JSON and page are written anew after each part.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu_parts import PARTS, Part, write_json
from machine import machine

from adapt.arguments import CommandParser

RESULTS = Path(__file__).parent / "results"
SHORTEST = 20.0  # seconds; a part that would get less is not begun
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""dense bf16, of the makers' data sheets; the first name that is part of the GPU's"""

# (part's name, its empty folder) -> the command that runs it and writes result.json there
Command = Callable[[str, Path], list[str]]


def run_all(
    parts: Mapping[str, Part],
    command: Command,
    *,
    seconds: float,
    report: dict[str, Any],
    out: Path,
    scratch: Path,
    env: dict[str, str] | None = None,
    shortest: float = SHORTEST,
) -> dict[str, Any]:
    """The report with what came of each part, in out.json and out.md after each."""
    deadline = time.monotonic() + seconds
    names = list(parts)
    for i, name in enumerate(names):
        left = deadline - time.monotonic()
        share = left * parts[name].seconds / sum(parts[other].seconds for other in names[i:])
        limit = min(left, max(share, shortest))
        if left < min(shortest, seconds):
            outcome = {"status": "skipped (time)", "reason": f"{max(left, 0):.0f} s were left", "seconds": 0.0}
        else:
            print(f"{name}: {parts[name].shows}; at most {limit:.0f} s", file=sys.stderr, flush=True)
            own = scratch / str(i)
            own.mkdir()
            outcome = run_one(command(name, own), own, limit, env)
            shutil.rmtree(own)  # a model's weights fill a small disk
        report["parts"].append({"part": name, "shows": parts[name].shows, **outcome})
        print(f"{name}: {outcome['status']} {outcome['reason']}".rstrip(), file=sys.stderr, flush=True)
        write_json(out.with_name(f"{out.name}.json"), report)
        out.with_name(f"{out.name}.md").write_text(page(report))
    return report


def run_one(command: list[str], folder: Path, limit: float, env: dict[str, str] | None) -> dict[str, Any]:
    """Runs a part's process for at most `limit` seconds; its outcome, with the end of what it printed where it failed."""
    began = time.monotonic()
    log, result = folder / "log.txt", folder / "result.json"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    outcome = json.loads(result.read_text()) if result.exists() else {"status": "unfinished", "figures": {}}
    if code is None and outcome["status"] in ("ok", "unfinished"):
        outcome |= {
            "status": "failed",
            "reason": f"ended after its {limit:.0f} s; what stands here it had found by then",
        }
    elif outcome["status"] == "unfinished":
        outcome |= {"status": "failed", "reason": f"its process ended with {code} (-9: killed; out of memory?)"}
    if outcome["status"] == "failed":
        outcome["log"] = log.read_text(errors="replace")[-8000:]
    return outcome | {"seconds": time.monotonic() - began, "limit_s": limit}


def _end(process: subprocess.Popen) -> None:
    """Ends the process and all that it has started, launchers' ranks too."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def page(report: dict[str, Any]) -> str:
    """The report as Markdown: where it comes from, what came of each part, the tables of those that have one."""
    about = report["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}" if about["gpu"] else "no GPU"
    lines = [
        f"# What {about['gpu'] or 'a CPU (a rehearsal on tiny shapes)'} showed",
        f"{about['date']}, {where}; {about['cpu']}, {about['cores']} cores; revision {about['git_revision']}; {versions}.",
        f"    {about['command']}",
        _table(
            [
                {key: part.get(key, "") for key in ("part", "shows", "status", "seconds", "reason")}
                for part in report["parts"]
            ]
        ),
    ]
    for part in report["parts"]:
        found = part.get("figures", {})
        tables = [_table(found["rows"])] if found.get("rows") else []
        tables += [found["table"]] if found.get("table") else []
        lines += [f"## {part['part']}: {part['shows']}", *tables] if tables else []
    return "\n\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(_cell(value) for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str("-" if value is None else value)
    return text.replace("|", "\\|").replace("\n", " ")


def main(argv: list[str]) -> int:
    """The command line; 1 if a part failed."""
    parser = CommandParser(prog="benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--device", type=str, default="cuda", help="cuda, or cpu for a rehearsal on tiny shapes")
    parser.add_argument(
        "--parts", type=str, default=",".join(PARTS), help="comma-separated; they run in the order of the default"
    )
    parser.add_argument(
        "--peak_tflops", type=float | None, default=None, help="of the GPU in bf16, for an MFU; known of some"
    )
    parser.add_argument(
        "--out", type=Path | None, default=None, help="without .json and .md; default: results/gpu-NAME-DATE"
    )
    given = parser.parse_args(argv)
    names = given.parts.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        raise SystemExit(f"benchmarks/gpu.py: parts={','.join(unknown)}: choose of {', '.join(PARTS)}")
    if given.device not in ("cuda", "cpu") or given.minutes <= 0:
        raise SystemExit(
            f"benchmarks/gpu.py: device={given.device}, minutes={given.minutes}: cuda or cpu, and more than 0"
        )
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: device=cuda: torch sees no GPU; --device cpu rehearses on tiny shapes")
    env = dict(os.environ)
    if given.device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    root = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    about = machine("gpu.py") | ({} if given.device == "cuda" else {"gpu": None})
    peak = given.peak_tflops or next(
        (v for name, v in PEAK_TFLOPS.items() if about["gpu"] and name in about["gpu"]), None
    )
    slug = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or "cpu").lower().removeprefix("nvidia ")).strip("-")
    out = given.out or RESULTS / f"gpu-{slug}-{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)

    def command(name: str, folder: Path) -> list[str]:
        setting = {"device": given.device, "tiny": given.device == "cpu", "scratch": str(folder), "peak_tflops": peak}
        return [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), name, json.dumps(setting)]

    report = {"provenance": about, "peak_tflops": peak, "minutes": given.minutes, "parts": []}
    parts = {name: PARTS[name] for name in PARTS if name in names}
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        run_all(parts, command, seconds=60 * given.minutes, report=report, out=out, scratch=Path(scratch), env=env)
    print(page(report))
    return int(any(part["status"] == "failed" for part in report["parts"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
