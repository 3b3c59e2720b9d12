"""Links and files that are none, in the folders of strangers: nothing of this machine is read or copied through them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapt.files.model_folder import check_files, copy_extras, licence_named


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


CARDS = {
    "5,000 brackets": "---\nlicense: " + "[" * 5000 + "]" * 5000 + "\n---\n",
    "a list": "---\n- license\n---\n",
    "no end": "---\nlicense: mit\n" + "a" * (2 << 20),
    "a number that is none": "---\nlicense: !!int x\n---\n",
    "a date that is none": "---\nlicense: 2020-99-99\n---\n",
    "of another kind": "---\nlicense: [mit]\n---\n",
    "no metadata": "# A model\n",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_broken_model_card_names_no_licence(folder: Path, name: str) -> None:
    (folder / "README.md").write_text(CARDS[name])
    assert licence_named(folder) is None


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir])
def test_a_model_card_that_is_no_file_is_not_read(folder: Path, tmp_path: Path, make) -> None:
    make(folder / "README.md")
    check_files(folder, "base=x")
    assert licence_named(folder) is None
    copy_extras(folder, tmp_path, trust_remote_code=False)
    assert not (tmp_path / "README.md").exists()


def test_a_model_card_names_its_licence(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- a\n---\n# A model\n")
    assert licence_named(folder) == "apache-2.0"
