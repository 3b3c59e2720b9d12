"""Conversion in bounded memory: rows, dtypes, padding and metadata right; nothing half-written however it is stopped."""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

import adapt
from adapt.cli import main as cli
from adapt.conversion import background as flushing
from adapt.conversion import copy_weights as weights
from adapt.conversion import tensor_streams as streams
from adapt.conversion import weight_plan as plans
from adapt.conversion.convert import convert
from adapt.files import outputs, staging
from adapt.files import safetensors_folder as shards
from adapt.files.lease import take_lease, writer_waits
from adapt.probe import in_place as mapped


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3"], ids=["untied, sharded", "tied, one file"])
def test_rows_that_stream_in_small_pieces_with_another_dtype_and_padding_are_what_they_would_be_at_once(
    base_folder, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(streams, "_CHUNK", 1000)  # bytes: seven rows at a time
    out = convert(base_folder(kind), tmp_path / "out", dtype="bfloat16", pad_to_multiple_of=64)
    before, after = _weights(base_folder(kind)), _weights(out)
    assert before.keys() == after.keys()
    for name, old in before.items():
        expected = old.bfloat16()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = old.mean(0)
            expected = torch.cat([old, mean.expand(320 - len(old), -1)])
            expected[VOCABULARY] = mean
            torch.testing.assert_close(after[name], expected.bfloat16(), rtol=0.01, atol=1e-3)
            assert torch.equal(after[name][:VOCABULARY], expected[:VOCABULARY].bfloat16())
        else:
            assert torch.equal(after[name], expected), name
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (320, "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    if kind == "llama":
        index = json.loads((out / shards.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in after.values())
        assert {n: f for f in set(index["weight_map"].values()) for n in load_file(out / f)} == index["weight_map"]


def test_metadata_of_the_files_and_of_the_index_is_kept(base_folder, tmp_path):
    base = shutil.copytree(base_folder("llama"), tmp_path / "base")
    for path in base.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "author": "someone"})
    index = json.loads((base / shards.INDEX).read_text())
    index["metadata"]["note"] = "kept"
    (base / shards.INDEX).write_text(json.dumps(index))
    out = convert(base, tmp_path / "out", verify=False)
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "author": "someone"}
    assert json.loads((out / shards.INDEX).read_text())["metadata"]["note"] == "kept"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_model_whose_pages_are_given_back_computes_what_a_loaded_one_does(base_folder, monkeypatch, kind):
    monkeypatch.setattr(mapped, "_HELD", 2000)  # bytes: every layer is given back, embedding and head go in pieces
    loaded = AutoModelForCausalLM.from_pretrained(base_folder(kind))
    tokens = torch.arange(12)[None]
    with mapped.mapped_model(type(loaded), loaded.config, shards.read_shards(base_folder(kind))) as (model, info):
        assert not info["missing_keys"]
        for _ in range(2):  # the second time all pages come back from the file
            torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits)


_LAST = "model.layers.1.mlp.up_proj.weight"


