"""The wheel holds what the folders hold, under the names that they are imported by."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"adapt": "adapt", "adapt_eval": "eval", "adapt_recipes": "recipes", "adapt_launch": "launch"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build/ or egg-info is left here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        (source / file).write_bytes((ROOT / file).read_bytes())
    for name in FOLDERS.values():
        for file in _files(ROOT / name):
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("adapt_dlm-*.whl"))


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(part.startswith((".", "__pycache__")) for part in p.parts[-3:]))


def test_package_list_is_every_folder_that_holds_modules(pyproject: dict) -> None:
    on_disk = set()
    for name, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(pyproject["tool"]["setuptools"]["packages"]) == on_disk
    assert pyproject["tool"]["setuptools"]["package-dir"] == FOLDERS


def test_no_module_lies_outside_the_packages() -> None:
    for folder in FOLDERS.values():
        homes = {path.parent for path in _files(ROOT / folder) if path.suffix == ".py"}
        assert all((home / "__init__.py").exists() for home in homes), homes


def test_no_file_shadows_a_dependency(pyproject: dict) -> None:
    # `deepspeed recipes/train.py` puts that folder first on sys.path.
    requirements = [*pyproject["project"]["dependencies"]]
    for extra in pyproject["project"]["optional-dependencies"].values():
        requirements += extra
    names = {re.split(r"[\[<>=]", requirement)[0].replace("-", "_") for requirement in requirements}
    names |= set(sys.stdlib_module_names) | {"yaml"}
    for folder in ("recipes", "eval", "launch"):
        assert not names & {path.stem for path in (ROOT / folder).glob("*.py")}


def test_wheel_holds_every_file_of_the_folders(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in FOLDERS.items():
        for file in _files(ROOT / folder):
            if file.suffix != ".md":
                assert f"{name}/{file.relative_to(ROOT / folder).as_posix()}" in packed
    tops = {entry.split("/")[0] for entry in packed}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(FOLDERS)


def test_wheel_imports_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import adapt, adapt.cli, adapt_eval, adapt_recipes, adapt_launch, json, sys\n"
        "from importlib.resources import files\n"
        f"site = {str(tmp_path / 'site')!r}\n"
        "assert all(m.__file__.startswith(site) for m in (adapt, adapt_eval, adapt_recipes, adapt_launch))\n"
        "assert json.loads((files('adapt_launch') / 'ds' / 'zero2.json').read_text())\n"
        "assert 'torch' not in sys.modules\n"
        "assert adapt.cli.main(['--help']) == 0\n"
    )
    # -P (3.11) would be shorter; cwd is elsewhere and PYTHONPATH comes before the editable install.
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_is_said_once_and_the_same(pyproject: dict) -> None:
    import adapt

    assert adapt.__version__ == pyproject["project"]["version"]


def test_every_dependency_has_a_tested_version(pyproject: dict) -> None:
    tested = {
        re.split(r"==", line)[0].replace("_", "-").lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    requirements = [*pyproject["project"]["dependencies"]]
    for extra in pyproject["project"]["optional-dependencies"].values():
        requirements += extra
    names = {re.split(r"[\[<>=]", requirement)[0].replace("_", "-").lower() for requirement in requirements}
    assert names - {"adapt-dlm"} <= tested


def test_make_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.18"\nexit 1\n')
    old.chmod(0o755)
    cases = {
        f"PYTHON={old}": "make: Python 3.9.18 is too old; install Python 3.10 or newer",
        f"PYTHON={tmp_path}/none": f"make: {tmp_path}/none not found",
        "CXX=no-such-compiler": "make: no C++ compiler (no-such-compiler)",
    }
    for setting, message in cases.items():
        done = subprocess.run(["make", "install", setting], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        ours = [line for line in done.stderr.splitlines() if "***" not in line]
        assert len(ours) == 1
        assert ours[0].startswith(message)
    assert not (tmp_path / ".venv").exists()


def test_an_export_asks_for_the_versions_that_this_package_asks_for(pyproject: dict) -> None:
    from adapt.export.export import REQUIREMENTS

    assert set(REQUIREMENTS) <= set(pyproject["project"]["dependencies"])
