"""`adapt lm_eval`: lm-eval's own command line with `--model adapt` registered.

adapt lm_eval --model adapt --model_args pretrained=out/smollm2,threshold=0.8 --tasks gsm8k --batch_size 8

What lm-eval cannot save it logs, and ends well: so it saves into a folder of ours, from which results are moved. Its cache of answers
does not know whose they are: so a note beside it does.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from adapt import progress
from adapt.files.json_file import read_json
from adapt.files.marks import MARK
from adapt.files.model_folder import check_named_folders
from adapt.files.outputs import check_file, check_folder, kept_if_it_fails
from adapt.files.provenance import first_change, model_files
from adapt.files.staging import write_whole
from adapt.settings.bounds import Bounds, check_value, lone_texts

from .checks import Shots
from .model_args import check_model_args, model_args_help

_Limit = Annotated[float, Bounds(0, 1e9, low_is_open=True)]


def main(argv: list[str]) -> int:
    """lm-eval's own command line with `--model adapt` registered; its help ends with the --model_args that are ours."""
    given = _given(argv)
    if given.use_cache is not None:
        _check_cache(Path(given.use_cache), given.model, given.model_args)
    if given.output_path is None or not progress.is_main():
        _run(argv)
        return 0
    out, is_file = Path(given.output_path), given.output_path.endswith(".json")  # lm-eval puts the date into that name
    folder = check_folder(out.parent if is_file else given.output_path, "output_path")
    with kept_if_it_fails("lm_eval", f"output_path={out}") as results:
        _run([*argv, "--output_path", str(results / out.name if is_file else results)])
        _move(results, folder)
    return 0


def _given(argv: list[str]) -> argparse.Namespace:
    """What concerns us of lm-eval's arguments, which it checks itself."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for name, short in (("output_path", "-o"), ("use_cache", "-c"), ("model", "-M")):
        parser.add_argument(short, f"--{name}")
    parser.add_argument("-a", "--model_args", nargs="*", action="extend", default=[])
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        return argparse.Namespace(output_path=None, use_cache=None, model=None, model_args=[])


def _run(argv: list[str]) -> None:
    from lm_eval.__main__ import HarnessCLI, setup_logging

    before = sys.argv
    # lm-eval puts `run` in front only of two arguments or more; one alone is a subcommand or --help.
    sys.argv = ["adapt lm_eval", *argv]
    try:
        setup_logging()
        command = HarnessCLI()
        options = _parsed(command, argv)
        _check(options)
        importlib.import_module(".lm", __package__)  # registers the model; after the checks, because it brings torch
        command.execute(options)
    finally:
        sys.argv = before
        if not argv or {"-h", "--help"} & set(argv):
            print(f"\n{model_args_help()}")


def _parsed(command: Any, argv: list[str]) -> Any:
    for problem in lone_texts(argv):
        raise ValueError(problem)
    try:
        return command.parse_args()
    except (MemoryError, RecursionError, TypeError) as error:  # of Python's own reader of values in --model_args
        raise ValueError(
            f"model_args: cannot be read ({type(error).__name__}); give name=value with commas between"
        ) from error


def _check(options: Any) -> None:
    """ValueError for what can be refused without torch. lm-eval's own commands (`ls`, `validate`) have none of it."""
    given = vars(options)
    check_value("limit", given.get("limit"), _Limit | None)
    check_value("num_fewshot", given.get("num_fewshot"), Shots | None)
    model_args = given.get("model_args")
    if given.get("model") != "adapt" or not isinstance(model_args, dict | None):
        return
    check_model_args(model_args or {})
    if model_args and "pretrained" in model_args:
        check_named_folders(model_args["pretrained"], model_args.get("adapter"), "pretrained")
    elif not given.get("config"):  # a file of lm-eval's may name it
        raise ValueError("model_args: has no pretrained, the checkpoint; add --model_args pretrained=FOLDER")


def _move(results: Path, folder: Path) -> None:
    """OSError where lm-eval has saved nothing, or a file cannot be written; ValueError where one is there already."""
    files = [path for path in sorted(results.rglob("*")) if path.is_file() and path.name != MARK]
    if not files:
        raise OSError(f"output_path={folder}: lm-eval saved nothing, and says why above")
    for path in files:
        target = folder / path.relative_to(results)
        if os.path.lexists(target):
            raise ValueError(f"{target} is there already")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, path.read_bytes())


def _check_cache(cache: Path, model: str | None, model_args: list[str]) -> None:
    """Notes beside lm-eval's cache whose answers it holds; ValueError where it holds another model's, or nobody knows whose."""
    check_file(cache, "use_cache")
    note, now = cache.with_name(f"{cache.name}.model.json"), _identity(model, model_args)
    made = any(cache.parent.glob(f"{glob.escape(cache.name)}_rank*.db"))
    if made and not note.is_file():
        raise ValueError(f"use_cache={cache}: holds answers, and no {note.name} says of which model; name another file")
    if made and (changed := first_change(read_json(note, f"use_cache={cache}"), now)):
        raise ValueError(
            f"use_cache={cache}: holds the answers of another model ({changed} differs); name another file"
        )
    write_whole(note, json.dumps(now, indent=1) + "\n")


def _identity(model: str | None, model_args: list[str]) -> dict[str, Any]:
    """What answers depend on: the model's arguments, and the files of the folders that they name (in lm-eval's form, or as JSON)."""
    folders = [word for word in re.split(r"[\s,={}:\"]+", " ".join(model_args)) if word and Path(word).is_dir()]
    files = {f"{folder}/{name}": found for folder in folders for name, found in model_files(folder).items()}
    return {"model": model, "model_args": model_args, **files}
