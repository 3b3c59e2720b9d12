"""Bad numbers and places of processes: `adapt doctor` and a rank that is started wrongly say one line, and start nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from attack import attack

from adapt.doctor import all_reduce
from adapt.training.engine import ports

NO_COUNTS = [
    "0",
    "-1",
    "-999999999999",
    "1000000",
    str(2**63),
    str(10**30),
    "1.5",
    "nan",
    "inf",
    "-inf",
    "two",
    "",
    " ",
    "1;id",
    "$(id)",
]


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["ranks", "timeout"])
@pytest.mark.parametrize(
    "other", [[], ["--ranks", "2"], ["--all_reduce_only"]], ids=lambda other: " ".join(other) or "alone"
)
def test_the_doctor_refuses_what_is_no_count_before_it_starts_a_process(
    yard: Path, option: str, value: str, other: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_reduce.subprocess, "Popen", None)
    attack(yard, ["doctor", *other, f"--{option}={value}"], option)


@pytest.mark.parametrize(
    "port", ["", " ", "0", "-1", "65536", str(10**30), "1.5", "29500;id", "$(id)", "http", "٢٩٥٠٠"]
)
@pytest.mark.parametrize("deepspeed", ["null", "zero0", "zero2"])
def test_a_rank_whose_port_is_none_says_so(
    yard: Path, port: str, deepspeed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "_free_here", set())
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, value)
    attack(yard, ["train", "--config", "recipe.yaml", "--training.deepspeed", deepspeed], f"MASTER_PORT={port.strip()}")
