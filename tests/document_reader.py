"""Reads a document as somebody does who types its lines: each command is parsed by what would run it, and what it makes is kept.

No command does its work here. A verb's own parser reads its options and stops; launch/'s scripts run with stand-ins for Slurm,
ssh and deepspeed, and what they would have started is read in the same way.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from documents import ROOT, Command, named_files

from adapt import cli
from adapt.training.recipe import Recipe, parse_recipe

READS = {
    "compare": ("base", "adapted", "control", "include_path", "corpus"),
    "convert": ("base", "adapter"),
    "export": ("checkpoint", "adapter", "report"),
    "generate": ("checkpoint", "adapter", "prompts"),
    "plan": ("model_config", "benchmark"),
    "plot": ("runs",),
}
MAKES = ("out", "output_path")
SLURM = {  # of a job of two nodes with eight GPUs each, as its first rank sees it
    "SLURM_GPUS_PER_NODE": "8",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node-[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_PROCID": "0",
}
PLAIN = {".", "cat", "cd", "export", "git", "hf", "ls", "pip", "pkill", "tensorboard"}
"""Commands that are not ours; the files that they name are looked for."""


class Parsed(Exception):
    """Raised in place of a command's work: its settings."""


def stopping(parse: Callable) -> Callable:
    def parse_and_stop(self, *args, **kwargs):
        settings = parse(self, *args, **kwargs)
        if isinstance(self, jsonargparse.ArgumentParser):
            self.instantiate(settings)  # dataclasses check their own fields
        raise Parsed(settings)

    return parse_and_stop


