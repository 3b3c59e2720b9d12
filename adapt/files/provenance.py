"""Where something comes from: files by hash, packages by version, this code by revision."""

from __future__ import annotations

import hashlib
import io
import platform
import struct
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

_HASHED_WHOLE = 4 << 30  # bytes; a few seconds
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_REMEMBERED = 64 << 20  # bytes from which a file is hashed once in a process, unless it changes
_MODEL_FILES = (
    *("config.json", "adapter_config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)

Files = dict[str, dict[str, Any]]
"""{name: {"bytes", "sha256"}}"""


def sha256(file: Path | BinaryIO) -> str:
    """Of a file, or of the rest of one that is open."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return sha256(opened)
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    while size := file.readinto(buffer):  # pyright: ignore[reportAttributeAccessIssue]
        digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def sampled_files(paths: Iterable[Path]) -> Files:
    """Files by name: size, and the sha256 of at most 4 MiB spread over the file, so that it costs no time: for weights and reports.

    Not the time of modification: a copy or a checkout changes that and no content. What is no file is left out.
    """
    found: Files = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                found[str(path)] = sampled(file)
    return found


def whole_files(paths: Iterable[Path]) -> Files:
    """Files by name: size, and the sha256 of all bytes of a file of up to 4 GiB (a second a GB); for data, of which any line counts.

    Of a larger file it is of 4 GiB, in pieces of 1 MiB that are spread evenly over it, its first and last bytes among them: what
    changes between the pieces alone is not seen.
    """
    found: Files = {}
    for path in paths:
        if path.is_file():
            at = path.stat()
            look = _hash_once if at.st_size >= _REMEMBERED else _hash_once.__wrapped__
            found[str(path)] = dict(look(str(path.absolute()), at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns))
    return found


@lru_cache(64)
def _hash_once(path: str, *_: int) -> dict[str, Any]:
    with open(path, "rb") as file:
        return sampled(file, _HASHED_WHOLE >> 20, 1 << 20)


def sampled(file: BinaryIO, samples: int = _SAMPLES, sample_bytes: int = _SAMPLE_BYTES) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file that is open, as `sampled_files` has them: of all of it where it is no more than the samples."""
    size, digest = file.seek(0, io.SEEK_END), hashlib.sha256()
    file.seek(0)
    if size <= samples * sample_bytes:
        return {"bytes": size, "sha256": sha256(file)}
    for i in range(samples):  # the first and the last bytes among them
        file.seek((size - sample_bytes) * i // (samples - 1))
        digest.update(file.read(sample_bytes))
    return {"bytes": size, "sha256": digest.hexdigest()}


def model_files(base: str | Path) -> Files:
    """`sampled_files` of what a model folder computes and reads text with, or of a .gguf file, by bare names; nothing for a Hub id."""
    path = Path(base)
    files = [path] if path.is_file() else [file for name in _MODEL_FILES for file in sorted(path.glob(name))]
    return {Path(name).name: found for name, found in sampled_files(files).items()}


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The name of a file that is another one now, or is there in one of them only; None where they are the same."""
    return next((name for name in sorted({*before, *now}) if before.get(name) != now.get(name)), None)


def checkpoint_sha256(folder: Path) -> dict[str, Any]:
    """sha256 of a model folder's config.json and of its safetensors; nothing for a Hub id."""
    if not (folder / "config.json").is_file():
        return {}
    weights = {file.name: _safetensors_sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return {"config_sha256": sha256(folder / "config.json"), "safetensors": weights}


def _safetensors_sha256(path: Path) -> dict[str, str]:
    """Of the header (names, types, shapes; cheap at any size) and, of files up to 4 GiB, of all of it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = {"header_sha256": hashlib.sha256(file.read(length)).hexdigest()}
    if path.stat().st_size <= _HASHED_WHOLE:
        found["sha256"] = sha256(path)
    return found


def versions(distributions: Mapping[str, str]) -> dict[str, str]:
    """Python's version, and by the keys of {key: distribution} those of packages; this one's from its source where not installed."""
    import adapt

    found = {"python": platform.python_version()}
    for key, distribution in distributions.items():
        try:
            found[key] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[key] = adapt.__version__ if distribution == "adapt-dlm" else "not installed"
    return found


def git_revision() -> str | None:
    """Revision of the checkout that this file lies in, `-dirty` if it has changes; None outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # installed, inside of somebody else's checkout
        return None
    revision = git("rev-parse", "HEAD")
    return revision and revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
