"""Links and files that are none, in the folders of strangers: nothing of this machine is read or copied through them."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapt.files.model_folder import check_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """models--a--b/snapshots/f00, as in the Hub's cache, and a secret outside of it."""
    folder = tmp_path / "models--a--b" / "snapshots" / "f00"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("-----BEGIN PRIVATE KEY-----")
    return folder


@pytest.mark.parametrize(
    "file", ["bpe.codes", "source.spm", "prophetnet.tokenizer", "vocab", "merges.TXT", "vocab.json"]
)
def test_a_link_out_is_refused_whatever_a_tokenizer_calls_its_files(folder: Path, file: str) -> None:
    (folder / file).symlink_to("../../../secret")
    with pytest.raises(ValueError, match=f"base=x: {file} is a link to ../../../secret"):
        check_files(folder, "base=x")


def test_links_that_nothing_reads_are_left_alone(folder: Path) -> None:
    for file in ("README.md", "LICENSE", "pytorch_model.bin"):
        (folder / file).symlink_to("../../../secret")
    (folder / "old_run").symlink_to("../../../nowhere")
    (folder / "logs").symlink_to("../../..")
    check_files(folder, "base=x")


def test_the_blobs_of_the_hubs_cache_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "large_disk" / "0").write_text("{}")
    (folder.parent.parent / "blobs").symlink_to(tmp_path / "large_disk")
    (folder / "bpe.codes").symlink_to("../../blobs/0")
    check_files(folder, "base=x")
