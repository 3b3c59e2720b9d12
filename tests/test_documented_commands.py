"""Every command line of README and docs: its options exist, its recipe loads, what it reads is there or was made by a line before."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import jsonargparse
import pytest
from document_reader import Reader, stopping
from documents import DOCUMENTS, Command, commands, inline_commands

RECIPE = "recipes/smollm2-135m/prefix.yaml"


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for parser in (jsonargparse.ArgumentParser, argparse.ArgumentParser):
        monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))


def _follow_all(text: str, folder: Path, found: list[Command], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(folder, text)
    monkeypatch.chdir(folder)
    for command in found:
        try:
            reader.follow(command)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{command}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_works(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = document.read_text()
    inline = [command._replace(argv=_whole(command.argv)) for command in inline_commands(text)]
    _follow_all(text, tmp_path, sorted([*commands(text), *inline], key=lambda command: command.line), monkeypatch)


def _whole(argv: list[str]) -> list[str]:
    """What stands inside a sentence, as a line that could be typed: an option goes to a recipe, RECIPE is one."""
    argv = [RECIPE if word in ("RECIPE", "RECIPE.yaml") else word for word in argv]
    if argv[0].startswith("--sampler."):
        return ["adapt", "generate", "CKPT", "--prompt", "Hello", *argv]
    if argv[0].startswith("--"):
        return ["adapt", "train", "--config", RECIPE, "--model.base", "BASE", "--data.train", "DATA", *argv]
    return [*argv, "--help"] if argv[0] == "adapt" and len(argv) == 2 else argv


@pytest.mark.parametrize(
    "line, why",
    [
        ("adapt convrt BASE OUT", "adapt convrt: no such verb"),
        ("adapt convert BASE OUT --atention prefix", "SystemExit: 2"),
        ("adapt generate CKPT --prompt Hello --sampler.threshold 2", "sampler.threshold=2"),
        ("adapt generate out/nothing --prompt Hello", "out/nothing: is not in the repository"),
        ("adapt train --config recipes/none.yaml", "SystemExit: 2"),
        (f"deepspeed --gpus 8 recipes/train.py --config {RECIPE}", "SystemExit: 2"),
        (f"deepspeed recipes/trian.py --config {RECIPE}", "recipes/trian.py: is not in the repository"),
        (f"sbatch launch/slurm.sbatch --config --config {RECIPE}", "SystemExit: 2"),
        ("sbatch launch/slurm.sbatch recipes/none.yaml", "SystemExit: 2"),
        (f"sbatch --gpus-per-node=4 launch/slurm.sbatch {RECIPE}", "make it --gpus-per-node=4"),
        (f"HOSTFILE=hosts launch/run_multinode.sh {RECIPE}", "hosts: is not in the repository"),
        ("python benchmarks/train.py --sope Q", "SystemExit: 2"),
        ("make quickstrt", "No rule to make target"),
        ("adopt convert BASE OUT", "unknown command adopt"),
    ],
)
def test_a_line_that_cannot_work_is_found(line: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"```bash\n{line}\n```\n"
    with pytest.raises(pytest.fail.Exception, match=re.escape(why)):
        _follow_all(text, tmp_path, commands(text), monkeypatch)