def test_the_proof_is_of_every_layer_of_the_loaded_weights(base_folder, tmp_path):
    base = shutil.copytree(base_folder("llama"), tmp_path / "base")
    path = base / json.loads((base / shards.INDEX).read_text())["weight_map"][_LAST]
    tensors = load_file(path)
    tensors[_LAST][-1, -1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinity"):
        convert(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("by_hand", [False, True], ids=["in the kernel", "by hand"])
def test_what_is_copied_goes_to_disk_and_leaves_the_page_cache_piece_by_piece(
    base_folder, tmp_path, monkeypatch, by_hand
):
    synced, dropped = [], []
    sync, advise = os.fsync, os.posix_fadvise

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def fadvise(handle, start, size, advice):
        dropped.append((synced[-1], start, size))
        advise(handle, start, size, advice)

    monkeypatch.setattr(streams, "PIECE", 1000)
    monkeypatch.setattr(weights, "PIECE", 1000)
    monkeypatch.setattr(streams, "_CHUNK", 1000)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    if by_hand:
        monkeypatch.delattr(os, "copy_file_range")
    before, after = _weights(base_folder("qwen3")), _weights(convert(base_folder("qwen3"), tmp_path / "out"))
    copied = {name: old for name, old in before.items() if "embed" not in name}
    assert all(torch.equal(after[name], old) for name, old in copied.items())
    assert sum(size for _, _, size in dropped) == sum(old.nbytes for old in copied.values())
    assert max(size for _, _, size in dropped) == 1000
    assert all(Path(path).name == "model.safetensors" for path, _, _ in dropped)


@pytest.mark.parametrize("shift", [64, -64], ids=["late", "early"])
def test_a_copy_that_does_not_stand_where_its_header_says_is_noticed(base_folder, tmp_path, monkeypatch, shift):
    plain = weights.copy_bytes
    monkeypatch.setattr(
        weights, "copy_bytes", lambda read, write, start, at, size: plain(read, write, start, at + shift, size)
    )
    with pytest.raises(ValueError, match=r"was not written as planned|were not written as planned"):
        convert(base_folder("qwen3"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_copy_with_a_piece_left_out_is_noticed(base_folder, tmp_path, monkeypatch):
    plain = os.copy_file_range

    def skipping(read, write, size, offset_src, offset_dst):
        return size if offset_src % 7000 == 3000 else plain(read, write, size, offset_src, offset_dst)

    monkeypatch.setattr(streams, "PIECE", 1000)
    monkeypatch.setattr(weights, "PIECE", 1000)
    monkeypatch.setattr(weights, "_SAMPLE", 10)
    monkeypatch.setattr(os, "copy_file_range", skipping)
    with pytest.raises(ValueError, match="was not written as planned"):
        convert(base_folder("llama"), tmp_path / "out")


def test_a_header_with_another_shape_is_noticed(base_folder, tmp_path, monkeypatch):
    plain, name = plans.encoded_header, "model.layers.0.self_attn.k_proj.weight"

    def transposed(metadata, plan):
        return plain(metadata, plan | {name: {**plan[name], "shape": plan[name]["shape"][::-1]}})

    monkeypatch.setattr(plans, "encoded_header", transposed)
    with pytest.raises(ValueError, match="was not written as planned"):
        convert(base_folder("qwen3"), tmp_path / "out")


def test_what_goes_wrong_beside_the_proof_ends_it(base_folder, tmp_path, monkeypatch):
    """A disk that fails when pieces are brought to it: said by a next forward, with torch's threads as before."""

    def flush(_piece):
        raise OSError(errno.EIO, "Input/output error")

    def probe(model, *_):
        for _ in range(6000):  # ends by the error alone
            model.base_model(torch.tensor([[1, 2]]))
            time.sleep(0.01)

    monkeypatch.setattr(flushing, "_flush", flush)
    monkeypatch.setattr(mapped, "probe", probe)
    with streams.num_threads(2):
        with pytest.raises(OSError, match="Input/output error"):
            convert(base_folder("llama"), tmp_path / "out")
        assert torch.get_num_threads() == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("leases", [True, False], ids=["leased", "no leases here"])
def test_a_source_that_is_cut_while_it_is_mapped_is_one_line(base_folder, tmp_path, monkeypatch, leases):
    """It was SIGBUS, the end of the process."""
    base = shutil.copytree(base_folder("qwen3"), tmp_path / "base")
    path, threads = base / shards.SINGLE, []

    def cut():
        # Where nothing holds a writer up a whole page may not go: that is the SIGBUS.
        os.truncate(path, 100 if leases else path.stat().st_size - 4)

    def probe(model, *_):
        threads.append(threading.Thread(target=cut))
        threads[0].start()
        for _ in range(10_000):
            model.base_model(torch.tensor([[1, 2]]))

    monkeypatch.setattr(mapped, "probe", probe)
    if not leases:
        monkeypatch.setattr(mapped, "take_lease", lambda _file: False)
    elif not _has_leases(path):
        pytest.skip("this filesystem has no leases")
    expected = "something writes to it while it is read" if leases else "became shorter while it was read"
    with pytest.raises(ValueError, match=expected) as refused:
        convert(base, tmp_path / "out")
    assert "\n" not in str(refused.value)
    threads[0].join(10)
    assert not threads[0].is_alive(), "who waited may write now"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def _has_leases(path: Path) -> bool:
    with path.open("rb") as file:
        return take_lease(file)


def test_readers_of_a_leased_file_do_not_wait(base_folder):
    path = base_folder("qwen3") / shards.SINGLE
    with path.open("rb") as file:
        if not take_lease(file):
            pytest.skip("this filesystem has no leases")
        assert path.read_bytes()
        assert not writer_waits(file)


def test_a_proof_that_fails_stops_the_copy(base_folder, tmp_path, monkeypatch):
    pieces, plain = [], weights.copy_bytes
    failed = threading.Event()

    def slowly(*args):
        for piece in plain(*args):
            pieces.append(piece)
            failed.wait(10)
            time.sleep(0.05)
            yield piece

    def probe(*_):
        failed.set()
        raise ValueError("the probe failed")

    monkeypatch.setattr(streams, "PIECE", 1000)
    monkeypatch.setattr(weights, "PIECE", 1000)
    monkeypatch.setattr(weights, "copy_bytes", slowly)
    monkeypatch.setattr(mapped, "probe", probe)
    with pytest.raises(ValueError, match="the probe failed"):
        convert(base_folder("qwen3"), tmp_path / "out")
    assert len(pieces) < 50  # of a hundred
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 4), (4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("held", [16, 1 << 20], ids=["in pieces", "at once"])
def test_the_linear_layer_of_a_mapped_model_has_the_gradient_of_torch_s(monkeypatch, shape, held):
    """No tokens at all: an expert that a mixture calls with none."""
    monkeypatch.setattr(mapped, "_HELD", held)
    weight, bias = torch.randn(5, 4), torch.randn(5)
    ours, theirs = (torch.ones(shape, requires_grad=True) for _ in range(2))
    got = mapped._InPieces.apply(ours, weight, bias, lambda: None)
    want = torch.nn.functional.linear(theirs, weight, bias)
    torch.testing.assert_close(got, want)
    some = torch.zeros_like(want)
    some.view(-1, 5)[:1] = torch.randn(5)  # all other rows have a gradient of zero
    got.backward(some)
    want.backward(some)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_file_is_held_open_after_a_conversion(tmp_path, base_folder):
    gc.collect()
    gc.disable()  # the model is in reference cycles
    try:
        convert(base_folder("llama"), tmp_path / "out")
        assert str(base_folder("llama")) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


# -- however it is stopped --------------------------------------------------------------------------------------------


def _stopped(base: Path, out: Path, number: int, how: signal.Signals) -> int | None:
    """Runs `adapt convert` in a fork that gets a signal at its number-th write or rename; the status, None if it came to none."""

    def hook(event: str, args: tuple) -> None:
        nonlocal number
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.rename", "os.mkdir"):
            number -= 1
            if number == 0:
                os.kill(os.getpid(), how)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        code = 99
        try:
            torch.set_num_threads(1)
            sys.addaudithook(hook)
            code = cli(["convert", str(base), str(out)])
        except SystemExit as exited:
            code = int(exited.code or 0)
        finally:
            os._exit(code if number <= 0 else 77)
    _, status = os.waitpid(child, 0)
    return None if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77 else status


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_write_it_leaves_no_half_folder_and_the_next_run_clears_up(base_folder, tmp_path, how):
    base, out = base_folder("qwen3"), tmp_path / "out"
    for number in range(1, 60):
        status = _stopped(base, out, number, how)
        if status is None:
            break
        if out.exists():  # it was stopped after the rename
            assert adapt.files.model_folder.is_diffusion_checkpoint(out)
            assert {path.name for path in out.iterdir()} >= {"model.safetensors", "tokenizer.json", "config.json"}
            shutil.rmtree(out)
        if how == signal.SIGKILL:
            assert os.WIFSIGNALED(status)
            assert len(list(tmp_path.iterdir())) <= 1  # the one before is gone
        else:
            assert os.WEXITSTATUS(status) in (128 + how, 0)
            assert not list(tmp_path.iterdir())
    else:
        raise AssertionError("it wrote more than 60 files?")
    assert number > 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_process_is_writing_is_left_alone(base_folder, tmp_path):
    """A lock is a process's own, so it is another one that holds it."""
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = os.fork()
    if holder == 0:
        with outputs.scratch_beside(out) as scratch:
            (scratch / "half").touch()
            signal.pause()
    try:
        half = tmp_path / ".out.converting" / "work" / "half"
        while not half.exists():
            time.sleep(0.01)
        with pytest.raises(ValueError, match=rf"out=.*: another run writes to it \(process {holder} on "):
            convert(base_folder("qwen3"), out, verify=False)
        assert half.exists()
        assert not out.exists()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    convert(base_folder("qwen3"), out, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(base_folder, tmp_path, monkeypatch):
    def probe(*_):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")

    monkeypatch.setattr(mapped, "probe", probe)
    with pytest.raises(ValueError, match="appeared meanwhile"):
        convert(base_folder("qwen3"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_file_that_may_not_grow_is_told_as_a_full_disk(base_folder, tmp_path, capfd):
    """The kernel's own refusal, not a pretended one: the process may write no file larger than 20 kB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        os._exit(cli(["convert", str(base_folder("qwen3")), str(tmp_path / "out")]))
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 1
    assert f"error: out={tmp_path}/out: the disk is full, nothing was left on it" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_room_is_asked_for_what_is_written_and_not_for_what_is_read(base_folder, tmp_path, monkeypatch):
    base = base_folder("llama")
    stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(0.75 * stored)))
    with pytest.raises(ValueError, match=r"needs .* GB, but its disk has"):
        convert(base, tmp_path / "as stored", verify=False)
    out = convert(base, tmp_path / "half", dtype="bfloat16", verify=False)
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) < 0.75 * stored


def test_too_little_room_is_said_before_anything_is_written(base_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"out=.*: needs 0\.0 GB, but its disk has 0\.0 GB free; nothing was written"):
        convert(base_folder("qwen3"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_what_stood_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    staging.write_whole(path, "one\n")

    def half(beside):
        beside.write_text("tw")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        staging.write_whole(path, half)
    assert path.read_text() == "one\n"
    staging.write_whole(path, b"three", to_disk=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("metrics.jsonl", b"three")]