class Reader:
    """Follows a document line by line, in a folder that looks like the repository's root, and keeps what the lines have made."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.made = folder, set[str]()
        self.hub = _hub_ids()
        for entry in ROOT.iterdir():
            # The launch scripts put .venv/bin before everything else on PATH, also before what stands in for ssh and deepspeed.
            if entry.name not in (".venv", "quickstart", "quickstart-fast", "runs", "out"):
                (folder / entry.name).symlink_to(entry)
        for name, body in named_files(text).items():
            (folder / name).write_text(body)

    def follow(self, command: Command) -> None:
        """Raises AssertionError, ValueError or SystemExit where the line cannot work."""
        name, *rest = command.argv
        if command.output:
            self.made.add(command.output)
        if name.startswith("launch/"):
            self._script(command, ["bash", *command.argv])
        elif name == "sbatch":
            script = next(i for i, word in enumerate(rest) if word[0] != "-")
            options = {word[2:].partition("=")[0]: word.partition("=")[2] for word in rest[:script]}
            names = {"SLURM_" + name.upper().replace("-", "_"): value for name, value in options.items()}
            self._script(command._replace(environment={**command.environment, **names}), ["bash", *rest[script:]])
        else:
            of_name = {"adapt": self.adapt, "cp": self._copy, "deepspeed": self._deepspeed}
            of_name |= {"make": self._make, "python": self._python}
            assert name in of_name or name in PLAIN, f"unknown command {name}"
            of_name.get(name, self._plain)(rest)

    def adapt(self, argv: list[str]) -> None:
        verb, *rest = argv
        assert verb in cli.VERBS, f"adapt {verb}: no such verb"
        if rest == ["--help"]:
            return None
        if verb == "train":
            return self._train(rest)
        module, _, function = cli.VERBS[verb].target.partition(":")
        settings = vars(_settings(lambda: getattr(importlib.import_module(module), function)(rest)))
        for key in READS.get(verb, ()):
            for path in _as_list(settings.get(key)):
                self.must_exist(str(path).rpartition("=")[2])
        if verb == "lm_eval":
            self.must_exist(settings["model_args"]["pretrained"])
        self.made |= {str(settings[key]) for key in MAKES if settings.get(key)}

    def _train(self, argv: list[str]) -> None:
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # a recipe is more than its parser: sections are held against each other
            patch.setattr(jsonargparse.ArgumentParser, "parse_args", _plain_parse)
            recipe: Recipe = parse_recipe(argv)
        for path in [recipe.model.base, *_as_list(recipe.data.train)]:
            self.must_exist(path)
        self.made.add(recipe.training.output_dir)

    def _recipe(self, argv: list[str]) -> Recipe:
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # a recipe is more than its parser: sections are held against each other
            patch.setattr(jsonargparse.ArgumentParser, "parse_args", _plain_parse)
            return parse_recipe(argv)

    def _deepspeed(self, argv: list[str]) -> None:
        from deepspeed.launcher.runner import parse_args

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", _plain_argparse)
            launched = parse_args(argv)
        if launched.hostfile != "/job/hostfile":
            self.must_exist(launched.hostfile)
        self.must_exist(launched.user_script)
        verb = Path(launched.user_script).stem
        self.adapt([verb, *launched.user_args])

    def _script(self, command: Command, argv: list[str]) -> None:
        """Runs one of launch/'s scripts; what it starts, a deepspeed or the task of a rank, is read."""
        record, stubs = self.folder / "record", self.folder / "stubs"
        if not stubs.exists():
            stubs.mkdir()
            for name in ("deepspeed", "python"):
                _stand_in(stubs / name, f'printf "%s\\n" $(($# + 1)) {name} "$@" >> "$RECORD"')
            _stand_in(stubs / "scontrol", "echo node-0; echo node-1")
            _stand_in(stubs / "srun", 'while [[ $1 == -* ]]; do shift; done; "$@"')
        record.write_text("")
        if hostfile := command.environment.get("HOSTFILE"):
            self.must_exist(hostfile)
        path = {"PATH": f"{stubs}{os.pathsep}/usr/bin{os.pathsep}/bin", "RECORD": str(record)}
        environment = {**os.environ, **SLURM, "SLURM_SUBMIT_DIR": str(self.folder), **path, **command.environment}
        done = subprocess.run(argv, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = record.read_text().splitlines()
        assert lines, f"{command}: started nothing"
        while lines:
            count = int(lines[0])
            self.follow(command._replace(environment={}, argv=lines[1 : count + 1]))
            lines = lines[count + 1 :]

    def _python(self, argv: list[str]) -> None:
        if argv[0] == "-c":
            compile(argv[1], "-c", "exec")
        elif argv[:2] == ["-m", "adapt.training.recipe"]:  # what launch/run_multinode.sh hands to other nodes
            self._recipe(argv[3:]).save(self.folder / argv[2])
        elif argv[0] == "-m":
            assert argv[1] in ("adapt.cli", "pytest", "pip", "venv", "jupyter"), argv
        elif argv[0] == "-u" or argv[0] in ("recipes/train.py", "recipes/doctor.py"):
            script, *rest = argv[1:] if argv[0] == "-u" else argv
            self.must_exist(script)
            self.adapt([Path(script).stem, *rest])
        elif argv[0].startswith("benchmarks/"):
            file = ROOT / argv[0]
            if "Parser(" not in file.read_text():
                assert argv[1:] == [], f"{argv[0]} takes no arguments"
                return
            before = set(sys.modules)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", argv)
                patch.syspath_prepend(file.parent)
                _settings(lambda: runpy.run_path(str(file), run_name="__main__"))
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(file.parent)):
                    del sys.modules[name]  # `arms`, `train` and so on are names that other folders use too
        else:
            for path in argv:
                self.must_exist(path)

    def _make(self, argv: list[str]) -> None:
        done = subprocess.run(["make", "-n", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        if "quickstart" in argv:
            [line] = re.findall(r"adapt (quickstart.*)", done.stdout)
            self.adapt(line.split())
            self.made.add("quickstart-fast" if "--fast" in line else "quickstart")

    def _copy(self, argv: list[str]) -> None:
        source, target = argv
        self.must_exist(source)
        shutil.copy(self.folder / source, self.folder / target)

    def _plain(self, argv: list[str]) -> None:
        for word in argv:
            is_path = "/" in word and not re.search(r"[=:(]", word) and not word.startswith(("-", "/", ".venv/"))
            if is_path:
                self.must_exist(word)

    def exists(self, path: str) -> bool:
        parents = {str(parent) for parent in [Path(path), *Path(path).parents]}
        of_reader = Path(path).name.startswith("my_") or re.fullmatch(r"[A-Z][A-Z0-9_]*(/.*)?", path)
        return bool(of_reader or (self.folder / path).exists() or parents & {str(Path(m)) for m in self.made}) or (
            path in self.hub
        )

    def must_exist(self, path: str) -> None:
        assert self.exists(path), f"{path}: is not in the repository, and no line before makes it"


_plain_parse, _plain_argparse = jsonargparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_args


def _settings(work: Callable[[], object]) -> Any:
    with pytest.raises(Parsed) as stopped:
        work()
    return stopped.value.args[0]


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _hub_ids() -> set[str]:
    """The models and data sets that recipes name."""
    files = [path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "quickstart"]
    recipes = [yaml.safe_load(path.read_text()) for path in files]
    return {recipe["model"]["base"] for recipe in recipes} | {recipe["data"]["train"] for recipe in recipes}


def _stand_in(file: Path, body: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
    file.chmod(0o755)
