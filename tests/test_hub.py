"""Hub ids: what the cache holds of a stranger's repository is checked like a folder of a stranger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from adapt.files.loading import check_weights, config_of, model_of, tokenizer_of, weights_of

_READERS = (config_of, tokenizer_of, model_of, weights_of, check_weights)


@pytest.fixture
def snapshot(base_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody/model in a cache of the Hub, whose files are links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home, revision = tmp_path / "models--somebody--model", "f" * 40
    for part in ("refs", "blobs", f"snapshots/{revision}"):
        (home / part).mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    for i, file in enumerate(sorted(base_folder("qwen3").iterdir())):
        shutil.copyfile(file, home / "blobs" / str(i))
        (home / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{i}")
    return home / "snapshots" / revision


def test_a_model_in_the_hubs_cache_is_read_under_its_name(snapshot: Path) -> None:
    for read in _READERS:
        read("somebody/model", "base=x")
    assert model_of("somebody/model", "base=x").name_or_path == "somebody/model"


@pytest.mark.parametrize("read", _READERS)
def test_an_adapter_in_a_cached_model_brings_no_other_weights(snapshot: Path, read) -> None:
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "attacker/evil"}))
    with pytest.raises(ValueError, match="base=x: is a model and an adapter at once"):
        read("somebody/model", "base=x")


def test_a_cached_model_is_held_against_its_weights(snapshot: Path) -> None:
    weights = snapshot / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, weights)
    with pytest.raises(ValueError, match=r"base=x: no weights for model\.layers\.1"):
        model_of("somebody/model", "base=x")


@pytest.mark.parametrize("read", _READERS)
def test_a_model_that_is_not_in_the_cache_is_one_line(snapshot: Path, read) -> None:
    with pytest.raises(ValueError, match="base=x: no such folder here, and the Hub cannot be asked"):
        read("nobody/nothing", "base=x")
