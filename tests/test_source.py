"""Where a base comes from: its code, its licence, the Hub, and what is not taken from a stranger's folder."""

import errno
import json
import shutil

from huggingface_hub.utils import filter_repo_objects
from tiny_models import build_tokenizer, save_base

from adapt.cli import main as cli
from adapt.conversion.convert import convert
from adapt.files import hub as source

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
pathlib.Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, marker = save_base("llama", tmp_path / "base", build_tokenizer()), tmp_path / "ran"
    (base / "own.py").write_text(_CODE.format(marker=str(marker)))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    assert cli(["convert", str(base), str(tmp_path / "out")]) == 1
    assert "say --trust_remote_code true" in capsys.readouterr().err
    assert not marker.exists()
    assert cli(["convert", str(base), str(tmp_path / "out"), "--trust_remote_code", "true"]) == 0, (
        capsys.readouterr().err
    )
    assert marker.exists()
    out = str(tmp_path / "out")
    assert (tmp_path / "out" / "own.py").is_file()
    marker.unlink()
    write = ["generate", out, "--prompt", "The cat", "--max_new_tokens", "2"]
    for command in (write, ["export", out, str(tmp_path / "exported")]):
        assert cli(command) == 1
        assert f"checkpoint={out}: is made by Python code of its own" in capsys.readouterr().err
    assert not marker.exists()
    assert cli([*write, "--trust_remote_code", "true"]) == 0, capsys.readouterr().err
    assert marker.exists()


def test_a_hub_id_offline_is_told_apart_from_a_folder(tmp_path, capsys):
    assert cli(["convert", "nobody/nothing-of-that-name", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "base=nobody/nothing-of-that-name: no such folder here, and the Hub cannot be asked" in said
    assert "give the path of a folder, or go online" in said
    assert not list(tmp_path.iterdir())


def test_a_full_hub_cache_is_told_apart_from_a_full_disk_of_the_output(tmp_path, monkeypatch, capsys):
    def snapshot(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    assert cli(["convert", "somebody/model", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "base=somebody/model: the disk of the Hub's cache is full" in said
    assert "export HF_HOME" in said


def test_the_licence_of_a_hub_model_is_fetched_and_copied(base_folder, tmp_path, monkeypatch):
    hub = shutil.copytree(base_folder("qwen3"), tmp_path / "hub")
    (hub / "USE_POLICY.md").write_text("be good")

    def snapshot(repo, *, allow_patterns, ignore_patterns):
        wanted = shutil.copytree(base_folder("qwen3"), tmp_path / "snapshot")
        names = [path.name for path in hub.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copyfile(hub / name, wanted / name)
        return str(wanted)

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    out = convert("somebody/model", tmp_path / "out", verify=False)
    assert (out / "USE_POLICY.md").read_text() == "be good"


def test_a_link_does_not_bring_a_stranger_s_file_into_the_checkpoint(base_folder, tmp_path):
    base = shutil.copytree(base_folder("qwen3"), tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (base / "NOTICE").write_text("free")
    out = convert(base, tmp_path / "out", verify=False)
    assert not (out / "LICENSE").exists()
    assert (out / "NOTICE").read_text() == "free"
    assert not [path for path in out.iterdir() if path.is_symlink()]
