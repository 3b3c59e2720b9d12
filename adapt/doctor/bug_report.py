"""What is kept of a mistake of ours: the traceback in a file, and one line that names it and says how to report it."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
from importlib import metadata

OURS = "a mistake of ours, not of yours"
_PACKAGES = ("adapt-dlm", "torch", "transformers", "deepspeed")


def written(error: BaseException, argv: list[str]) -> str:
    """The line; never an exception, whatever is full, gone or broken: then the line is all there is."""
    try:
        line = " ".join(str(error).split())
    except Exception:  # an exception whose words are broken too
        line = "?"
    what = f"{OURS} ({type(error).__name__}: {line[:200]})"
    try:
        descriptor, path = tempfile.mkstemp(prefix="adapt-bug-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_report(error, argv))
    except Exception:  # no temporary folder that can be written to
        return f"{what}; please report it{_where()} with what --debug shows: the same command with --debug at its end"
    return f"{what}; please report it{_where()} with {path}, which holds the traceback and your command line"


def _report(error: BaseException, argv: list[str]) -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    rank = f", rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    said = "".join(traceback.format_exception(error))
    return f"$ adapt {shlex.join(argv)}\nPython {sys.version.split()[0]}, {versions}{rank}\n\n{said}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _where() -> str:
    """ " at URL": the issue tracker that pyproject.toml names, where it names one."""
    try:
        urls = metadata.metadata("adapt-dlm").get_all("Project-URL") or []
        return next(f" at {url.split(',', 1)[1].strip()}" for url in urls if url.lower().startswith("issues,"))
    except Exception:  # not installed, or nothing of the kind in it
        return ""
