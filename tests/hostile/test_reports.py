"""What `adapt export --report` and `adapt compare --corpus` are given that is no report, and no file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from attack import attack

COMPARE = ["--base", "base", "--adapted", "checkpoint", "--tasks", "pairs", "--include_path", "tasks", "--out", "out"]


def test_a_pipe_where_a_file_is_read_twice_is_refused(yard: Path) -> None:
    os.mkfifo(yard / "pipe.txt")
    attack(yard, ["compare", *COMPARE, "--corpus", "pipe.txt"], "corpus=pipe.txt: is no file")
    attack(yard, ["export", "checkpoint", "out", "--report", "pipe.txt"], "report=pipe.txt: is no file")


REPORTS = {
    "deep": "[" * 5000,
    "a list": "[]",
    "a text": '"report"',
    "an empty row": {"quality": [{}]},
    "a text for a row": {"quality": ["a"]},
    "a text for a number": {"quality": [{"task": "a", "metric": "b", "adapted": {"value": "c"}}]},
    "a number for a task": {"quality": [{"task": 1, "metric": "b", "adapted": {"value": 1}}]},
    "a text for rows": {"speed": "abc"},
    "a text for provenance": {"provenance": "a"},
    "a list for a sampler": {"provenance": {"arms": {"adapted": {}}, "sampler": [1]}},
    "an unknown sampler": {"provenance": {"arms": {"adapted": {}}, "sampler": {"a": 1}}},
    "a command without its end": {"provenance": {"arms": {"adapted": {}}, "command": "adapt 'x"}},
    "a number for a command": {"provenance": {"arms": {"adapted": {}}, "command": 5}},
}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_that_is_none_is_refused(yard: Path, kind: str) -> None:
    good = {
        "provenance": {"arms": {"adapted": {}}},
        **{key: [] for key in ("quality", "speed", "likelihood", "pareto")},
    }
    made = REPORTS[kind]
    text = made if isinstance(made, str) else json.dumps(good | {"warnings": []} | made)
    (yard / "report.json").write_text(text)
    (yard / "report.md").write_text("# Report")
    attack(yard, ["export", "checkpoint", "out", "--report", "report.json"], "report=report.json: ")
